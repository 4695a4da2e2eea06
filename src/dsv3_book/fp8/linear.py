"""Linear layers and SwiGLU networks with all their products in FP8 (report §3.3). For one linear layer y = x·Wᵀ:

    Fprop   y  = x · Wᵀ     x 1×128 tiles, W 128×128 blocks
    Dgrad   dx = dy · W     dy 1×128 tiles, W's same blocks, transposed
    Wgrad   dW = dyᵀ · x    both 128×1 tiles: here the tokens are contracted; fp32, for the fp32 master weight

x is kept for backward as FP8 codes, which Wgrad quantises again the other way. Each Wgrad is a function of its own, of
what was kept and of dy's codes, so that a schedule can put it off (`model.wgrad`); what waits for it are codes only.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from dsv3_book.fp8.gemm import fp8_gemm
from dsv3_book.fp8.quantize import (
    dequantize_activation,
    dequantize_e5m6,
    quantize_activation,
    quantize_columns,
    quantize_e5m6,
    quantize_weight,
    requantize_columns,
    swiglu_quantize,
)
from dsv3_book.model import ops
from dsv3_book.model.wgrad import deferrable, weight_gradients

Quantised = tuple[Tensor, Tensor]  # codes and their scales


# Weights -------------------------------------------------------------------------------------------------------------
class QuantisedWeight:
    """A weight [N, K], or stacked ones [E, N, K], in FP8: codes and scales of its 128×128 blocks."""

    def __init__(self, weight: Tensor) -> None:
        self.blocks: Quantised = quantize_weight(weight.detach())
        self._transposed: Quantised | None = None

    @property
    def transposed(self) -> Quantised:
        """The same blocks as [K, N], for Dgrad. Nothing is rounded again: a block transposed is still a block."""
        if self._transposed is not None:
            return self._transposed
        codes, scale = (t.transpose(-2, -1).contiguous() for t in self.blocks)
        if not torch.compiler.is_compiling():  # a compiled graph remembers nothing
            self._transposed = codes, scale
        return codes, scale


class WeightCache:
    """A weight in FP8, made again only when the weight has changed: micro-batches of a step share it."""

    def __init__(self) -> None:
        _watch_optimizers()
        self.seen: tuple[Any, ...] | None = None

    def __call__(self, weight: Tensor) -> QuantisedWeight:
        if torch.compiler.is_compiling() or weight.is_inference():  # neither tells whether it changed
            return QuantisedWeight(weight)
        now = weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), weight._version
        if self.seen != now:
            # Holding the tensor keeps its address from being given to another one.
            self.seen, self.held, self.quantised = now, weight.detach(), QuantisedWeight(weight)
        return self.quantised

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()  # a copied or unpickled model has weights of its own, whose versions count from zero


@functools.cache
def _watch_optimizers() -> None:
    """Lets every optimiser's step count in the versions of its parameters: torch's fused ones change them silently."""

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        increment_version([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(stepped)


# Linear --------------------------------------------------------------------------------------------------------------
class Fp8Linear:
    """`ops.Linear.product` in FP8: called with x [*n, K] and the weight [N, K], gives x·Wᵀ in x's dtype.

    With `after_attention`, x is kept in E5M6 (12 bits a number), not in E4M3: attention's backward depends on the same
    activations, and the report finds it sensitive. All scales of that x are powers of two (§3.3.3).
    """

    def __init__(self, after_attention: bool = False) -> None:
        self.after_attention, self.cache = after_attention, WeightCache()

    def __call__(self, x: Float[Tensor, "*n K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "*n N"]:
        return _Linear.apply(x, weight, self.cache(weight), self.after_attention)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantised: QuantisedWeight, after_attention: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        codes = quantize_activation(flat, pow2=after_attention)
        ctx.quantised, ctx.after_attention, ctx.shape = quantised, after_attention, x.shape
        ctx.deferrable = deferrable(weight)
        ctx.save_for_backward(*(quantize_e5m6(flat) if after_attention else kept(x, codes)))
        return fp8_gemm(*codes, *quantised.blocks, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        quantised: QuantisedWeight = ctx.quantised
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = fp8_gemm(*quantize_activation(dy), *quantised.transposed, dy.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            width = ctx.shape[-1] if ctx.after_attention else None
            compute = partial(linear_wgrad, quantize_columns(dy), codes_again(ctx.saved_tensors), width)
            (dw,) = weight_gradients(compute, *ctx.deferrable)
        return dx, dw, None, None


def kept(x: Tensor, codes: Quantised) -> tuple[Tensor, ...]:
    """What to keep of a layer's input: its codes; or x itself where x will be computed again (`ops.recomputed`), for
    then nothing is kept at all."""
    return (x,) if ops.recomputed.covers(x) else codes


def codes_again(saved: tuple[Tensor, ...]) -> Quantised:
    """The codes and scales of what was `kept`."""
    return quantize_activation(saved[0].reshape(-1, saved[0].shape[-1])) if len(saved) == 1 else (saved[0], saved[1])


def linear_wgrad(dy: Quantised, x: Quantised, e5m6_width: int | None = None) -> tuple[Float[Tensor, "N K"], ...]:
    """dW = dyᵀ·x in fp32, from dy in 128×1 tiles and x as it was kept: 1×128 tiles of E4M3, or E5M6 of this width."""
    if e5m6_width is None:
        columns = requantize_columns(*x)
    else:
        columns = quantize_columns(dequantize_e5m6(*x, e5m6_width), pow2=True)
    return (fp8_gemm(*dy, *columns, torch.float32),)


# SwiGLU --------------------------------------------------------------------------------------------------------------
class Fp8SwiGLU:
    """`ops.SwiGLU.product` in FP8: down(silu(gate(x)) · up(x)) from x [*n, D] and the three weights.

    x is quantised once, for gate and up. What SwiGLU reads, gate(x) and up(x), is kept in FP8; what it gives is not
    kept but computed again from them (report §3.3.3).
    """

    def __init__(self) -> None:
        self.caches = WeightCache(), WeightCache(), WeightCache()

    def __call__(
        self, x: Float[Tensor, "*n D"], gate: Float[Tensor, "F D"], up: Float[Tensor, "F D"], down: Float[Tensor, "D F"]
    ) -> Float[Tensor, "*n D"]:
        quantised = tuple(cache(w) for cache, w in zip(self.caches, (gate, up, down), strict=True))
        return _SwiGLU.apply(x, gate, up, down, quantised)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, quantised: tuple[QuantisedWeight, ...]
    ) -> Tensor:
        w_gate, w_up, w_down = ctx.quantised = quantised
        ctx.deferrable = deferrable(gate, up, down)
        codes = quantize_activation(x.reshape(-1, x.shape[-1]))
        g, u = fp8_gemm(*codes, *w_gate.blocks, x.dtype), fp8_gemm(*codes, *w_up.blocks, x.dtype)
        ctx.save_for_backward(*quantize_activation(g), *quantize_activation(u), *kept(x, codes))
        return fp8_gemm(*swiglu_quantize(g, u), *w_down.blocks, x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights: tuple[QuantisedWeight, ...] = ctx.quantised
        w_gate, w_up, w_down = weights
        g, g_scale, u, u_scale, *x = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dh = fp8_gemm(*quantize_activation(dy), *w_down.transposed, dy.dtype)
        h, dg, du = swiglu_backward(dequantize_activation(g, g_scale), dequantize_activation(u, u_scale), dh)
        dx = fp8_gemm(*quantize_activation(dg), *w_gate.transposed, dy.dtype)
        dx += fp8_gemm(*quantize_activation(du), *w_up.transposed, dy.dtype)
        columns = (quantize_columns(t) for t in (h, dg, du, dy))
        dw = weight_gradients(partial(swiglu_wgrad, codes_again(tuple(x)), *columns), *ctx.deferrable)
        return dx.view_as(grads[0]), *dw, None


def swiglu_backward(
    gate: Float[Tensor, "S F"], up: Float[Tensor, "S F"], dh: Float[Tensor, "S F"]
) -> tuple[Tensor, Tensor, Tensor]:
    """h = silu(gate)·up again, and the gradients of gate and up, all fp32."""
    dh, act = dh.float(), F.silu(gate)
    return act * up, torch.ops.aten.silu_backward(dh * up, gate), act.mul_(dh)


def swiglu_wgrad(x: Quantised, h: Quantised, dg: Quantised, du: Quantised, dy: Quantised) -> tuple[Tensor, ...]:
    """The gradients of gate, up and down, fp32, from x as it was kept and all others in 128×1 tiles."""
    columns = requantize_columns(*x)
    return tuple(fp8_gemm(*a, *b, torch.float32) for a, b in ((dg, columns), (du, columns), (dy, h)))
