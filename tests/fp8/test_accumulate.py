"""The narrow accumulator: bit for bit the same as a twin in whole numbers, and what follows from it."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.fp8 import reference
from dsv3_book.fp8.accumulate import accumulate, hopper_tolerance
from dsv3_book.fp8.formats import E4M3

codes = st.integers(0, 255).filter(lambda c: c & 0x7F != 0x7F)


def fp8(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8).view(torch.float8_e4m3fn)


def draw(shape, seed, positive=False, spread=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return E4M3.encode(x.abs() if positive else x).view(torch.float8_e4m3fn)


# A twin in whole numbers ---------------------------------------------------------------------------------------------
def parts(code: int) -> tuple[int, int]:
    """(signed significand in eighths, exponent): the value is significand/8 · 2^exponent."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    significand = mantissa + (8 if exponent else 0)
    return (-significand if code >> 7 else significand), max(exponent, 1) - 7


def shift(value: int, by: int, toward: str) -> int:
    """value · 2^by, cut to a whole number."""
    if by >= 0:
        return value << by
    return value >> -by if toward == "down" else int(math.copysign(abs(value) >> -by, value)) if value else 0


def twin(a: list[int], b: list[int], bits: int, promote_every: int | None, toward: str) -> float:
    total, register, at = 0.0, 0, 0  # the register is register · 2^at, |register| < 2^bits
    for start in range(0, len(a), 32):
        products = []
        for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True):
            (p, e), (q, f) = parts(x), parts(y)
            if p * q:
                products.append((p * q, e + f))  # p·q/64 · 2^(e+f)
        exponents = [e for _, e in products] + ([at + register.bit_length() - 1] if register else [])
        if exponents:
            unit = max(exponents) - (bits - 1)
            whole = sum(shift(p, e - 6 - unit, toward) for p, e in products) + shift(register, at - unit, toward)
            drop = max(0, abs(whole).bit_length() - bits)
            register, at = shift(whole, -drop, toward), unit + drop
        if promote_every and (start + 32) % promote_every == 0:
            total = torch.tensor(total, dtype=torch.float32).add(float(Fraction(register) * Fraction(2) ** at)).item()
            register = 0
    last = float(Fraction(register) * Fraction(2) ** at)
    return torch.tensor(total, dtype=torch.float32).add(last).item() if promote_every else last


@pytest.mark.parametrize("toward", ["zero", "down"])
@pytest.mark.parametrize("promote", [None, 32, 128])
@given(data=st.data(), bits=st.sampled_from([5, 10, 14, 16, 17, 23]), K=st.integers(1, 300))
def test_equals_the_twin_bit_for_bit(data, bits, K, toward, promote):
    """Any codes at all, so exponents differ by up to 30."""
    a, b = (data.draw(st.lists(codes, min_size=K, max_size=K)) for _ in range(2))
    got = accumulate(fp8([a]), fp8([b]), bits, promote, toward=toward).item()
    assert got == twin(a, b, bits, promote, toward)


@pytest.mark.parametrize("toward", ["zero", "down"])
def test_equals_the_twin_on_gaussians_at_4096(toward):
    a, b = draw((2, 4096), 0), draw((3, 4096), 1)
    for promote in (None, 128):
        got = accumulate(a, b, promote_every=promote, toward=toward)
        slow = [[twin(x, y, 14, promote, toward) for y in b.view(torch.uint8).tolist()]
                for x in a.view(torch.uint8).tolist()]  # fmt: skip
        assert got.tolist() == slow


# What follows --------------------------------------------------------------------------------------------------------
def error(a, b, **options) -> torch.Tensor:
    exact = a.double() @ b.double().t()
    return (accumulate(a, b, **options).double() - exact) / exact


def test_enough_bits_are_exact():
    """E4M3 products are multiples of 2^−18 below 2^18; with 40 bits nothing in a short sum is cut."""
    a, b = draw((4, 96), 2, spread=2.0), draw((5, 96), 3, spread=2.0)
    assert torch.equal(accumulate(a, b, bits=40).double(), (a.double() @ b.double().t()).float().double())


def test_one_step_by_hand():
    """448 + 2^−5: aligned to 2^8 (the exponent of 448), 14 bits reach down to 2^(8−13) = 2^−5, and 2^−6 is cut off."""
    a = torch.tensor([[448.0, 2.0**-5], [448.0, 2.0**-6], [-448.0, -(2.0**-6)]]).to(torch.float8_e4m3fn)
    one = torch.ones(1, 2).to(torch.float8_e4m3fn)
    assert accumulate(a, one).flatten().tolist() == [448.0 + 2.0**-5, 448.0, -448.0]
    assert accumulate(a, one, toward="down").flatten().tolist() == [448.0 + 2.0**-5, 448.0, -448.0 - 2.0**-5]


def test_a_sum_gets_stuck_where_ones_fall_below_the_unit():
    """Ones: at 2^14 the unit is 2, and a one no longer counts. The same happens to fp32 at 2^24, and to nobody else."""
    ones = torch.ones(1, 32768).to(torch.float8_e4m3fn)
    assert accumulate(ones, ones).item() == 16384.0
    assert accumulate(ones, ones, promote_every=128).item() == 32768.0


def test_error_grows_with_length_and_promotion_repairs_it():
    """Claim C11, on operands of one sign: the worst case for cutting."""
    alone, repaired = [], []
    for K in (512, 2048, 4096):
        a, b = draw((16, K), 4, positive=True), draw((16, K), 5, positive=True)
        alone.append(error(a, b).abs().mean().item())
        repaired.append(error(a, b, promote_every=128).abs().mean().item())
    assert alone[0] < alone[1] < alone[2] and alone[2] > 0.02
    assert max(repaired) < 0.003


@pytest.mark.parametrize("K", [32, 128, 576, 4096])
@pytest.mark.parametrize("kind", ["normal", "one sign", "outliers"])
def test_tolerances_hold_for_the_model(K, kind):
    """Outliers as in the tests of the products: one in a hundred is 50 times larger."""
    x = torch.randn(2, 48, K, generator=torch.Generator().manual_seed(K))
    if kind == "outliers":
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(8)) < 0.01] *= 50
    (a, a_scale), (b, b_scale) = (
        reference.quantize_rows(half.abs() if kind == "one sign" else half, False) for half in x
    )
    wide_a, wide_b = (reference.dequantize_rows(*q).double() for q in ((a, a_scale), (b, b_scale)))
    total = torch.zeros(48, 48)
    for t in range(a_scale.shape[1]):  # as the GEMM: each tile of 128 in the narrow accumulator, scaled, added in fp32
        tile = slice(128 * t, 128 * (t + 1))
        total += accumulate(a[:, tile], b[:, tile]) * a_scale[:, t, None] * b_scale[None, :, t]
    off = (total.double() - wide_a @ wide_b.t()).abs() / (wide_a.norm(dim=1)[:, None] * wide_b.norm(dim=1))
    assert off.max() <= hopper_tolerance(K, guaranteed=True)
    assert off.max() <= hopper_tolerance(K) * (1 if kind == "one sign" else 0.6)


def test_what_is_refused():
    one = torch.ones(1, 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN code"):
        accumulate(fp8([[0x7F] * 32]), one)
    with pytest.raises(ValueError, match="bits=3"):
        accumulate(one, one, bits=3)
    with pytest.raises(ValueError, match="promote_every=48 must be a multiple of step=32"):
        accumulate(one, one, promote_every=48)
