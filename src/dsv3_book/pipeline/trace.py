"""A simulated step, or one overlapped pair, as a trace that ui.perfetto.dev and chrome://tracing open.

The format is Chrome's "JSON object format": a list of events, of which two kinds are used — "X", a complete event with
a start and a duration in microseconds, and "M", metadata that names a process (a rank, a GPU) or a thread (a stream).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
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
        events += [named("process_name", rank, 0, f"rank {rank}"), named("thread_name", rank, 0, "actions")]
        for span in spans:
            parts = {part.kind: {"stage": part.stage, "microbatch": part.microbatch} for part in span.action.parts}
            events.append(complete(rank, 0, str(span.action), span.action.kind, span.start, span.end, unit, parts))
    threads = [itertools.count(1) for _ in timeline.spans]
    links: dict[tuple[int, int], Lanes] = {}
    for flight in timeline.flights:
        source, target = flight.transfer.source, flight.transfer.target
        if flight.end <= flight.start:
            continue
        link = links.setdefault((source, target), Lanes(source, threads[source], f"to rank {target}"))
        thread = link.take(flight.start, flight.end)
        about = {"stage": flight.transfer.stage, "microbatch": flight.transfer.microbatch, "to": target}
        name = f"{flight.transfer.kind}{flight.transfer.stage}.{flight.transfer.microbatch} to {target}"
        events.append(complete(source, thread, name, "hop", flight.start, flight.end, unit, about))
    return events + [named for link in links.values() for named in link.named]


class Lanes:
    """Threads for what may travel side by side: events of one thread must nest, so a link gets as many as it needs.

    numbers: where new threads of process `pid` get their numbers from.  named: the events that name them.
    """

    def __init__(self, pid: int, numbers: Iterator[int], name: str) -> None:
        self.pid, self.numbers, self.name = pid, numbers, name
        self.free: dict[int, float] = {}  # thread -> when it is
        self.named: list[Event] = []

    def take(self, start: float, end: float) -> int:
        """The thread for something from `start` to `end`; to be asked in the order of starts."""
        thread = next((t for t, free in self.free.items() if free <= start), None)
        if thread is None:
            thread, more = next(self.numbers), f" ({len(self.free)})" if self.free else ""
            self.named.append(named("thread_name", self.pid, thread, self.name + more))
        self.free[thread] = end
        return thread


def _streams(streams: Streams, unit: float) -> list[Event]:
    events = [named("process_name", 0, 0, "one GPU")]
    events += [named("thread_name", 0, tid, name) for tid, name in enumerate(("compute", "communication"))]
    for part in streams.parts:
        kind = "communication" if part.communicates else "compute"
        events.append(
            complete(0, int(part.communicates), part.name, kind, part.start, part.end, unit, {"layer": part.layer})
        )
    return events


def named(what: str, pid: int, tid: int, name: str) -> Event:
    """Gives process `pid` ("process_name") or one of its threads ("thread_name") a name."""
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def complete(
    pid: int, tid: int, name: str, category: str, start: float, end: float, unit: float, args: dict[str, Any]
) -> Event:
    """Something from `start` to `end`, in units of `unit` seconds; `args` are shown when it is clicked on."""
    micro = unit * 1e6
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category,
        "ts": start * micro, "dur": (end - start) * micro, "args": args,
    }  # fmt: skip
