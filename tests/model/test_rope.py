"""RoPE and YaRN: neighbouring pairs turn, scores see only distances, frequencies are stretched where they should."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.model.rope import angles, frequencies, rotate

V3 = ModelConfig.preset("v3-671b")
TINY = ModelConfig.preset("tiny")

shapes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5))


def draw(shape, seed, dtype=torch.float32):
    B, T, H, r = shape
    cfg = TINY.replace(qk_rope_head_dim=2 * r)
    x = torch.randn(B, T, H, 2 * r, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return cfg, x


@given(shapes, st.integers(0, 99), st.integers(0, 5000))
def test_every_pair_turns_by_its_own_angle(shape, seed, start):
    cfg, x = draw(shape, seed)
    T = x.shape[1]
    turned = rotate(x, angles(cfg, torch.arange(start, start + T)))
    for t in range(T):
        slow = reference.rope(cfg, x[0, t, 0].double(), start + t)
        torch.testing.assert_close(turned[0, t, 0].double(), slow, atol=2e-3 if start > 100 else 1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@given(shapes, st.integers(0, 99), st.integers(0, 40))
def test_scores_see_only_the_distance(shape, seed, shift):
    cfg, x = draw(shape, seed)
    T = x.shape[1]
    scores = []
    for start in (0, shift):
        q = rotate(x, angles(cfg, torch.arange(start, start + T)))
        scores.append(torch.einsum("bthr,bshr->bhts", q, q))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


@given(shapes, st.integers(0, 99))
def test_gradient_is_the_rotation_back(shape, seed):
    cfg, x = draw(shape, seed)
    yarn = RopeScaling(factor=4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.3)
    at = angles(cfg.replace(rope_scaling=yarn), torch.arange(x.shape[1]))
    x.requires_grad_()
    rotate(x, at).pow(3).sum().backward()
    y = x.detach().clone().requires_grad_()
    cos, sin = (a[:, None] for a in at)
    even, odd = y[..., 0::2], y[..., 1::2]
    plain = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    plain.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)


def test_position_zero_is_left_alone_and_dtype_is_kept():
    cfg, x = draw((2, 1, 2, 3), 0, torch.bfloat16)
    turned = rotate(x, angles(cfg, torch.zeros(1, dtype=torch.int64)))
    assert turned.dtype == torch.bfloat16 and torch.equal(turned, x)


@pytest.mark.parametrize("cfg", [V3, V3.replace(rope_scaling=None), TINY])
def test_frequencies_are_those_of_the_papers_formula(cfg):
    slow = [reference.frequency(cfg, pair) for pair in range(cfg.qk_rope_head_dim // 2)]
    torch.testing.assert_close(frequencies(cfg), torch.tensor(slow), rtol=1e-5, atol=0)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain, yarn = frequencies(V3.replace(rope_scaling=None)), frequencies(V3)
    turns = plain * 4096 / (2 * math.pi)  # within the original context
    ratio = plain / yarn
    assert torch.allclose(ratio[turns > 40], torch.ones(1)) and torch.allclose(ratio[turns < 0.5], torch.tensor(40.0))
    assert (ratio.diff() >= -1e-4).all() and 0 < int((turns > 40).sum()) < 32


def test_v3_scales_the_softmax_and_not_the_rotation():
    cos, sin = angles(V3, torch.arange(8))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    uneven = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.0)
    cos, sin = angles(V3.replace(rope_scaling=uneven), torch.arange(8))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, (0.1 * math.log(40) + 1) ** 2))
