"""Choosing the next token from the model's logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def probabilities(
    logits: Float[Tensor, "B V"], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """What to draw from, fp32: softmax of logits/temperature, cut to the likeliest tokens and made to sum to one.

    temperature: 0 puts everything on the likeliest token.  top_k: only the k likeliest.  top_p: the smallest set of
    likeliest tokens that together reach p (always at least one).
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is a share of the probability, in (0, 1], got {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    sorted_logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    p = sorted_logits.softmax(-1)
    if top_k is not None:
        p[:, top_k:] = 0
    before = p.cumsum(-1) - p  # the probability of everything likelier
    p = p.masked_fill(before >= top_p * p.sum(-1, keepdim=True), 0)
    p = p / p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(1, order, p)


def sample(
    logits: Float[Tensor, "B V"],
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Tensor, " B"]:
    """One token for each row, drawn from `probabilities`; the same generator state gives the same tokens."""
    p = probabilities(logits, temperature, top_k, top_p)
    if temperature == 0:
        return p.argmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
