"""The router (report §2.1.2, released gate): who works on a token, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_book.config import ModelConfig


class Routing(NamedTuple):
    """A router's answer for N tokens."""

    experts: Int[Tensor, "N K"]  # the chosen experts
    gates: Float[Tensor, "N K"]  # their weights, fp32, carrying the gradient to the router
    scores: Float[Tensor, "N E"]  # all sigmoid affinities, fp32, for the sequence-wise loss
    load: Float[Tensor, " E"]  # how many tokens chose each expert, fp32


def select(
    scores: Float[Tensor, "N E"], bias: Float[Tensor, " E"], n_group: int, topk_group: int, k: int
) -> Int[Tensor, "N K"]:
    """The k experts of every token: best `scores + bias` among the experts of its `topk_group` best groups.

    A group (a node) is worth the sum of its two best biased scores. Experts of the other groups are masked with −inf,
    not 0: a biased score may be negative, and would then lose against a masked one. The bias has no other use.
    """
    biased = scores + bias
    if n_group > 1:
        grouped = biased.unflatten(-1, (n_group, -1))
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(topk_group, dim=-1).indices, True)
        biased = grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(-2)
    return biased.topk(k, dim=-1).indices


def gate_weights(
    scores: Float[Tensor, "N E"], experts: Int[Tensor, "N K"], normalise: bool, scale: float
) -> Float[Tensor, "N K"]:
    """Weights of the chosen experts: their *unbiased* scores, normalised to sum to one, times the routing scale."""
    gates = scores.gather(1, experts)
    if normalise:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return gates * scale


class _Logits(torch.autograd.Function):
    """x · weightᵀ in fp32. Kept for backward are x and the weight as they came, and not their fp32 copies: where x is a
    norm's output, `ops.recomputed` then keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "N D"], weight: Float[Tensor, "E D"]) -> Float[Tensor, "N E"]:
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx, dweight = None, None
        if ctx.needs_input_grad[0]:
            dx = (grads[0] @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (grads[0].t() @ x.float()).to(weight.dtype)
        return dx, dweight


class Router(nn.Module):
    """Sigmoid affinities of each token to E experts, all in fp32, and the choice made from them.

    `e_score_correction_bias` is a buffer, not a Parameter: no gradient, no weight decay; `balance.update_bias` moves it
    once a step, from the load of the whole step. It stays fp32 when the model is cast, and is saved with the weights.
    """

    e_score_correction_bias: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        cfg = self.cfg
        scores = torch.sigmoid(_Logits.apply(x, self.weight))
        with torch.no_grad():
            experts = select(scores, self.e_score_correction_bias, cfg.n_group, cfg.topk_group, cfg.num_experts_per_tok)
            load = torch.bincount(experts.flatten(), minlength=cfg.n_routed_experts).float()
        gates = gate_weights(scores, experts, cfg.norm_topk_prob, cfg.routed_scaling_factor)
        return Routing(experts, gates, scores, load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices but refuses casts of the bias: in bf16 a step of γ = 0.001 would vanish."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self
