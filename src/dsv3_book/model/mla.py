"""Multi-head latent attention (report §2.1.1): keys and values of all heads from one small latent per token."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import ops
from dsv3_book.model.attention import causal_attention
from dsv3_book.model.rope import Angles, rotate


@runtime_checkable
class Cache(Protocol):
    """What MLA needs of a cache: C + R numbers per token and layer, nothing per head."""

    length: int  # tokens stored so far

    def append(
        self, layer: int, c_kv: Float[Tensor, "B T C"], k_rope: Float[Tensor, "B T R"]
    ) -> tuple[Float[Tensor, "B seen C"], Float[Tensor, "B seen R"]]:
        """Stores the new tokens' latents and returns those of all tokens seen so far."""
        ...


class MLA(nn.Module):
    """Latent attention with (`q_lora_rank`) or without query compression.

    `forward` is the plain, training form: latents are expanded to per-head keys and values. `decode` is the absorbed
    form: W_UK moves into the query and W_UV behind the attention, which then runs on the cached latents themselves.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        H, D = cfg.num_attention_heads, cfg.hidden_size
        self.recompute = False  # recompute the latents' norms and the up-projections in backward
        if cfg.q_lora_rank is None:
            self.q_proj = ops.Linear(D, H * cfg.qk_head_dim)
        else:
            self.q_a_proj = ops.Linear(D, cfg.q_lora_rank)
            self.q_a_layernorm = ops.RMSNorm(cfg.q_lora_rank)  # eps 1e-6 here in the released code, whatever the config
            self.q_b_proj = ops.Linear(cfg.q_lora_rank, H * cfg.qk_head_dim)
        self.kv_a_proj_with_mqa = ops.Linear(D, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        self.kv_a_layernorm = ops.RMSNorm(cfg.kv_lora_rank)
        self.kv_b_proj = ops.Linear(cfg.kv_lora_rank, H * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = ops.Linear(H * cfg.v_head_dim, D)

    def forward(self, x: Float[Tensor, "B T D"], at: Angles) -> Float[Tensor, "B T D"]:
        """Causal attention over the T tokens of each sequence; `at` holds the angles of their positions."""
        latents = self.compress(x)
        # q, k and v are the large tensors; recomputed in backward if asked, from the small latents (report §3.2.3).
        with ops.recomputed(
            lambda c_q, c_kv, k_rope: self.expand(c_q, c_kv, k_rope, at), *latents, enabled=self.recompute
        ) as (q, k, v):
            o = causal_attention(q, k, v, self.cfg.softmax_scale)
        return self.o_proj(rearrange(o, "B H T Dv -> B T (H Dv)"))

    def compress(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """The small side: query latent [B, T, Q] (x itself if uncompressed), KV latent [B, T, C], raw key [B, T, R]."""
        c_q = x if self.cfg.q_lora_rank is None else self.q_a_proj(x)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1)
        return c_q, c_kv, k_rope

    def queries(self, c_q: Float[Tensor, "B T Q"], at: Angles) -> tuple[Tensor, Tensor]:
        """Content part [B, T, H, Dh] and turned position part [B, T, H, R] of every head's query."""
        if self.cfg.q_lora_rank is None:
            q = self.q_proj(c_q)
        else:
            with ops.recomputed(self.q_a_layernorm, c_q, enabled=self.recompute) as normed:
                q = self.q_b_proj(normed)
        q = rearrange(q, "B T (H d) -> B T H d", H=self.cfg.num_attention_heads)
        q_nope, q_rope = q.split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, at)

    def expand(self, c_q: Tensor, c_kv: Tensor, k_rope: Tensor, at: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Latents to heads: q, k [B, H, T, Dh+R] and v [B, H, T, Dv]. One turned key serves all heads."""
        q_nope, q_rope = self.queries(c_q, at)
        with ops.recomputed(self.kv_a_layernorm, c_kv, enabled=self.recompute) as normed:
            kv = self.kv_b_proj(normed)
        kv = rearrange(kv, "B T (H d) -> B T H d", H=self.cfg.num_attention_heads)
        k_nope, v = kv.split([self.cfg.qk_nope_head_dim, self.cfg.v_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], at).expand_as(q_rope)
        q = torch.cat([q_nope.transpose(1, 2), q_rope.transpose(1, 2)], dim=-1)
        k = torch.cat([k_nope.transpose(1, 2), k_rope.transpose(1, 2)], dim=-1)
        return q, k, v.transpose(1, 2).contiguous()

    def decode(self, x: Float[Tensor, "B T D"], at: Angles, cache: Cache) -> Float[Tensor, "B T D"]:
        """The absorbed form, for T new tokens behind those in the cache: equal to `forward`, never expanding a key."""
        c_q, c_kv, k_rope = self.compress(x)
        c_kv, k_rope = cache.append(self.layer, self.kv_a_layernorm(c_kv), rotate(k_rope[:, :, None], at)[:, :, 0])
        q_nope, q_rope = self.queries(c_q, at)
        w_uk, w_uv = self.up_weights(x.dtype)
        q_latent = einsum(q_nope, w_uk, "B T H Dh, H Dh C -> B T H C")
        scores = einsum(q_latent, c_kv, "B T H C, B seen C -> B H T seen") + einsum(
            q_rope, k_rope, "B T H R, B seen R -> B H T seen"
        )
        T, seen = scores.shape[-2:]
        future = torch.ones(T, seen, dtype=torch.bool, device=x.device).triu(seen - T + 1)
        p = (scores.float() * self.cfg.softmax_scale).masked_fill_(future, -torch.inf).softmax(-1).to(x.dtype)
        o_latent = einsum(p, c_kv, "B H T seen, B seen C -> B T H C")
        o = einsum(o_latent, w_uv, "B T H C, H Dv C -> B T H Dv")
        return self.o_proj(rearrange(o, "B T H Dv -> B T (H Dv)"))

    def up_weights(self, dtype: torch.dtype) -> tuple[Float[Tensor, "H Dh C"], Float[Tensor, "H Dv C"]]:
        """W_UK and W_UV, the two halves of every head's block in `kv_b_proj`."""
        w = rearrange(self.kv_b_proj.weight.to(dtype), "(H d) C -> H d C", H=self.cfg.num_attention_heads)
        w_uk, w_uv = w.split([self.cfg.qk_nope_head_dim, self.cfg.v_head_dim], dim=1)
        return w_uk, w_uv
