"""Causal attention in blocks of queries: the slow twin, and the fast path for a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCK = 64  # query rows at a time: their scores stay in a core's cache
KEEP = 512  # up to this many tokens the probabilities are kept for backward; beyond, T² of them would be too many


def causal_attention(
    q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H T d"], v: Float[Tensor, "B H T Dv"], scale: float
) -> Float[Tensor, "B H T Dv"]:
    """softmax(scale · q kᵀ over the past) v, by the fastest way this device has.

    On CUDA that is torch's own fused kernel. On a CPU torch has one for Dv = d only and otherwise keeps all T² scores;
    `_BlockAttention` never computes more than it needs, and beyond KEEP tokens holds only BLOCK rows of them.
    """
    if q.device.type == "cpu":
        return _BlockAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale).view_as(v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def plain_attention(
    q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H T d"], v: Float[Tensor, "B H T Dv"], scale: float
) -> Float[Tensor, "B H T Dv"]:
    """The slow twin: the formula, with all T² scores."""
    scores = scale * (q @ k.transpose(-2, -1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


class _BlockAttention(torch.autograd.Function):
    """Block by block: queries a … b see the keys 0 … b; nearly half of the T² work is never done. [n, T, d], n = B·H.

    Long sequences strike FlashAttention's bargain (arXiv 2205.14135): keep no probabilities, compute them again in
    backward. Short ones keep them, which is faster.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        out, kept = torch.empty_like(v), []
        for a, b in _blocks(q.shape[1]):
            p = _probabilities(q[:, a:b], k[:, :b], scale)
            out[:, a:b] = p @ v[:, :b]
            if q.shape[1] <= KEEP:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, (a, b) in enumerate(_blocks(q.shape[1])):
            p = kept[i] if kept else _probabilities(q[:, a:b], k[:, :b], ctx.scale)
            dout = grads[0][:, a:b]
            dp = dout @ v[:, :b].transpose(1, 2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)  # p·(dp − Σ p·dp)
            dq[:, a:b] = ds @ k[:, :b]
            dk[:, :b].baddbmm_(ds.transpose(1, 2), q[:, a:b])
            dv[:, :b].baddbmm_(p.transpose(1, 2), dout)
        return dq, dk, dv, None


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(a, min(a + BLOCK, T)) for a in range(0, T, BLOCK)]


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax of the scores [n, b−a, b] of the last b−a queries against b keys; only the last square needs a mask."""
    rows = q.shape[1]
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    scores[:, :, -rows:] += torch.full((rows, rows), -torch.inf, dtype=q.dtype).triu_(1)
    return scores.softmax(-1)
