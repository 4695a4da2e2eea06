"""Bringing tokens to their experts and the results back: the protocol, and its local form.

Three layers. An `Exchange` moves rows, in both directions, and knows nothing of gradients. A `Dispatch` makes one for
every routing. A `Handle` gives the journey to autograd. Every journey has two phases, start and wait, so that something
else can be computed while tokens travel. `parallel/all_to_all.py` (Part III) implements the same between processes;
here nothing leaves the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Arrived(NamedTuple):
    """Token-slots on the process that holds their experts, sorted by expert."""

    tokens: Float[Tensor, "S D"]
    gates: Float[Tensor, " S"]
    counts: Int[Tensor, " E"]  # rows of each local expert; they sum to S: no token is ever dropped


@runtime_checkable
class Pending(Protocol):
    """Something under way."""

    def wait(self) -> Any:
        """What arrives, once it is there."""
        ...


class Done(NamedTuple):
    """What needed no travel."""

    result: Any

    def wait(self) -> Any:
        return self.result


@runtime_checkable
class Exchange(Protocol):
    """How N tokens here and S token-slots at the experts belong together, for one routing.

    `scatter` and `gather` are linear maps and each is the other's transpose, so a gradient takes the other way. Neither
    is seen by autograd.
    """

    @property
    def counts(self) -> Int[Tensor, " E"]:
        """Slots of each expert that lives here; they sum to S."""
        ...

    def scatter(self, x: Float[Tensor, "N D"], gates: Float[Tensor, "N K"] | None) -> Pending:
        """Every token's row to each of its K slots; `wait()` gives (rows [S, D], gates [S] if some were sent)."""
        ...

    def gather(self, y: Float[Tensor, "S D"], gates: Float[Tensor, " S"] | None) -> Pending:
        """Every token's K rows back, summed; `wait()` gives (sums [N, D], numbers [N, K] if some were sent)."""
        ...


class Dispatch:
    """Sends each of N tokens to its K experts and brings the results back."""

    def plan(self, experts: Int[Tensor, "N K"], x: Float[Tensor, "N D"] | None = None) -> Exchange:
        """The exchange for this routing. x, if it is at hand, shows what rows will travel: only its width and dtype are
        looked at, so that processes which disagree find out before anything is sent."""
        raise NotImplementedError

    def start(self, x: Float[Tensor, "N D"], experts: Int[Tensor, "N K"], gates: Float[Tensor, "N K"]) -> Handle:
        """Starts the journey of x, without waiting for its end."""
        return Handle(self.plan(experts, x), x, gates)


class Handle:
    """A dispatch under way, as autograd sees it, and the map by which its results find the way back."""

    def __init__(self, exchange: Exchange, x: Tensor, gates: Tensor) -> None:
        self.exchange = exchange
        self.trip = Trip(exchange.scatter, exchange.gather)
        self.departed = _Start.apply(self.trip, x, gates)
        self.arrived: Arrived | None = None

    def wait(self) -> Arrived:
        """The token-slots that arrived here."""
        if self.arrived is None:
            tokens, gates = _Finish.apply(self.trip, self.departed)
            self.arrived = Arrived(tokens, gates, self.exchange.counts)
        return self.arrived

    def combine(self, y: Float[Tensor, "S D"]) -> Combining:
        """Starts sending the experts' results back to their tokens."""
        return Combining(self.exchange, y)


class Combining:
    """A combine under way, as autograd sees it."""

    def __init__(self, exchange: Exchange, y: Tensor) -> None:
        self.trip = Trip(exchange.gather, exchange.scatter)
        self.departed = _Start.apply(self.trip, y, None)

    def wait(self) -> Float[Tensor, "N D"]:
        """Every token's K results, summed."""
        return _Finish.apply(self.trip, self.departed)[0]


class Trip:
    """One journey: how to go, how the gradient comes back, and which of them is under way."""

    def __init__(self, go: Callable[..., Pending], back: Callable[..., Pending]) -> None:
        self.go, self.back = go, back
        self.pending: Pending = Done(None)

    def end(self) -> Any:
        """What arrives; it is not kept here."""
        pending, self.pending = self.pending, Done(None)
        return pending.wait()


class _Start(torch.autograd.Function):
    """Departs in forward; in backward it is the one that waits. Its result, empty, only ties it to `_Finish`."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, rows: Tensor, gates: Tensor | None) -> Tensor:
        ctx.trip = trip
        trip.pending = trip.go(rows, gates)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates = ctx.trip.end()
        return None, rows, gates


class _Finish(torch.autograd.Function):
    """Waits in forward; in backward it departs, so that what was computed in between is again computed in between."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, departed: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.trip = trip
        return trip.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor]:
        assert grads[0] is not None
        ctx.trip.pending = ctx.trip.back(*grads)
        return None, grads[0].new_empty(0)


# Nothing leaves the process ------------------------------------------------------------------------------------------
class LocalDispatch(Dispatch):
    """All experts live here: dispatch is a permutation of rows, combine its transpose."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def plan(self, experts: Int[Tensor, "N K"], x: Float[Tensor, "N D"] | None = None) -> LocalExchange:
        return LocalExchange(experts, self.num_experts)


class LocalExchange:
    """Slot s (sorted by expert) holds token `source[s]`; slot (n, k) of token n went to place `back[n, k]`."""

    def __init__(self, experts: Int[Tensor, "N K"], num_experts: int) -> None:
        N, K = experts.shape
        flat = experts.flatten()
        self.order = flat.argsort(stable=True)
        self.source = self.order // K
        places = torch.arange(N * K, device=experts.device)
        self.back = torch.empty_like(self.order).scatter_(0, self.order, places).view(N, K)
        self.counts = torch.bincount(flat, minlength=num_experts)

    def scatter(self, x: Float[Tensor, "N D"], gates: Float[Tensor, "N K"] | None) -> Done:
        return Done((x.index_select(0, self.source), None if gates is None else gates.flatten()[self.order]))

    def gather(self, y: Float[Tensor, "S D"], gates: Float[Tensor, " S"] | None) -> Done:
        return Done((sum_slots(y, self.back), None if gates is None else gates[self.back]))


def sum_slots(y: Float[Tensor, "S D"], back: Int[Tensor, "N K"]) -> Float[Tensor, "N D"]:
    """Every token's K rows summed, always in the same order, so the result is the same every time."""
    return F.embedding_bag(back, y, mode="sum")
