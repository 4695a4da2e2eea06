"""A simulated step, or one overlapped pair, as a trace that ui.perfetto.dev and chrome://tracing open.

The format is Chrome's "JSON object format": a list of events, of which two kinds are used — "X", a complete event with
a start and a duration in microseconds, and "M", metadata that names a process (a rank, a GPU) or a thread (a stream).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .pair import Streams
from .simulate import Timeline

Event = dict[str, Any]


def to_perfetto(timeline: Timeline | Streams, unit: float = 1e-3) -> dict[str, Any]:
    """The trace as a dict that `json.dump` writes.

    A step has one process a rank, with a thread for its actions and one for each link it sends on; a pair is one
    process with two threads, compute and communication.

    Args:
        timeline: what `simulate`, `pair` or `alone` gave.
        unit: seconds that one unit of its times stands for; by default they are milliseconds.
    """
    events = _step(timeline, unit) if isinstance(timeline, Timeline) else _streams(timeline, unit)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def save_perfetto(timeline: Timeline | Streams, path: str | Path, unit: float = 1e-3) -> Path:
    """Write `to_perfetto` to a file, e.g. `step.json`: open it at ui.perfetto.dev."""
    path = Path(path)
    path.write_text(json.dumps(to_perfetto(timeline, unit)))
    return path


def _step(timeline: Timeline, unit: float) -> list[Event]:
    events: list[Event] = []
    for rank, spans in enumerate(timeline.spans):
        events += [_named("process_name", rank, 0, f"rank {rank}"), _named("thread_name", rank, 0, "actions")]
        for span in spans:
            parts = {part.kind: {"stage": part.stage, "microbatch": part.microbatch} for part in span.action.parts}
            events.append(_complete(rank, 0, str(span.action), span.action.kind, span.start, span.end, unit, parts))
    # Tensors that travel side by side can't share a thread, where events must nest: a link gets as many as it needs.
    lanes: dict[tuple[int, int], list[tuple[int, float]]] = {}  # link -> (thread, when it is free)
    threads = [1] * timeline.num_ranks
    for flight in timeline.flights:
        source, target = flight.transfer.source, flight.transfer.target
        if flight.end <= flight.start:
            continue
        link = lanes.setdefault((source, target), [])
        lane = next((i for i, (_, free) in enumerate(link) if free <= flight.start), len(link))
        if lane == len(link):
            link.append((threads[source], 0.0))
            threads[source] += 1
            events.append(
                _named("thread_name", source, link[lane][0], f"to rank {target}" + (f" ({lane})" if lane else ""))
            )
        thread = link[lane][0]
        link[lane] = (thread, flight.end)
        about = {"stage": flight.transfer.stage, "microbatch": flight.transfer.microbatch, "to": target}
        name = f"{flight.transfer.kind}{flight.transfer.stage}.{flight.transfer.microbatch} to {target}"
        events.append(_complete(source, thread, name, "hop", flight.start, flight.end, unit, about))
    return events


def _streams(streams: Streams, unit: float) -> list[Event]:
    events = [_named("process_name", 0, 0, "one GPU")]
    events += [_named("thread_name", 0, tid, name) for tid, name in enumerate(("compute", "communication"))]
    for part in streams.parts:
        kind = "communication" if part.communicates else "compute"
        events.append(
            _complete(0, int(part.communicates), part.name, kind, part.start, part.end, unit, {"layer": part.layer})
        )
    return events


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(
    pid: int, tid: int, name: str, category: str, start: float, end: float, unit: float, args: dict[str, Any]
) -> Event:
    micro = unit * 1e6
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category,
        "ts": start * micro, "dur": (end - start) * micro, "args": args,
    }  # fmt: skip
