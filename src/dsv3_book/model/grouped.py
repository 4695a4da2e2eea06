"""Products in groups: every expert's rows with that expert's weights (the other half of `ops`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.model.ops import swiglu


def grouped_linear(
    x: Float[Tensor, "S i"], weight: Float[Tensor, "E o i"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "S o"]:
    """One linear map per expert, on rows sorted by expert: the first counts[0] rows meet weight[0], and so on.

    An expert without rows is skipped and gets a zero gradient; a row is never dropped, whatever the counts.
    """
    return _GroupedLinear.apply(x, weight.to(x.dtype), counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return _grouped_mm(x, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = _grouped_mm(dy, weight, counts) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight)
            for rows, e in _groups(counts):
                torch.mm(dy[rows].t(), x[rows], out=dw[e])
        return dx, dw, None


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
    return _GroupedSwiGLU.apply(x, scale, counts, gate.to(x.dtype), up.to(x.dtype), down.to(x.dtype))


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, counts, gate, up, down, g, u = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.empty_like(scale)
        dgate, dup, ddown = torch.zeros_like(gate), torch.zeros_like(up), torch.zeros_like(down)
        for rows, room, e in _places(counts, x):
            xe, dy, n = _padded(x[rows], room), _padded(grads[0][rows], room), rows.stop - rows.start
            act = F.silu(g[room])
            h, dh = act * u[room], dy @ down[e]
            dscale[rows, 0] = torch.linalg.vecdot(h, dh)[:n]
            h[:n].mul_(scale[rows])
            dh[:n].mul_(scale[rows])
            du = act.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u[room]), g[room])
            torch.mm(dy.t(), h, out=ddown[e])
            torch.mm(dg.t(), xe, out=dgate[e])
            torch.mm(du.t(), xe, out=dup[e])
            dx[rows] = (dg @ gate[e]).addmm_(du, up[e])[:n]
        return dx, dscale[:, 0].float(), None, dgate, dup, ddown


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
