"""The one door through which all-to-alls leave this process: real, or slowed down and watched.

`Transport` starts a `torch.distributed.all_to_all_single` and gives back what is under way. `DelayedTransport` lets
every message arrive a known time after it left, as over a slow link, and writes down when each was started and waited
for: the proof that work was done meanwhile is the order of these events, which even a machine with one core shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.model.dispatch import Done, Pending
from dsv3_book.parallel.lost import named

PARTS = ("counts", "slots", "rows")


@dataclass(frozen=True)
class Label:
    """What a message is, for errors and traces.

    journey: whose it is, "dispatch F".  part: "counts" (how many rows will come), "slots" (for which experts, with what
    gate), "rows" (the tokens).  hop: "" or the name of the hop, "between nodes", "inside the node".
    """

    journey: str
    part: str
    hop: str = ""

    def __str__(self) -> str:
        return f"{self.journey}, {self.part}" + (f" {self.hop}" if self.hop else "")


class Transport:
    """Sends rows with torch.distributed.

    timeout: seconds after which a wait gives up (None: as the process group was made). Use it with gloo only: on NCCL
    a wait with a timeout blocks the CPU.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout

    def start(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None, label: Label
    ) -> Pending:
        """Starts sending the first `sent[0]` rows [R, …] to the group's rank 0, the next `sent[1]` to rank 1, …;
        `wait()` gives the rows that came, sorted by rank. A group of one (or None) sends nothing.

        Raises:
            RuntimeError: (also from `wait`) a peer is gone or too late; names this rank, the group and the message.
        """
        if group is None or len(sent) == 1:
            return Done(rows)
        output = rows.new_empty(sum(received), *rows.shape[1:])
        rows = rows.contiguous()
        with named(f"all-to-all '{label}'", group):
            work = dist.all_to_all_single(output, rows, list(received), list(sent), group=group, async_op=True)
        return Flight(work, rows, output, group, label, self.timeout)


@dataclass
class Flight:
    """An all-to-all under way. It holds what it sends until that has left."""

    work: dist.Work
    rows: Tensor
    output: Tensor
    group: dist.ProcessGroup
    label: Label
    timeout: float | None

    def wait(self) -> Tensor:
        with named(f"all-to-all '{self.label}'", self.group):
            if self.timeout is None:
                self.work.wait()
            else:
                self.work.wait(timedelta(seconds=self.timeout))
        return self.output


# Slowed down and watched ---------------------------------------------------------------------------------------------
@dataclass
class Event:
    """The life of one message: seconds on this process's clock (`time.perf_counter`)."""

    label: Label
    bytes: int
    issued: float
    wait_began: float = float("nan")
    wait_ended: float = float("nan")

    @property
    def exposed(self) -> float:
        """How long somebody stood still for it."""
        return self.wait_ended - self.wait_began


@dataclass
class DelayedTransport(Transport):
    """A transport on which no message is complete before `delay` seconds after it was started.

    delay: seconds, or a function of the label and of the number of bytes that leave this process.
    parts: the messages it holds for; others (by default the few numbers of "counts") are only recorded.
    events: what happened, in order of starting. Forget it with `events.clear()`.
    """

    delay: float | Callable[[Label, int], float] = 0.0
    parts: Collection[str] = ("slots", "rows")
    timeout: float | None = None
    events: list[Event] = field(default_factory=list)

    def start(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None, label: Label
    ) -> Pending:
        size = rows.numel() * rows.element_size()
        delay = self.delay(label, size) if callable(self.delay) else self.delay
        event = Event(label, size, time.perf_counter())
        self.events.append(event)
        return _Late(super().start(rows, sent, received, group, label), event, delay if label.part in self.parts else 0)


@dataclass
class _Late:
    inner: Pending
    event: Event
    delay: float

    def wait(self) -> Tensor:
        event = self.event
        event.wait_began = time.perf_counter()
        result = self.inner.wait()
        if result.device.type == "cuda" and self.delay:
            torch.cuda.synchronize(result.device)  # there `wait` only orders streams
        time.sleep(max(0.0, event.issued + self.delay - time.perf_counter()))
        event.wait_ended = time.perf_counter()
        return result
