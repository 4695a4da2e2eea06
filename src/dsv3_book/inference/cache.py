"""The latent cache (report §2.1.1): C + R numbers per token and layer, instead of keys and values of every head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_book.config import ModelConfig


class LatentCache:
    """Room for `capacity` tokens of B sequences, taken at once: what `Transformer.decode` appends to.

    Holds the normed KV latents c_kv [L, B, capacity, C] and the turned keys k_rope [L, B, capacity, R]; for V3 that is
    576 numbers per token and layer where multi-head attention would keep 32768 (claim C2).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache for {batch} sequences of {capacity} tokens: both must be at least 1")
        shape = (cfg.num_hidden_layers, batch, capacity)
        self.c_kv = torch.empty(*shape, cfg.kv_lora_rank, dtype=dtype, device=device)
        self.k_rope = torch.empty(*shape, cfg.qk_rope_head_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self.filled = [0] * cfg.num_hidden_layers
        self.length = 0  # tokens that every layer has stored

    def append(
        self, layer: int, c_kv: Float[Tensor, "B T C"], k_rope: Float[Tensor, "B T R"]
    ) -> tuple[Float[Tensor, "B seen C"], Float[Tensor, "B seen R"]]:
        """Stores T more tokens of one layer; returns views of all tokens seen so far.

        Raises:
            ValueError: more tokens than there is room for.
        """
        start = self.filled[layer]
        end = start + c_kv.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, not {end}: make it larger")
        self.c_kv[layer, :, start:end] = c_kv
        self.k_rope[layer, :, start:end] = k_rope
        self.filled[layer] = end
        self.length = min(self.filled)
        return self.c_kv[layer, :, :end], self.k_rope[layer, :, :end]

    def cut(self, length: int) -> None:
        """Forgets all tokens from number `length` on (drafts that were not accepted, say)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't cut a cache of {self.length} tokens to {length}")
        self.filled, self.length = [length] * len(self.filled), length
