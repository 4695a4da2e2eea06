"""Mistakes that somebody shipped, made on purpose: each must be seen by the checks that the suite makes elsewhere."""

import pytest
import torch

from dsv3_book import fp8
from dsv3_book.fp8.formats import E4M3, UE8M0, ceil_power_of_two

WORST = 1 / 17  # the largest relative error of rounding a normal number to E4M3: half a step above a power of two


def worst_error(back, w):
    """Largest relative error among values that are normal in their tile (the top octaves)."""
    big = w.abs() > w.abs().amax(1, keepdim=True) / 100
    return ((back - w).abs() / w.abs())[big].max().item()


def tiles(seed=0):
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)) * 0.02
    return w, w.abs().amax(1, keepdim=True) / 448


def restored(w, divide_by, multiply_by):
    return E4M3.round(w / divide_by) * multiply_by


def test_every_shipped_mistake_with_scales_is_seen():
    w, scale = tiles()
    up = ceil_power_of_two(scale)
    nearest = UE8M0.decode(UE8M0.encode(scale))
    assert worst_error(restored(w, scale, scale), w) <= WORST * 1.0001
    assert worst_error(restored(w, up, up), w) <= WORST  # powers of two, rounded up and then used: no worse
    assert (
        worst_error(restored(w, nearest, nearest), w) > 0.3
    )  # the cast's nearest power: the largest values are clipped
    assert worst_error(restored(w, scale, up), w) > 0.9  # divided by one scale, another one stored
    assert worst_error(restored(w, scale, 1 / scale), w) > 1e6  # divided on the way back, as "inv" suggests


def test_ours_makes_none_of_them():
    w, _ = tiles(1)
    for pow2 in (False, True):
        codes, scale = fp8.quantize_activation(w, pow2)
        assert worst_error(fp8.dequantize_activation(codes, scale), w) <= WORST * 1.0001
        assert codes.float().abs().max() <= 448
    assert torch.equal(scale, ceil_power_of_two(scale))


@pytest.mark.parametrize("rows", [576, 80, 129])
def test_a_short_block_has_a_scale_of_its_own(rows):
    """576 rows are four and a half blocks of 128. Forgetting the half leaves its codes unscaled."""
    w = torch.randn(rows, 200, generator=torch.Generator().manual_seed(2)) * 0.02
    codes, scale = fp8.quantize_weight(w)
    assert scale.shape == (-(-rows // 128), 2)
    back = fp8.dequantize_weight(codes, scale)
    whole = rows // 128 * 128
    assert (back - w)[whole:].norm() < 0.04 * w[whole:].norm()
    assert (codes.float()[whole:] - w[whole:]).norm() > 1000 * w[whole:].norm()


@pytest.mark.parametrize("pow2", [False, True])
def test_a_second_quantisation_is_nearly_free_with_powers_of_two_only(pow2):
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    codes, scale = fp8.quantize_activation(x, pow2)
    once = fp8.dequantize_activation(codes, scale)
    twice = fp8.dequantize_activation(*fp8.requantize_columns(codes, scale, None, pow2)).t()
    changed = (twice != once).float().mean().item()
    assert changed < 0.001 if pow2 else changed > 0.9
