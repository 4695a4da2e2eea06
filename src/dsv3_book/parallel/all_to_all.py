"""Dispatch and combine between processes: direct all-to-all (report §3.2).

The E experts lie on the R ranks of a group in contiguous ranges: rank r holds r·E/R … (r+1)·E/R − 1. A token's row is
sent once to every rank that holds some of its experts, and copied there, a slot for each; on the way back that rank
first adds up what its experts made of the token, and one row returns. What arrives is sorted by (local expert, source
rank, token): a rank sees its part of a local dispatch of everybody's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.fp8.quantize import dequantize_activation, quantize_activation
from dsv3_book.model.dispatch import Dispatch
from dsv3_book.parallel.hop import Hop, Slots, Wire, as_bytes, columns, sum_runs
from dsv3_book.parallel.mesh import link, node_size
from dsv3_book.parallel.terms import Terms
from dsv3_book.parallel.traffic import Traffic
from dsv3_book.parallel.transport import Transport


class Travelling(Dispatch):
    """Sends rows over one or more wires, hop after hop.

    num_experts: E, on `ranks` ranks of which this is `rank`.  owners: for every wire, from an expert to a rank of that
    wire's group.  fp8: rows travel to the experts (and gradients to them, in combine's backward) as E4M3 with scales
    that are powers of two; they return in their own dtype.  asynchronous: False completes every journey at its start.
    """

    def __init__(
        self,
        wires: list[Wire],
        owners: list[Callable[[Tensor], Tensor]],
        num_experts: int,
        ranks: int,
        rank: int,
        fp8: bool,
        asynchronous: bool,
    ) -> None:
        self.wires, self.owners = wires, owners
        self.num_experts, self.ranks, self.rank = num_experts, ranks, rank
        self.fp8, self.asynchronous = fp8, asynchronous
        self.name = ""  # of what it is used for, in errors and traces

    def plan(self, experts: Int[Tensor, "N K"], x: Float[Tensor, "N D"] | None = None) -> RowExchange:
        """Starts the exchange of counts. Given x, all ranks learn from it whether they agree before any row moves."""
        return RowExchange(self, experts, x)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What has left this process since `forget_traffic`: in "scatter" (with all counts) and in "gather"."""
        return {
            "scatter": sum((wire.scattered for wire in self.wires), Traffic()),
            "gather": sum((wire.gathered for wire in self.wires), Traffic()),
        }

    def forget_traffic(self) -> None:
        """Starts counting anew."""
        for wire in self.wires:
            wire.scattered.clear()
            wire.gathered.clear()


class AllToAll(Travelling):
    """Every token straight to each rank that holds some of its experts.

    group: the ranks that share the experts (None: all there are).  ranks_per_node: only to say which traffic crosses
    nodes (None: as the launcher says).  transport: a test's, to delay and watch.

    Raises:
        ValueError: the experts don't divide among the ranks.
        RuntimeError: (from scatter, gather and their `wait`) a peer is gone or too late.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_experts: int,
        *,
        ranks_per_node: int | None = None,
        fp8: bool = False,
        asynchronous: bool = True,
        transport: Transport | None = None,
    ) -> None:
        wire = wire_of(group, node_size(ranks_per_node), transport or Transport())
        ranks, rank = len(wire.links), wire.links.index("self")
        each = experts_each(num_experts, ranks)
        super().__init__([wire], [lambda expert: expert // each], num_experts, ranks, rank, fp8, asynchronous)


def wire_of(group: dist.ProcessGroup | None, ranks_per_node: int, transport: Transport, name: str = "") -> Wire:
    """The wire over a group (None: all processes, or this one alone where none were joined)."""
    if not dist.is_initialized():
        return Wire(None, ["self"], transport, name)
    group = group or dist.group.WORLD
    here, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
    return Wire(group, [link(here, there, ranks_per_node) for there in ranks], transport, name)


def experts_each(num_experts: int, ranks: int) -> int:
    """How many experts each rank holds."""
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(f"{num_experts} experts don't divide among {ranks} ranks: choose another ep")
    return num_experts // ranks


class RowExchange:
    """An `Exchange` between processes, for one routing of this rank's N tokens and whatever the others have.

    The first scatter also tells for which experts rows are; a journey starts only when that one has arrived, and all
    ranks start and await theirs in one order. Errors and traces call a journey by what it is to a layer, "dispatch F"
    with gates, its gradient "dispatch B"; "combine F", and its gradient "combine B". In front stands `name`, the
    dispatch's when the exchange was planned; both can be set, to the action and layer that it is for.
    """

    def __init__(self, dispatch: Travelling, experts: Int[Tensor, "N K"], x: Tensor | None) -> None:
        self.dispatch = dispatch
        self.name = dispatch.name
        N, K = self.shape = experts.shape
        row = torch.arange(N, device=experts.device).repeat_interleave(K)
        key = experts.flatten().int() * dispatch.ranks + dispatch.rank
        self.own = Terms.of(dispatch.num_experts, x, dispatch.fp8)
        self.hops: list[Hop] = []
        self._next_hop(Slots(row, key), N, self.own, self._label("dispatch F"))
        self.landing: Landing | None = None

    @property
    def counts(self) -> Int[Tensor, " E"]:
        """Slots of each expert that lives here. Asking before the first scatter has arrived is itself a collective."""
        return self.landed().counts

    def scatter(self, x: Float[Tensor, "N D"], gates: Float[Tensor, "N K"] | None) -> Journey:
        self.own.admits(x)
        label = self._label("combine B" if gates is None else "dispatch F")
        gates = None if gates is None else gates.detach().flatten()
        return Journey(self._scatter(x.detach(), gates, label), self.dispatch.asynchronous)

    def gather(self, y: Float[Tensor, "S D"], gates: Float[Tensor, " S"] | None) -> Journey:
        label = self._label("combine F" if gates is None else "dispatch B")
        gates = None if gates is None else gates.detach()
        return Journey(self._gather(y.detach(), gates, label), self.dispatch.asynchronous)

    def _scatter(self, x: Tensor, numbers: Tensor | None, label: str) -> Steps:
        rows = pack(x) if self.dispatch.fp8 else x
        for i in range(len(self.dispatch.wires)):
            hop = self._hop(i, label)
            slots = hop.carry(numbers, label)
            going = hop.forward(rows, label)
            yield
            numbers = slots()
            self._begin(i + 1, label)  # the next hop's counts travel while rows still arrive
            rows = going.wait()
        rows = unpack(rows, x.shape[1], x.dtype) if self.dispatch.fp8 else rows
        landing = self.landed()
        return rows.index_select(0, landing.copy), None if numbers is None else numbers[landing.order]

    def _gather(self, y: Tensor, numbers: Tensor | None, label: str) -> Steps:
        landing = self.landed()
        rows = sum_runs(y, landing.place, landing.slots)
        numbers = None if numbers is None else numbers[landing.place]
        for hop in reversed(self.hops):
            going = hop.back(rows, label)
            slots = (lambda: None) if numbers is None else hop.numbers_back(numbers, label)
            yield
            rows, numbers = going(), slots()
        return rows, None if numbers is None else numbers.view(self.shape)

    def landed(self) -> Landing:
        """How slots lie where their experts are."""
        if self.landing is None:
            for i in range(len(self.dispatch.wires)):
                hop = self._hop(i, self._label("dispatch F"))
                if hop.arrived is None:
                    hop.carry(None, self._label("dispatch F"))()
            ranks, experts = self.dispatch.ranks, self.dispatch.num_experts // self.dispatch.ranks
            assert hop.arrived is not None
            self.landing = Landing(hop.arrived, sum(hop.received_copies), ranks, experts, self.dispatch.rank)
        return self.landing

    def _hop(self, i: int, label: str) -> Hop:
        """Hop i, when its counts are there and everybody's terms agree."""
        self._begin(i, label)
        hop = self.hops[i]
        hop.settle()
        if hop.terms.differ():
            nothing = torch.zeros(0, dtype=torch.int32, device=hop.row.device)
            for _ in self.dispatch.wires[i + 1 :]:  # who is reached by another hop only hears of it too
                self._next_hop(Slots(nothing, nothing), 0, hop.terms, label)
            hop.terms.check(f"the ranks of all-to-all '{label}'")
        return hop

    def _begin(self, i: int, label: str) -> None:
        """Makes hop i, if there is to be one and it isn't made yet, of what the one before has brought."""
        if i == len(self.hops) < len(self.dispatch.wires):
            before = self.hops[-1]
            assert before.arrived is not None
            self._next_hop(before.arrived, sum(before.received_copies), before.terms, label)

    def _label(self, journey: str) -> str:
        return f"{self.name} {journey}" if self.name else journey

    def _next_hop(self, slots: Slots, rows: int, terms: Terms, label: str) -> None:
        i, ranks = len(self.hops), self.dispatch.ranks
        owner = self.dispatch.owners[i](slots.key // ranks)
        self.hops.append(Hop(self.dispatch.wires[i], rows, slots, owner, terms, label))


class Landing:
    """The slots that arrived, in order of arrival: `order` sorts them by (expert, source rank, token), `place` is its
    inverse; sorted, they hold the rows `copy`. `slots` [C] are the slots of each copy, `counts` of each expert here."""

    def __init__(self, arrived: Slots, copies: int, ranks: int, experts: int, rank: int) -> None:
        self.order = arrived.key.argsort(stable=True)
        places = torch.arange(len(self.order), device=self.order.device)
        self.place = torch.empty_like(self.order).scatter_(0, self.order, places)
        self.copy = arrived.row[self.order]
        self.slots = torch.bincount(arrived.row, minlength=copies)
        self.counts = torch.bincount(arrived.key // ranks - rank * experts, minlength=experts)


Steps = Generator[None, None, tuple[Tensor, Tensor | None]]


class Journey:
    """A journey as a generator that stops wherever something is under way; `wait` takes it to its end."""

    def __init__(self, steps: Steps, asynchronous: bool = True) -> None:
        self.steps = steps
        self.result: Any = None
        self.ended = False
        self.advance()
        if not asynchronous:
            self.wait()

    def advance(self) -> bool:
        """Waits for the hop under way and starts the next one; False after the last."""
        try:
            next(self.steps)
        except StopIteration as stop:
            if stop.value is None:
                raise RuntimeError("this journey has failed before: see its first error") from None
            self.result, self.ended = stop.value, True
        return not self.ended

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """What arrived: rows, and numbers if some were sent."""
        while not self.ended:
            self.advance()
        return self.result


# FP8 payload ---------------------------------------------------------------------------------------------------------
def pack(x: Float[Tensor, "N D"]) -> Tensor:
    """uint8 [N, D + 4·⌈D/128⌉]: E4M3 codes, then the bytes of their fp32 power-of-two scales."""
    codes, scale = quantize_activation(x.float() if x.dtype == torch.float64 else x, pow2=True)
    return torch.cat([codes.view(torch.uint8), as_bytes(scale)], 1)


def unpack(rows: Tensor, D: int, dtype: torch.dtype) -> Float[Tensor, "N D"]:
    """Back from `pack`; exact in any dtype with 4 significant bits or more and the range for it."""
    codes, scale = columns(rows, 0, D, torch.float8_e4m3fn), columns(rows, D, rows.shape[1], torch.float32)
    return dequantize_activation(codes, scale, dtype)
