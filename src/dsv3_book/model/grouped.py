"""Products in groups: every expert's rows with that expert's weights (the other half of `ops`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_book.model.ops import swiglu
from dsv3_book.model.wgrad import deferrable, weight_gradients, will_be_put_off

ExpertRows = tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]  # an expert, and its rows of x, h, dgate, dup, dy


def grouped_linear(
    x: Float[Tensor, "S i"], weight: Float[Tensor, "E o i"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "S o"]:
    """One linear map per expert, on rows sorted by expert: the first counts[0] rows meet weight[0], and so on.

    An expert without rows is skipped and gets a zero gradient; a row is never dropped, whatever the counts.
    """
    return _GroupedLinear.apply(x, weight, counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.deferrable, weight = deferrable(weight), weight.to(x.dtype)
        ctx.save_for_backward(x, weight, counts)
        return _grouped_mm(x, weight.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = _grouped_mm(dy, weight, counts) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            (dw,) = weight_gradients(partial(_grouped_wgrad, dy, x, counts), *ctx.deferrable)
        return dx, dw, None


def _grouped_wgrad(dy: Tensor, x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """dW [E, o, i] of every expert: dyᵀ · x over its rows."""
    dw = dy.new_zeros(len(counts), dy.shape[1], x.shape[1])
    for rows, e in _groups(counts):
        torch.mm(dy[rows].t(), x[rows], out=dw[e])
    return (dw,)


def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """[S, i] times [E, i, o] by groups of rows."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # the one dtype it takes there
        return F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
    y = x.new_empty(x.shape[0], weight.shape[2])
    for rows, e in _groups(counts):
        torch.mm(x[rows], weight[e], out=y[rows])
    return y


def _groups(counts: Tensor) -> list[tuple[slice, int]]:
    """(rows, expert) of every expert that has rows."""
    groups, start = [], 0
    for e, n in enumerate(counts.tolist()):
        if n:
            groups.append((slice(start, start + n), e))
        start += n
    return groups


def grouped_swiglu(
    x: Float[Tensor, "S D"],
    scale: Float[Tensor, " S"],
    counts: Int[Tensor, " E"],
    gate: Float[Tensor, "E F D"],
    up: Float[Tensor, "E F D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "S D"]:
    """One SwiGLU network per expert on rows sorted by expert, each row's result times its `scale` (the router's gate).

    g·(h·W) = (g·h)·W: the gate weighs the narrow hidden rows [F] instead of the wide outputs [D]. Equal to three
    `grouped_linear` with SwiGLU between, which is what runs on a GPU; on a CPU an expert's rows pass through all steps
    before the next expert's, while they are in the cache. Only SwiGLU's inputs are kept for backward, its output is
    computed again (report §3.3).
    """
    if x.device.type != "cpu":
        h = swiglu(grouped_linear(x, gate, counts), grouped_linear(x, up, counts)) * scale.to(x.dtype)[:, None]
        return grouped_linear(h, down, counts)
    return _GroupedSwiGLU.apply(x, scale, counts, gate, up, down)


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.deferrable = deferrable(gate, up, down)
        gate, up, down = gate.to(x.dtype), up.to(x.dtype), down.to(x.dtype)
        scale, places = scale.to(x.dtype)[:, None], _places(counts, x)
        rooms = sum(room.stop - room.start for _, room, _ in places)
        g, u = x.new_empty(rooms, gate.shape[1]), x.new_empty(rooms, gate.shape[1])
        y = torch.empty_like(x)
        for rows, room, e in places:
            xe, n = _padded(x[rows], room), rows.stop - rows.start
            torch.mm(xe, gate[e].t(), out=g[room])
            torch.mm(xe, up[e].t(), out=u[room])
            h = F.silu(g[room]).mul_(u[room])
            h[:n].mul_(scale[rows])
            y[rows] = (h @ down[e].t())[:n]
        ctx.save_for_backward(x, scale, counts, gate, up, down, g, u)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, _, gate, *_ = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.empty_like(scale)
        experts: Iterable[ExpertRows] = _swiglu_backward(ctx.saved_tensors, grads[0], dx, dscale)
        if will_be_put_off(*ctx.deferrable):
            experts = list(experts)  # or else each expert's rows meet its Wgrad while they are still in the cache
        dw = weight_gradients(partial(_swiglu_wgrad, experts, gate.shape, gate.dtype), *ctx.deferrable)
        return dx, dscale[:, 0].float(), None, *dw


def _swiglu_backward(saved: tuple[Tensor, ...], dy: Tensor, dx: Tensor, dscale: Tensor) -> Iterator[ExpertRows]:
    """Fills in dx and dscale expert by expert, and gives what each expert's weight gradients are made of."""
    x, scale, counts, gate, up, down, g, u = saved
    for rows, room, e in _places(counts, x):
        xe, dye, n = _padded(x[rows], room), _padded(dy[rows], room), rows.stop - rows.start
        act = F.silu(g[room])
        h, dh = act * u[room], dye @ down[e]
        dscale[rows, 0] = torch.linalg.vecdot(h, dh)[:n]
        h[:n].mul_(scale[rows])
        dh[:n].mul_(scale[rows])
        du = act.mul_(dh)
        dg = torch.ops.aten.silu_backward(dh.mul_(u[room]), g[room])
        dx[rows] = (dg @ gate[e]).addmm_(du, up[e])[:n]
        yield e, xe, h, dg, du, dye


def _swiglu_wgrad(experts: Iterable[ExpertRows], shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients of gate and up, both of this shape [E, F, D], and of down; zero for an expert without rows."""
    dgate, dup = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    ddown = torch.zeros(shape[0], shape[2], shape[1], dtype=dtype)
    for e, x, h, dg, du, dy in experts:
        torch.mm(dg.t(), x, out=dgate[e])
        torch.mm(du.t(), x, out=dup[e])
        torch.mm(dy.t(), h, out=ddown[e])
    return dgate, dup, ddown


def _places(counts: Tensor, x: Tensor) -> list[tuple[slice, slice, int]]:
    """(rows, room, expert) of every expert that has rows: its rows of x, and its room in a padded buffer.

    On a CPU, oneDNN compiles a bf16 product anew for every number of rows, and loads are never twice the same: rooms
    of 32 rows' multiples keep the compiled ones in use (measured: varying loads cost four times as much without).
    """
    align = 32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1
    places, start = [], 0
    for rows, e in _groups(counts):
        n = rows.stop - rows.start
        stop = start + n + -n % align
        places.append((rows, slice(start, stop), e))
        start = stop
    return places


def _padded(rows: Tensor, room: slice) -> Tensor:
    """The rows, with rows of zeros behind to fill the room. Zeros add nothing to any product."""
    missing = room.stop - room.start - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
