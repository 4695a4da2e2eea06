"""One real step of all processes as a trace for ui.perfetto.dev: what each computed, and what travelled meanwhile.

A process of the trace is a rank. Its first thread holds its actions, named as in the schedule ("F0.4+B3.1" is an
overlapped pair), and inside each the parts it was made of ("F0.4 attention"); gaps between actions are the pipeline's
bubble. The threads below hold the messages between experts, and in each the time in which somebody stood still for it:
what is hidden in a pair is the rest. On a GPU these are the times of the process that issues the work, not the GPU's.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_book.parallel.transport import Event as Message
from dsv3_book.pipeline.executor import Watch
from dsv3_book.pipeline.overlap import Event
from dsv3_book.pipeline.schedule import Action, Pair
from dsv3_book.pipeline.trace import Lanes, complete, named

MICRO = 1e-6  # traces count in microseconds


@dataclass(frozen=True)
class Recorded:
    """One rank's step. `clock`: seconds to add to its `perf_counter` for the time of day."""

    label: str
    clock: float
    actions: Sequence[Action | Pair]
    events: Sequence[Event]
    messages: Sequence[Message] = ()


def write_profile(
    path: Path,
    label: str,
    actions: Sequence[Action | Pair],
    watch: Watch,
    messages: Sequence[Message] = (),
    group: dist.ProcessGroup | None = None,
) -> None:
    """Gathers all ranks' records on rank 0, which writes the trace; every rank of `group` (None: all) must call it.

    Clocks are brought together by each machine's time of day: across machines they are as right as those (NTP: about a
    millisecond).

    Args:
        path: of the JSON file; folders are made, a file that is there is replaced.
        label: where this rank stands, for people: "pp 0, dp 1, ep 0".
        actions: what this rank did: `schedule.actions[rank in the pipeline]`.
        watch: of `Pipeline.step`.
        messages: `events` of the `DelayedTransport` through which the step's all-to-alls went.

    Raises:
        OSError: the file can't be written (on rank 0).
    """
    mine = Recorded(label, clock_offset(), list(actions), list(watch.events), list(messages))
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    everyone: list[Any] = [mine] * size
    if size > 1:
        dist.gather_object(mine, everyone if rank == 0 else None, group=group, group_dst=0)
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(step_trace(everyone)), encoding="utf-8")
        os.replace(temporary, path)


def clock_offset() -> float:
    """What `time.perf_counter` lacks to the time of day, from the quickest of a few tries: a pause between the two
    readings would count as a difference of clocks."""

    def once() -> tuple[float, float]:
        before, now, after = time.perf_counter(), time.time(), time.perf_counter()
        return after - before, now - (before + after) / 2

    return min(once() for _ in range(10))[1]


def step_trace(ranks: Sequence[Recorded]) -> dict[str, Any]:
    """The records of all ranks, from rank 0 on, as a trace; its first event begins at 0."""
    times = [t + r.clock for r in ranks for t in (*(e.start for e in r.events), *(m.issued for m in r.messages))]
    begin = min(times, default=0.0)
    traced = [event for rank, record in enumerate(ranks) for event in _rank(rank, record, begin)]
    return {"displayTimeUnit": "ms", "traceEvents": traced}


def by_action(actions: Sequence[Action | Pair], events: Sequence[Event]) -> list[tuple[Action | Pair, list[Event]]]:
    """Each action with the parts recorded of it, in order.

    Raises:
        ValueError: the parts are not those of the actions.
    """
    found: list[tuple[Action | Pair, list[Event]]] = []
    at = 0
    for action in actions:
        chunks = {("B" if p.kind == "I" else p.kind, p.stage, p.microbatch) for p in action.parts}
        first = at
        while at < len(events) and (events[at].kind, events[at].stage, events[at].microbatch) in chunks:
            at += 1
        found.append((action, list(events[first:at])))
    if at < len(events):
        raise ValueError(f"{events[at]} is of no action in its turn: give the actions of the step that was watched")
    return found


def _rank(rank: int, record: Recorded, begin: float) -> list[dict[str, Any]]:
    def micro(seconds: float) -> int:
        """Whole microseconds from the beginning, so that what nests or follows does so exactly."""
        return math.floor((seconds + record.clock - begin) / MICRO)

    traced = [named("process_name", rank, 0, f"rank {rank}" + (f" ({record.label})" if record.label else ""))]
    traced += [
        {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}},
        named("thread_name", rank, 0, "actions and their parts"),
    ]
    for action, parts in by_action(record.actions, record.events):
        if not parts:
            continue
        about: dict[str, Any] = {p.kind: {"stage": p.stage, "microbatch": p.microbatch} for p in action.parts}
        start, end = micro(min(e.start for e in parts)), micro(max(e.end for e in parts))
        traced.append(complete(rank, 0, str(action), action.kind, start, end, MICRO, about))
        traced += [_part(rank, event, micro(event.start), micro(event.end)) for event in parts]
    lanes = Lanes(rank, itertools.count(1), "between experts")
    for message in record.messages:
        sent, over = micro(message.issued), micro(_over(message))
        thread = lanes.take(sent, over)
        about = {"bytes": message.bytes, "waited_for_us": 0}
        traced.append(complete(rank, thread, str(message.label), "all-to-all", sent, over, MICRO, about))
        if message.exposed > 0:
            about["waited_for_us"] = round(message.exposed / MICRO)
            waited = micro(message.wait_began)
            traced.append(complete(rank, thread, "waited for", "wait", waited, over, MICRO, {}))
    return traced + lanes.named


def _part(rank: int, event: Event, start: int, end: int) -> dict[str, Any]:
    kind = "W" if event.part.endswith(" W") else event.kind
    about = {"stage": event.stage, "microbatch": event.microbatch, "paired": event.paired}
    return complete(
        rank, 0, f"{event.kind}{event.stage}.{event.microbatch} {event.part}", kind, start, end, MICRO, about
    )


def _over(message: Message) -> float:
    """When a message was known to be there; one that nobody waited for ends where it began."""
    return message.issued if math.isnan(message.wait_ended) else message.wait_ended
