"""The few tensor operations every module computes with: linear, SwiGLU, RMSNorm, the loss; experts' are in `grouped`.

Modules never multiply matrices themselves; they call this file. It is the seam where FP8 and deferred weight gradients
plug in (`wgrad`). Weights are kept in fp32 and cast to the activations' dtype where they are used, so gradients come
back, and accumulate, in fp32 (report §3.3: master weights, weight gradients and their accumulation stay in FP32).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_book.model.wgrad import deferrable, weight_gradients

# The door to oneDNN that torch's compiler uses; it isn't public, so we go without where a torch has none.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*n o"]:
    """x · weightᵀ in the dtype of x."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    """The three products of a linear layer, in the report's words (§3.3): Fprop, and in backward Dgrad and Wgrad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.deferrable, weight = deferrable(weight), weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = times_transposed(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            (dw,) = weight_gradients(partial(linear_wgrad, grads[0], x), *ctx.deferrable)
        return dx, dw


def linear_wgrad(dy: Float[Tensor, "*n o"], x: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "o i"], ...]:
    """dW = dyᵀ · x over all rows, as a tuple of one."""
    return (dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1]),)


def times_transposed(x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*n o"]:
    """x · weightᵀ without gradient. Large fp32 products on a CPU go to oneDNN, faster than torch's default by 5–20 %
    (measured on an AMD EPYC); torch itself sends only bf16 there."""
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= 2**16:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def swiglu(gate: Float[Tensor, "*n F"], up: Float[Tensor, "*n F"]) -> Float[Tensor, "*n F"]:
    """silu(gate) · up, keeping only its two inputs for backward (report §3.3 caches SwiGLU's inputs)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


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
        both = dy * unit
        dweight = both.flatten(0, -2).sum(0)
        # d/dx of x·rstd: the part of the gradient along x is taken out, because rescaling x changes nothing.
        along = (both @ weight.float()).div_(x.shape[-1]).unsqueeze_(-1)
        dx = (dy * weight).addcmul_(unit, along, value=-1).mul_(rstd)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class Linear(nn.Module):
    """y = x · weightᵀ without bias; `weight` is [out, in] as in the released files, and filled by `init_weights`.

    `product` computes it from (x, weight). Assigning another one to a layer is how FP8 comes in.
    """

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(linear)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain that starts at one (report §2.1: also after each compressed latent)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def swiglu_network(
    x: Float[Tensor, "*n D"], gate: Float[Tensor, "F D"], up: Float[Tensor, "F D"], down: Float[Tensor, "D F"]
) -> Float[Tensor, "*n D"]:
    """down(silu(gate(x)) · up(x)), from the three weights."""
    return linear(swiglu(linear(x, gate), linear(x, up)), down)


class SwiGLU(nn.Module):
    """The dense feed-forward layer down(silu(gate(x)) · up(x)), also used for the shared experts.

    `product` computes it from (x, gate, up, down), the three weights, and can be replaced as `Linear`'s can.
    """

    product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = staticmethod(swiglu_network)

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


def linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], chunk: int | None = None
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(x · weightᵀ) against `targets`, in nats, without ever holding all N·V logits.

    Rows go through in chunks (by default about two million logits at a time). Each chunk's gradients are taken on the
    spot, in the forward pass, because afterwards its logits are gone; backward only scales them. Softmax and sums are
    fp32.
    """
    chunk = chunk or max(256, 2**21 // weight.shape[0])  # few rows would read the head's weight again too often
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
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]
            log_p = torch.log_softmax(times_transposed(x[rows], w), -1, dtype=torch.float32)
            log_p_target = log_p.gather(1, target)
            loss -= log_p_target.sum()
            # d loss / d logits = softmax − one-hot
            dlogits = log_p.exp_().scatter_(1, target, log_p_target.exp_() - 1).to(x.dtype)
            dx[rows] = times_transposed(dlogits, w.t())
            _add_mm(dw, dlogits.t(), x[rows])
            del log_p, dlogits  # or they would still be there while the next chunk's logits are made
        ctx.save_for_backward(dx.div_(x.shape[0]), dw.div_(x.shape[0]).to(weight.dtype))  # the mean
        return loss / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dw * grads[0].to(dw.dtype), None, None


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, in one product where the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class recomputed:
    """Computes `fn(*inputs)` now, forgets the result after its use, and computes it again in backward.

        with recomputed(fn, x) as y:
            z = consumer(y)          # what consumer would save of y is not kept, only x is

    This is the report's recomputation of RMSNorm and the MLA up-projections (§3.2.3): cheap operations with large
    outputs. `fn` must be a pure function returning a tensor or a tuple of tensors. Unlike activation checkpointing, the
    consumer itself (attention, a linear layer) isn't run twice.
    """

    active: ClassVar[list[recomputed]] = []  # the `with` blocks we are in, innermost last

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
            self.active.append(self)
        return out

    def __exit__(self, *error: Any) -> None:
        if self.enabled and torch.is_grad_enabled():
            self.active.remove(self)
            self.hooks.__exit__(*error)

    @classmethod
    def covers(cls, x: Tensor) -> bool:
        """Whether x will be computed again, so that keeping x itself is free."""
        return bool(cls.active) and x.untyped_storage().data_ptr() in cls.active[-1].places

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
