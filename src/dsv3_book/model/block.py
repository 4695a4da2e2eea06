"""One transformer block, as the composition of five parts that a pipeline can also run apart."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import ops
from dsv3_book.model.dispatch import Arrived, Dispatch
from dsv3_book.model.experts import MoE
from dsv3_book.model.mla import MLA, Cache
from dsv3_book.model.rope import Angles
from dsv3_book.model.router import Routing


class Block(nn.Module):
    """attention → route → dispatch → experts → combine; `forward` is their plain composition.

    The first `first_k_dense_replace` layers have a dense SwiGLU instead of the last four parts. `dispatch` is handed
    in by the caller: local, or between processes; `experts` are those that live here (all when None).
    """

    def __init__(self, cfg: ModelConfig, layer: int, experts: range | None = None) -> None:
        super().__init__()
        self.recompute = False  # recompute RMSNorm and MLA's up-projections in backward
        self.input_layernorm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg, layer)
        self.post_attention_layernorm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp: MoE | ops.SwiGLU
        if cfg.is_moe_layer(layer):
            self.mlp = MoE(cfg, experts)
        else:
            self.mlp = ops.SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self, x: Float[Tensor, "B T D"], at: Angles, dispatch: Dispatch
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The block's output, and its routing (None for a dense layer)."""
        x = self.attention(x, at)
        with ops.recomputed(self.post_attention_layernorm, x, enabled=self.recompute) as h:
            if isinstance(self.mlp, ops.SwiGLU):
                return x + self.mlp(h), None
            routing = self.route(h)
            handle = dispatch.start(h.flatten(0, 1), routing.experts, routing.gates)
            shared = self.mlp.shared(h)  # computed while tokens travel
        y = self.experts(handle.wait())
        return merge(x, shared, handle.combine(y).wait()), routing

    def attention(self, x: Float[Tensor, "B T D"], at: Angles) -> Float[Tensor, "B T D"]:
        """Norm, latent attention, residual."""
        with ops.recomputed(self.input_layernorm, x, enabled=self.recompute) as h:
            return x + self.self_attn(h, at)

    def route(self, h: Float[Tensor, "B T D"]) -> Routing:
        """Chooses the experts of every token; `h` has passed `post_attention_layernorm`."""
        assert isinstance(self.mlp, MoE), "a dense layer routes nothing"
        return self.mlp.gate(h.flatten(0, 1))

    def experts(self, arrived: Arrived) -> Float[Tensor, "S D"]:
        """The routed experts on the token-slots that arrived here."""
        assert isinstance(self.mlp, MoE), "a dense layer has no routed experts"
        return self.mlp.experts(arrived)

    def decode(self, x: Float[Tensor, "B T D"], at: Angles, dispatch: Dispatch, cache: Cache) -> Float[Tensor, "B T D"]:
        """`forward` for T new tokens behind a cache, with absorbed attention."""
        x = x + self.self_attn.decode(self.input_layernorm(x), at, cache)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, ops.SwiGLU):
            return x + self.mlp(h)
        return x + self.mlp(h, dispatch)


def merge(
    x: Float[Tensor, "B T D"], shared: Float[Tensor, "B T D"] | None, routed: Float[Tensor, "N D"]
) -> Float[Tensor, "B T D"]:
    """Residual plus the shared and the routed experts' answers."""
    total = x + routed.view_as(x)
    return total if shared is None else total + shared
