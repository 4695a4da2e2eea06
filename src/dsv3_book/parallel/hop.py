"""One hop of a journey: every row once to each rank that needs it, and sums of what comes back.

A row is needed by some *slots*, one for every expert of its token. Direct all-to-all is one hop; node-limited routing
is two, of which the second begins with what the first brought.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv3_book.model.dispatch import Pending
from dsv3_book.parallel.terms import HEAD_BYTES, Terms
from dsv3_book.parallel.traffic import Traffic
from dsv3_book.parallel.transport import Label, Transport


@dataclass
class Wire:
    """A group of ranks, the kind of link from here to each of them, and how (and how much) is sent."""

    group: dist.ProcessGroup | None  # None: this process alone
    links: list[str]  # "self", "nvlink" or "ib", by rank in the group
    transport: Transport
    name: str = ""  # of the hop
    scattered: Traffic = field(default_factory=Traffic)  # what left with `forward` and before it
    gathered: Traffic = field(default_factory=Traffic)  # what left with `back`


class Slots:
    """S slots: of which row each is (ascending), and its key, which says for which expert and from which source rank:
    key = expert · ranks + source, int32 both."""

    def __init__(self, row: Int[Tensor, " S"], key: Int[Tensor, " S"]) -> None:
        self.row, self.key = row, key


class Hop:
    """N rows here, C copies of them sent, C' copies of the others' rows received.

    rows: how many rows there are here.  owner: the rank in the wire's group to which each slot belongs. Making a hop
    starts the exchange of counts; the terms that all ranks must share travel with them.
    """

    def __init__(self, wire: Wire, rows: int, slots: Slots, owner: Int[Tensor, " S"], terms: Terms, journey: str):
        self.wire, self.rows, self.terms, self.journey = wire, rows, terms, journey
        size = len(wire.links)
        self.order = owner.argsort(stable=True)  # slots sorted by owner, then row: so a row's slots stay together
        owner, row, self.key = owner[self.order], slots.row[self.order], slots.key[self.order]
        first = torch.ones_like(owner, dtype=torch.bool)
        first[1:] = (owner[1:] != owner[:-1]) | (row[1:] != row[:-1])
        self.row = row[first]  # the row of every copy that is sent
        copies = torch.bincount(owner[first], minlength=size)
        if len(copies) > size:
            raise ValueError(f"a token has chosen an expert beyond the {terms.low[0]} of this dispatch")
        # where a slot's copy stands among those for the same rank
        self.place = first.cumsum(0) - 1 - (copies.cumsum(0) - copies)[owner]
        heads = torch.stack([copies, torch.bincount(owner, minlength=size)], 1)
        heads = torch.cat([heads, terms.tensor(heads.device).expand(size, -1)], 1)
        self.sent_copies, self.sent_slots = heads[:, :2].t().tolist()
        wire.scattered.add_metadata(wire.links, [1] * size, HEAD_BYTES)
        self.heads: Pending | None = self._start(heads, [1] * size, [1] * size, "counts", journey)
        self.arrived: Slots | None = None

    def settle(self) -> None:
        """Waits for the counts; from then on `terms` spans everybody's."""
        if self.heads is None:
            return
        heads = self.heads.wait().tolist()
        self.heads = None
        self.received_copies, self.received_slots = ([head[i] for head in heads] for i in (0, 1))
        self.terms = Terms.joined([head[2:] for head in heads])

    # There -----------------------------------------------------------------------------------------------------------
    def carry(self, numbers: Float[Tensor, " S"] | None, journey: str) -> Callable[[], Tensor | None]:
        """Starts sending a number for every slot (and what the slots are, if that isn't known yet); call the result for
        the numbers of the slots that came."""
        if self.arrived is None:
            return self._send_slots(numbers, journey)
        return (lambda: None) if numbers is None else self._send_numbers(numbers, journey).wait

    def _send_slots(self, numbers: Float[Tensor, " S"] | None, journey: str) -> Callable[[], Tensor | None]:
        """Starts sending every slot: its copy, its key, its number. What came will be in `arrived`."""
        entries = torch.stack([self.place.int(), self.key], 1)
        if numbers is not None:
            entries = torch.cat([as_bytes(entries), as_bytes(numbers[self.order][:, None])], 1)
        self._count_slots(entries, self.wire.scattered, self.sent_slots)
        pending = self._start(entries, self.sent_slots, self.received_slots, "slots", journey)

        def finish() -> Tensor | None:
            came = pending.wait()
            place, key = (came if numbers is None else columns(came, 0, 8, torch.int32)).unbind(1)
            starts = torch.tensor([0, *accumulate(self.received_copies)][:-1], device=key.device)
            counts = torch.tensor(self.received_slots, device=key.device)
            self.arrived = Slots(place + starts.repeat_interleave(counts, output_size=len(place)), key.contiguous())
            return None if numbers is None else columns(came, 8, came.shape[1], numbers.dtype)[:, 0]

        return finish

    def _send_numbers(self, numbers: Float[Tensor, " S"], journey: str) -> Pending:
        self._count_slots(numbers[:, None], self.wire.scattered, self.sent_slots)
        return self._start(numbers[self.order], self.sent_slots, self.received_slots, "slots", journey)

    def forward(self, x: Shaped[Tensor, "N *w"], journey: str) -> Pending:
        """Starts sending rows, each once per rank that needs it; `wait()` gives the C' that came, sorted by rank."""
        copies = x.index_select(0, self.row)
        self.wire.scattered.add_rows(self.wire.links, self.sent_copies, _row_bytes(copies))
        return self._start(copies, self.sent_copies, self.received_copies, "rows", journey)

    # And back --------------------------------------------------------------------------------------------------------
    def back(self, y: Float[Tensor, "C D"], journey: str) -> Callable[[], Float[Tensor, "N D"]]:
        """Starts sending what became of the C' copies; call the result for the sum over every row's copies."""
        self.wire.gathered.add_rows(self.wire.links, self.received_copies, _row_bytes(y))
        pending = self._start(y, self.received_copies, self.sent_copies, "rows", journey)

        def finish() -> Tensor:
            return sum_runs(
                pending.wait(), self.row.argsort(stable=True), torch.bincount(self.row, minlength=self.rows)
            )

        return finish

    def numbers_back(self, numbers: Float[Tensor, " S"], journey: str) -> Callable[[], Float[Tensor, " S"]]:
        """Starts sending a number of every slot that came; call the result for those of the slots that were sent."""
        self._count_slots(numbers[:, None], self.wire.gathered, self.received_slots)
        pending = self._start(numbers, self.received_slots, self.sent_slots, "slots", journey)

        def finish() -> Tensor:
            came = pending.wait()
            return torch.empty_like(came).index_copy_(0, self.order, came)

        return finish

    def _start(self, rows: Tensor, sent: list[int], received: list[int], part: str, journey: str) -> Pending:
        label = Label(journey, part, self.wire.name)
        return self.wire.transport.start(rows, sent, received, self.wire.group, label)

    def _count_slots(self, entries: Tensor, traffic: Traffic, slots: list[int]) -> None:
        traffic.add_metadata(self.wire.links, slots, _row_bytes(entries))


def sum_runs(y: Float[Tensor, "S D"], order: Int[Tensor, " S"], counts: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """Sums of the first counts[0] rows of y[order], of the next counts[1], …; always in that order."""
    return F.embedding_bag(order, y.contiguous(), counts.cumsum(0) - counts, mode="sum")


def as_bytes(x: Tensor) -> Tensor:
    """Rows as uint8. A copy: an axis of length 1 may have any stride, which a view of other elements doesn't accept."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def columns(rows: Tensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes `start` to `end` of every row [R, bytes], as numbers of a dtype."""
    return rows[:, start:end].clone(memory_format=torch.contiguous_format).view(dtype)


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()
