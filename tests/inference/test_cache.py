"""The latent cache: its size, and that decoding with it equals the whole forward pass."""

import pytest
import torch

from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.inference.cache import LatentCache
from dsv3_book.model import Transformer

TINY = ModelConfig.preset("tiny")


def test_v3_keeps_576_numbers_a_token_and_layer() -> None:
    cfg = ModelConfig.preset("v3-671b").replace(num_hidden_layers=3, first_k_dense_replace=3)
    cache = LatentCache(cfg, 1, 10, device="meta")
    assert (cache.c_kv.numel() + cache.k_rope.numel()) / 10 / 3 == 576


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 3, 2]])
@pytest.mark.parametrize("query_rank", [None, 48])
def test_decoding_in_pieces_equals_forward(pieces: list[int], query_rank: int | None) -> None:
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=8)
    cfg = TINY.replace(q_lora_rank=query_rank, rope_scaling=scaling, initializer_range=0.1)
    model = Transformer(cfg, seed=1)
    tokens = torch.randint(cfg.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = LatentCache(cfg, 2, 12)
    parts = [model.decode(part, cache) for part in tokens.split(pieces, dim=1)]
    assert cache.length == 12
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_cut_goes_back() -> None:
    model = Transformer(TINY)
    tokens = torch.arange(8)[None]
    cache = LatentCache(TINY, 1, 8)
    model.decode(tokens[:, :5], cache)
    model.decode(torch.tensor([[99, 98]]), cache)
    cache.cut(5)
    after = model.decode(tokens[:, 5:], cache)
    with torch.no_grad():
        torch.testing.assert_close(after, model(tokens)[:, 5:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="can't cut a cache of 8 tokens to 9"):
        cache.cut(9)


def test_a_full_cache_says_so() -> None:
    model = Transformer(TINY)
    cache = LatentCache(TINY, 1, 4)
    with pytest.raises(ValueError, match="room for 4 tokens, not 5"):
        model.decode(torch.arange(5)[None], cache)
    with pytest.raises(ValueError, match="both must be at least 1"):
        LatentCache(TINY, 0, 4)
