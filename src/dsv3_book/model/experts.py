"""Routed and shared experts (report §2.1.2): a grouped fast path and its one-expert-at-a-time twin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import ops
from dsv3_book.model.dispatch import Arrived, Dispatch
from dsv3_book.model.grouped import grouped_swiglu
from dsv3_book.model.router import Router


class Experts(nn.Module):
    """E SwiGLU experts, stored stacked [E, …] so that one grouped product serves them all.

    `product` computes them from (tokens, gates, counts, gate, up, down); assigning another one is how FP8 comes in.
    A process may hold only some of the model's experts, `held`: a contiguous range, all when None.
    """

    product: Callable[..., Tensor] = staticmethod(grouped_swiglu)

    def __init__(self, cfg: ModelConfig, held: range | None = None) -> None:
        super().__init__()
        self.held = held or range(cfg.n_routed_experts)
        E, F, D = len(self.held), cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(E, F, D))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, arrived: Arrived) -> Float[Tensor, "S D"]:
        """Every slot through its expert, times its gate. Rows are sorted by expert; none is dropped."""
        return self.product(*arrived, self.gate_proj, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer, as parts a schedule can run apart."""

    def __init__(self, cfg: ModelConfig, held: range | None = None) -> None:
        super().__init__()
        self.gate = Router(cfg)
        self.experts = Experts(cfg, held)
        if cfg.n_shared_experts:
            self.shared_experts = ops.SwiGLU(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)

    def forward(self, x: Float[Tensor, "B T D"], dispatch: Dispatch) -> Float[Tensor, "B T D"]:
        """All parts in a row: shared plus routed experts' output."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat)
        handle = dispatch.start(flat, routing.experts, routing.gates)
        routed = handle.combine(self.experts(handle.wait())).wait().view_as(x)
        shared = self.shared(x)
        return routed if shared is None else routed + shared

    def shared(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"] | None:
        """What every token gets regardless of routing; None in a model without shared experts."""
        return self.shared_experts(x) if hasattr(self, "shared_experts") else None


def one_expert_at_a_time(
    experts: Experts, x: Float[Tensor, "N D"], chosen: Int[Tensor, "N K"], gates: Float[Tensor, "N K"]
) -> Float[Tensor, "N D"]:
    """The slow twin of dispatch + experts + combine: for each expert, its tokens, one after the other."""
    out = torch.zeros_like(x)
    for e in range(experts.gate_proj.shape[0]):
        token, slot = torch.where(chosen == e)
        hidden = ops.swiglu(ops.linear(x[token], experts.gate_proj[e]), ops.linear(x[token], experts.up_proj[e]))
        out.index_add_(0, token, ops.linear(hidden, experts.down_proj[e]) * gates[token, slot, None].to(x.dtype))
    return out
