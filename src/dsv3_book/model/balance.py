"""Keeping experts evenly used: the bias rule, the sequence-wise loss, and the measure of imbalance (report §2.1.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def update_bias(bias: Float[Tensor, "*l E"], load: Float[Tensor, "*l E"], gamma: float) -> None:
    """Moves every bias by ±gamma, in place: up where an expert had less than the mean load, down where it had more.

    `load` counts the tokens of the *whole* step: all micro-batches, all data-parallel ranks, both pipeline directions.
    Who sums it is not this function's business. Several layers may be stacked in front.
    """
    bias += gamma * torch.sign(load.mean(-1, keepdim=True) - load)


def max_violation(load: Float[Tensor, "*l E"]) -> Float[Tensor, "*l"]:
    """MaxVio = (max load − mean load) / mean load (arXiv 2408.15664): 0 is perfect balance, E/K − 1 the worst."""
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean


def sequence_balance_loss(scores: Float[Tensor, "B T E"], k: int, alpha: float) -> Float[Tensor, ""]:
    """The complementary loss α · Σ_e f_e · P_e, taken per sequence and averaged over the B sequences.

    f_e = E/(K·T) · how often e is among the top k of the *scores alone* (no bias, no groups); P_e = mean share of e in
    the token's summed scores. f is counted, not differentiated: the gradient flows through P.
    """
    T, E = scores.shape[1:]
    chosen = scores.detach().topk(k, dim=-1).indices.flatten(1)
    counts = scores.new_zeros(scores.shape[0], E).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
    f = counts * (E / (k * T))
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return alpha * (f * p).sum(-1).mean()
