"""What travels as FP8 arrives as what FP8 experts would have made of it: the payload costs them nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.fp8 import dequantize_activation, quantize_activation
from dsv3_book.fp8.experts import Fp8Experts
from dsv3_book.model.dispatch import LocalDispatch
from dsv3_book.parallel.all_to_all import AllToAll, pack, unpack


@given(st.integers(0, 5), st.integers(1, 300), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(-30, 30))
def test_quantising_what_arrived_gives_the_same_numbers(N, D, dtype, exponent):
    """And the same codes, but in a tile whose largest value was rounded down to 224 = 448/2: its scale is then halved,
    and all its codes are doubled."""
    x = (torch.randn(N, D, generator=torch.Generator().manual_seed(N * D)) * 2.0**exponent).to(dtype)
    codes, scale = quantize_activation(x, pow2=True)
    arrived = unpack(pack(x), D, dtype)
    assert arrived.dtype == dtype
    assert torch.equal(arrived, dequantize_activation(codes, scale, dtype))
    again, scale_again = quantize_activation(arrived, pow2=True)
    assert torch.equal(dequantize_activation(again, scale_again), dequantize_activation(codes, scale))
    wide = lambda s: s.repeat_interleave(128, 1)[:, :D]
    same = wide(scale_again == scale)
    assert torch.equal(again.float()[same], codes.float()[same])
    tops = torch.stack([t.abs().amax(1) for t in codes.float().split(128, 1)], 1)
    assert torch.equal(scale_again == scale, (tops != 224) | (scale == 2.0**-126))
    assert torch.equal(wide(scale_again)[~same] * 2, wide(scale)[~same])


@pytest.mark.parametrize("seed", range(5))
def test_fp8_experts_give_the_same_bits_with_and_without_an_fp8_payload(seed):
    g = torch.Generator().manual_seed(seed)
    N, K, E, D, F = 24, 3, 4, 160, 130
    x = torch.randn(N, D, generator=g).bfloat16()
    experts = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(N)])
    gates, dy = torch.rand(N, K, generator=g), torch.randn(N, D, generator=g).bfloat16()
    weights = [torch.randn(E, *shape, generator=g) for shape in ((F, D), (F, D), (D, F))]

    def run(dispatch):
        leaves = [t.clone().requires_grad_() for t in (x, gates, *weights)]
        handle = dispatch.start(leaves[0], experts, leaves[1])
        y = handle.combine(Fp8Experts()(*handle.wait(), *leaves[2:])).wait()
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for name, a, b in zip(
        ("y", "x", "gates", "gate", "up", "down"), run(AllToAll(None, E, fp8=True)), run(LocalDispatch(E)), strict=True
    ):
        assert torch.equal(a, b), name
