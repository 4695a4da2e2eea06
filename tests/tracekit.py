"""Reading traces back as Perfetto does."""

from collections import defaultdict
from typing import Any


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Two slices of one thread follow each other, or one lies in the other: else Perfetto drops one of them."""
    tracks = defaultdict(list)
    for event in events:
        tracks[event["pid"], event["tid"]].append((event["ts"], -event["dur"]))
    for spans in tracks.values():
        open_until: list[float] = []
        for start, minus in sorted(spans):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or start - minus <= open_until[-1]
            open_until.append(start - minus)


def slices(trace: dict[str, Any]) -> list[dict[str, Any]]:
    found = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in found) == 0 and all(event["dur"] >= 0 for event in found)
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in found} == named
    check_nesting(found)
    return found


def inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    return outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]
