"""Multi-token prediction (report §2.2): one more block per extra token, sharing embedding and head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import ops
from dsv3_book.model.block import Block
from dsv3_book.model.dispatch import Dispatch
from dsv3_book.model.rope import Angles
from dsv3_book.model.router import Routing


class SharedHead(nn.Module):
    """The norm in front of the head. The head itself is the main model's and isn't held here."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class MTPModule(Block):
    """Depth j: mixes the previous depth's hidden state with the embedding of the token j places ahead.

    Where the report and the checkpoint differ, the checkpoint wins: `eh_proj` reads [embedding; hidden] (the report
    writes the reverse), and the hidden state comes in *after* the previous depth's final norm.
    """

    def __init__(self, cfg: ModelConfig, layer: int, experts: range | None = None) -> None:
        super().__init__(cfg, layer, experts)
        self.enorm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = ops.Linear(2 * cfg.hidden_size, cfg.hidden_size)
        self.shared_head = SharedHead(cfg)

    def merge(self, hidden: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The block's input from what is known (hidden) and the token that came next (embedded)."""
        with ops.recomputed(self.normed, embedded, hidden, enabled=self.recompute) as both:
            return self.eh_proj(both)

    def normed(self, embedded: Float[Tensor, "B T D"], hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 2*D"]:
        """[embedding; hidden], each with its own norm."""
        return torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)

    def predict(
        self, hidden: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], at: Angles, dispatch: Dispatch
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The hidden state this depth's head reads (already normed), which the next depth continues from."""
        x, routing = self(self.merge(hidden, embedded), at, dispatch)
        return self.shared_head.norm(x), routing
