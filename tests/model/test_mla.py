"""Latent attention: plain form = the formulas, absorbed form = plain form, and nobody sees the future."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelkit import SMALL
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_book.config import ModelConfig
from dsv3_book.model.attention import KEEP
from dsv3_book.model.mla import MLA
from dsv3_book.model.rope import angles


class ListCache:
    """The least a cache must be."""

    def __init__(self):
        self.length, self.stored = 0, None

    def append(self, layer, c_kv, k_rope):
        new = (c_kv, k_rope)
        self.stored = new if self.stored is None else tuple(torch.cat(p, 1) for p in zip(self.stored, new))
        self.length = self.stored[0].shape[1]
        return self.stored


@st.composite
def configs(draw):
    size = lambda least, most: draw(st.integers(least, most))
    return SMALL.replace(
        hidden_size=size(5, 12),
        num_attention_heads=size(1, 3),
        kv_lora_rank=size(3, 8),
        q_lora_rank=draw(st.none() | st.integers(3, 8)),
        qk_rope_head_dim=2 * size(1, 3),
        v_head_dim=size(1, 5),
        qk_nope_head_dim=size(1, 5),
        rope_scaling=draw(st.sampled_from([None, SMALL.rope_scaling])),
    )


def made(cfg: ModelConfig, T: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mla = MLA(cfg, 0)
    with torch.no_grad():
        for p in mla.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else noise * p.shape[-1] ** -0.5)
    return mla, torch.randn(2, T, cfg.hidden_size, generator=generator)


@settings(max_examples=25)
@given(configs(), st.integers(1, 9))
def test_plain_form_is_the_reports_formulas(cfg, T):
    mla, x = made(cfg, T)
    weights = {n: p.detach().double() for n, p in mla.state_dict().items()}
    y = mla(x, angles(cfg, torch.arange(T)))
    for b in range(2):
        slow = reference.attention(cfg, weights, "", x[b].double())
        torch.testing.assert_close(y[b].detach().double(), slow, atol=1e-4, rtol=1e-4)


@settings(max_examples=25)
@given(configs(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_absorbed_form_equals_the_plain_one_however_the_tokens_come(cfg, steps):
    T = sum(steps)
    mla, x = made(cfg, T)
    cache, parts = ListCache(), []
    with torch.no_grad():
        for piece in x.split(steps, dim=1):
            at = angles(cfg, torch.arange(cache.length, cache.length + piece.shape[1]))
            parts.append(mla.decode(piece, at, cache))
        plain = mla(x, angles(cfg, torch.arange(T)))
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4)
    assert sum(t[0, 0].numel() for t in cache.stored) == cfg.kv_lora_rank + cfg.qk_rope_head_dim


@settings(max_examples=15)
@given(configs(), st.integers(2, 8), st.data())
def test_later_tokens_change_nothing(cfg, T, data):
    mla, x = made(cfg, T)
    at, t = angles(cfg, torch.arange(T)), data.draw(st.integers(1, T - 1))
    changed = x.clone()
    changed[:, t:] += 1
    torch.testing.assert_close(mla(x, at)[:, :t], mla(changed, at)[:, :t])
    assert not torch.allclose(mla(x, at)[:, t:], mla(changed, at)[:, t:])


@pytest.mark.parametrize("rank", [None, 11])
def test_recomputing_gives_the_same_bits(rank):
    cfg = SMALL.replace(q_lora_rank=rank)
    mla, x = made(cfg, 7)
    at, results = angles(cfg, torch.arange(7)), []
    for mla.recompute in (False, True):
        leaf = x.clone().requires_grad_()
        mla.zero_grad()
        y = mla(leaf, at)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in mla.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


class Made(TorchDispatchMode):
    """Remembers the memory of every tensor an operation returns, without keeping it alive.

    Saved-tensor hooks can't count here: of nested ones only the innermost is called, and that is `recomputed`'s own.
    """

    def __init__(self):
        super().__init__()
        self.memories = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for t in filter(torch.is_tensor, tree_leaves(result)):
            memory = t.untyped_storage()
            self.memories[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        return result


@pytest.mark.parametrize("T", [16, KEEP + 1])  # attention keeps its probabilities, and doesn't
def test_recomputing_drops_queries_keys_values_and_normed_latents(T):
    cfg = SMALL
    mla, x = made(cfg, T)
    at, kept = angles(cfg, torch.arange(T)), []
    for mla.recompute in (False, True):
        with Made() as tape:
            y = mla(x, at)
        kept.append(sum(nbytes for memory, nbytes in tape.memories.values() if not memory.expired()))
        assert y.requires_grad
    heads = cfg.num_attention_heads * (2 * cfg.qk_head_dim + cfg.v_head_dim)
    assert kept[0] - kept[1] == 4 * 2 * T * (heads + cfg.q_lora_rank + cfg.kv_lora_rank)
