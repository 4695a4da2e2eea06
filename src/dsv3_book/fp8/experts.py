"""The routed experts with all their products in FP8, on rows sorted by expert, whatever the experts' loads.

All scales of activations and gradients are powers of two. So the values are what they would be had the tokens travelled
as FP8 from another process (report §3.3.3), and turning 1×128 tiles into 128×1 tiles moves exponents only: which tokens
meet in a tile hardly matters (only values 2¹⁵ below their tile's largest lose digits).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_book.fp8.gemm import grouped_fp8_gemm, grouped_fp8_wgrad
from dsv3_book.fp8.linear import Quantised, QuantisedWeight, WeightCache, swiglu_backward
from dsv3_book.fp8.quantize import (
    dequantize_activation,
    quantize_activation,
    quantize_columns,
    requantize_columns,
    swiglu_quantize,
)
from dsv3_book.model.wgrad import deferrable, weight_gradients


class Fp8Experts:
    """`Experts.product` in FP8: one SwiGLU network per expert, each row's result times its gate.

    Kept for backward: the tokens' codes, and gate(x) and up(x) in FP8; SwiGLU's output is computed again. No row is
    dropped, an expert without rows gets a zero gradient.
    """

    def __init__(self) -> None:
        self.caches = WeightCache(), WeightCache(), WeightCache()

    def __call__(
        self,
        tokens: Float[Tensor, "S D"],
        gates: Float[Tensor, " S"],
        counts: Int[Tensor, " E"],
        gate: Float[Tensor, "E F D"],
        up: Float[Tensor, "E F D"],
        down: Float[Tensor, "E D F"],
    ) -> Float[Tensor, "S D"]:
        quantised = tuple(cache(w) for cache, w in zip(self.caches, (gate, up, down), strict=True))
        return _Experts.apply(tokens, gates, counts, gate, up, down, quantised)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        gates: Tensor,
        counts: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        quantised: tuple[QuantisedWeight, ...],
    ) -> Tensor:
        w_gate, w_up, w_down = ctx.quantised = quantised
        ctx.deferrable = deferrable(gate, up, down)
        codes = quantize_activation(tokens, pow2=True)
        g = grouped_fp8_gemm(*codes, *w_gate.blocks, counts, tokens.dtype)
        u = grouped_fp8_gemm(*codes, *w_up.blocks, counts, tokens.dtype)
        kept = *codes, *quantize_activation(g, pow2=True), *quantize_activation(u, pow2=True)
        ctx.save_for_backward(*kept, gates, counts)
        # g·(h·W) = (g·h)·W: the gate weighs the narrow rows [F], where SwiGLU's output is quantised.
        return grouped_fp8_gemm(*swiglu_quantize(g, u, gates, pow2=True), *w_down.blocks, counts, tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, g, g_scale, u, u_scale, gates, counts = ctx.saved_tensors
        weights: tuple[QuantisedWeight, ...] = ctx.quantised
        w_gate, w_up, w_down = weights
        dtype, weight = grads[0].dtype, gates.float()[:, None]
        dy = quantize_activation(grads[0], pow2=True)  # as the gradient would travel
        dh = grouped_fp8_gemm(*dy, *w_down.transposed, counts, dtype).float()
        # y = down(weight · h): seen from SwiGLU the gradient is weight·dh, and the weight's own is h·dh.
        h, dg, du = swiglu_backward(dequantize_activation(g, g_scale), dequantize_activation(u, u_scale), dh * weight)
        dgates = torch.linalg.vecdot(h, dh).to(gates.dtype)
        dx = grouped_fp8_gemm(*quantize_activation(dg, pow2=True), *w_gate.transposed, counts, dtype)
        dx += grouped_fp8_gemm(*quantize_activation(du, pow2=True), *w_up.transposed, counts, dtype)
        hc, dgc, duc = (quantize_columns(t, counts, pow2=True) for t in (h * weight, dg, du))
        compute = partial(experts_wgrad, (x, x_scale), hc, dgc, duc, dy, counts)
        return dx, dgates, None, *weight_gradients(compute, *ctx.deferrable), None


def experts_wgrad(
    x: Quantised, h: Quantised, dg: Quantised, du: Quantised, dy: Quantised, counts: Int[Tensor, " E"]
) -> tuple[Tensor, ...]:
    """The gradients of all experts' gate, up and down, fp32. x and dy come in 1×128 tiles, as they would have
    travelled, the others in 128×1 tiles."""
    x, dy = requantize_columns(*x, counts, pow2=True), requantize_columns(*dy, counts, pow2=True)
    return tuple(grouped_fp8_wgrad(*a, *b, counts, torch.float32) for a, b in ((dg, x), (du, x), (dy, h)))
