"""Bringing tokens to their experts and the results back: the protocol, and its local form.

Both ways have two phases, start and wait, so that a schedule can compute something else while tokens travel.
`parallel/all_to_all.py` (Part III) implements the same protocol between processes; here nothing leaves the process.
"""

from __future__ import annotations

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
    """A combine under way."""

    def wait(self) -> Float[Tensor, "N D"]:
        """Every token's K results, summed."""
        ...


@runtime_checkable
class Handle(Protocol):
    """A dispatch under way, and the map by which its results find the way back."""

    def wait(self) -> Arrived:
        """The token-slots that arrived here."""
        ...

    def combine(self, y: Float[Tensor, "S D"]) -> Pending:
        """Starts sending the experts' results back to their tokens."""
        ...


@runtime_checkable
class Dispatch(Protocol):
    """Sends each of N tokens to its K experts."""

    def start(self, x: Float[Tensor, "N D"], experts: Int[Tensor, "N K"], gates: Float[Tensor, "N K"]) -> Handle:
        """Starts the journey of x, without waiting for its end."""
        ...


class LocalDispatch:
    """All experts live here: dispatch is a permutation of rows, combine its transpose."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def start(self, x: Float[Tensor, "N D"], experts: Int[Tensor, "N K"], gates: Float[Tensor, "N K"]) -> Handle:
        return LocalHandle(x, experts, gates, self.num_experts)


class LocalHandle:
    """Slot s (sorted by expert) holds token `source[s]`; slot (n, k) of token n went to place `back[n, k]`."""

    def __init__(self, x: Tensor, experts: Tensor, gates: Tensor, num_experts: int) -> None:
        N, K = experts.shape
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        self.source = order // K
        self.back = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device)).view(N, K)
        counts = torch.bincount(flat, minlength=num_experts)
        self.arrived = Arrived(_Spread.apply(x, self.source, self.back), gates.flatten()[order], counts)

    def wait(self) -> Arrived:
        return self.arrived

    def combine(self, y: Float[Tensor, "S D"]) -> Pending:
        return Done(_Gather.apply(y, self.back, self.source))


class Done(NamedTuple):
    """A combine that needed no travel."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result


class _Spread(torch.autograd.Function):
    """Row n of x to each of its K slots; backward sums the K slots' gradients. `_Gather` is the same, turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _sum_slots(grads[0], back), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, back: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_slots(y, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return grads[0].index_select(0, source), None, None


def _sum_slots(y: Tensor, back: Tensor) -> Tensor:
    """[S, D] → [N, D]: every token's K rows summed, always in the same order, so the result is the same every time."""
    return F.embedding_bag(back, y, mode="sum")
