"""The few tensor operations every module computes with: linear, grouped linear, SwiGLU, RMSNorm, the loss.

Modules never multiply matrices themselves; they call this file. It is the seam where FP8 and deferred weight gradients
plug in. Weights are kept in fp32 and cast to the activations' dtype where they are used, so gradients come back,
and accumulate, in fp32 (report §3.3: master weights, weight gradients and their accumulation stay in FP32).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def linear(x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*n o"]:
    """x · weightᵀ in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


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


def swiglu(gate: Float[Tensor, "*n F"], up: Float[Tensor, "*n F"]) -> Float[Tensor, "*n F"]:
    """silu(gate) · up, keeping only its two inputs for backward (report §3.3 caches SwiGLU's inputs)."""
    return _SwiGLU.apply(gate, up, None)


def gated_swiglu(
    gate: Float[Tensor, "S F"], up: Float[Tensor, "S F"], scale: Float[Tensor, " S"]
) -> Float[Tensor, "S F"]:
    """SwiGLU whose rows are multiplied by the router's gate weight, in one pass.

    (g·h)·W = g·(h·W): weighting the narrow hidden rows [F] instead of the wide outputs [D] is the cheaper place.
    """
    return _SwiGLU.apply(gate, up, scale)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, scale)
        y = F.silu(gate).mul_(up)
        return y if scale is None else y.mul_(scale.to(y.dtype)[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, scale = ctx.saved_tensors
        dy = grads[0]
        act = F.silu(gate)
        dscale = None
        if scale is not None:
            dscale = torch.linalg.vecdot(dy.float(), (act * up).float()).to(scale.dtype)
            dy = dy * scale.to(dy.dtype)[:, None]
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, act.mul_(dy), dscale


def rms_norm(x: Float[Tensor, "*n i"], weight: Float[Tensor, " i"], eps: float) -> Float[Tensor, "*n i"]:
    """x / √(mean(x²) + eps) · weight, the mean in fp32 whatever the dtype of x."""
    return _RMSNorm.apply(x, weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        rstd = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dy = grads[0].float()
        unit = x.float() * rstd
        dweight = (dy * unit).reshape(-1, x.shape[-1]).sum(0)
        dunit = dy * weight
        # d/dx of x·rstd: the part of dunit along x is taken out, because rescaling x changes nothing.
        along = torch.linalg.vecdot(dunit, unit).div_(x.shape[-1]).unsqueeze_(-1)
        return dunit.addcmul_(unit, along, value=-1).mul_(rstd).to(x.dtype), dweight.to(weight.dtype), None


class Linear(nn.Module):
    """y = x · weightᵀ without bias; `weight` is [out, in] as in the released files, and filled by `init_weights`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain that starts at one (report §2.1: also after each compressed latent)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The dense feed-forward layer down(silu(gate(x)) · up(x)), also used for the shared experts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], chunk: int | None = None
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(x · weightᵀ) against `targets`, in nats, without ever holding all N·V logits.

    Rows go through in chunks (by default about a million logits at a time). Each chunk's gradients are taken on the
    spot, in the forward pass, because afterwards its logits are gone; backward only scales them. Softmax and sums are
    fp32.
    """
    chunk = chunk or max(1, 2**20 // weight.shape[0])
    if not torch.is_grad_enabled():
        w = weight.to(x.dtype)
        parts = [
            F.cross_entropy(F.linear(a, w).float(), b, reduction="sum")
            for a, b in zip(x.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.stack(parts).sum() / x.shape[0]
    return _LinearCrossEntropy.apply(x, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        w = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        loss = x.new_zeros((), dtype=torch.float32)
        for rows in torch.arange(x.shape[0], device=x.device).split(chunk):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = F.linear(x[part], w).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            target = targets[part, None]
            loss += (log_z - logits.gather(1, target)).sum()
            # d loss / d logits = softmax − one-hot, over N for the mean
            dlogits = logits.sub_(log_z).exp_().scatter_add_(1, target, -torch.ones_like(log_z)).div_(x.shape[0])
            dlogits = dlogits.to(x.dtype)
            torch.mm(dlogits, w, out=dx[part])
            dw += dlogits.t() @ x[part]
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dw * grads[0].to(dw.dtype), None, None


class recomputed:
    """Computes `fn(*inputs)` now, forgets the result after its use, and computes it again in backward.

        with recomputed(fn, x) as y:
            z = consumer(y)          # what consumer would save of y is not kept, only x is

    This is the report's recomputation of RMSNorm and the MLA up-projections (§3.2.3): cheap operations with large
    outputs. `fn` must be a pure function returning a tensor or a tuple of tensors. Unlike activation checkpointing, the
    consumer itself (attention, a linear layer) isn't run twice.
    """

    def __init__(self, fn: Any, *inputs: Tensor, enabled: bool = True) -> None:
        self.fn, self.inputs, self.enabled = fn, inputs, enabled
        self.again: tuple[Tensor, ...] | None = None

    def __enter__(self) -> Any:
        out = self.fn(*self.inputs)
        if self.enabled and torch.is_grad_enabled():
            outputs = out if isinstance(out, tuple) else (out,)
            self.places = {t.untyped_storage().data_ptr(): i for i, t in enumerate(outputs)}
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self.hooks.__enter__()
        return out

    def __exit__(self, *error: Any) -> None:
        if self.enabled and torch.is_grad_enabled():
            self.hooks.__exit__(*error)

    def _pack(self, saved: Tensor) -> Any:
        index = self.places.get(saved.untyped_storage().data_ptr())
        if index is None:
            return saved
        return index, saved.size(), saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.again is None:
            with torch.no_grad():
                again = self.fn(*self.inputs)
            self.again = again if isinstance(again, tuple) else (again,)
        index, size, stride, offset = packed
        return torch.as_strided(self.again[index], size, stride, offset)
