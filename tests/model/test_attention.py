"""Attention in blocks against the formula: values and gradients, across block edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.model import attention
from dsv3_book.model.attention import causal_attention, plain_attention


def both(T, d, dv, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(2, 2, T, width, generator=generator).to(dtype)
    inputs, dout, answers = (draw(d), draw(d), draw(dv)), draw(dv), []
    for fn in (causal_attention, plain_attention):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = fn(*leaves, 0.4)
        y.backward(dout)
        answers.append([y.detach(), *(t.grad for t in leaves)])
    return zip(*answers)


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_fast_is_slow_whatever_the_block(T, d, dv, block, seed):
    before, attention.BLOCK = attention.BLOCK, block
    try:
        for a, b in both(T, d, dv, seed):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    finally:
        attention.BLOCK = before


@pytest.mark.parametrize("T", [63, 64, 65, 130])
def test_at_the_edges_of_the_real_block(T):
    for a, b in both(T, 8, 5, T):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bf16_stays_close():
    for a, b in both(130, 16, 8, 0, torch.bfloat16):
        assert a.dtype == torch.bfloat16 and float((a - b).float().norm()) < 0.03 * float(b.float().norm())
