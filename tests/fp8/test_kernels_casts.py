"""The casts of the kernels against torch's own, bit for bit, and the day when Triton's interpreter needs no help."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import numpy as np
import triton.language as tl
from kernelkit import DEVICE, bits

from dsv3_book.fp8.kernels.casts import INTERPRETED, from_e4m3, narrow, to_e4m3, widen

pytestmark = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn


@triton.jit
def encode_kernel(x, out, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, to_e4m3(tl.load(x + at, at < n)), at < n)


@triton.jit
def decode_kernel(codes, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, from_e4m3(tl.load(codes + at)))


@triton.jit
def widen_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, widen(tl.load(x + at)))


@triton.jit
def narrow_kernel(x, out, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, narrow(tl.load(x + at, at < n), out.dtype.element_ty), at < n)


def floats(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(np.uint32).view(np.float32)).to(DEVICE)


def around_every_step_of_e4m3() -> torch.Tensor:
    """Every upper half of an fp32 (sign, exponent, 7 bits of mantissa: every e4m3 number, midpoint and magnitude) with
    the lower halves that decide a rounding: exactly there, a bit above, the middle, a bit below the next."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    return floats(np.concatenate([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]))


def encode(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, dtype=E4M3)
    encode_kernel[(triton.cdiv(x.numel(), 32768),)](x, out, x.numel(), 32768)
    return out


def test_to_e4m3_is_torchs_cast() -> None:
    x = around_every_step_of_e4m3()
    ours, theirs = encode(x), x.clamp(-448, 448).to(E4M3)  # clamped: versions of torch differ beyond 448
    number = ~x.isnan()
    assert torch.equal(bits(ours)[number], bits(theirs)[number])
    assert (bits(ours)[~number] == 0x7F).all()


def test_to_e4m3_at_random_patterns() -> None:
    x = floats(np.random.default_rng(0).integers(0, 2**32, 2**18))
    x = x[~x.isnan()]
    assert torch.equal(bits(encode(x)), bits(x.clamp(-448, 448).to(E4M3)))


def test_from_e4m3_is_torchs_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3)
    out = torch.empty(256, device=DEVICE)
    decode_kernel[(1,)](codes, out, 256)
    torch.testing.assert_close(out, codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widen_is_torchs_cast(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    out = torch.empty(2**16, device=DEVICE)
    widen_kernel[(1,)](x, out, 2**16)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's word for becoming infinite
def test_narrow_is_torchs_cast(dtype: torch.dtype) -> None:
    x = around_every_step_of_e4m3()
    out = torch.empty_like(x, dtype=dtype)
    narrow_kernel[(triton.cdiv(x.numel(), 32768),)](x, out, x.numel(), 32768)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# The day the interpreter is right ------------------------------------------------------------------------------------
@triton.jit
def naive_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.skipif(not INTERPRETED.value, reason="the kernels are compiled here: the interpreter takes no part")
@pytest.mark.xfail(reason="Triton issue 8322, see the test's docstring", raises=AssertionError, strict=True)
@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        pytest.param(124.3, torch.float32, E4M3, id="the carry"),
        pytest.param(1.0625, torch.float32, E4M3, id="a tie"),
        pytest.param(3 * 2.0**-10, torch.float32, E4M3, id="a subnormal tie"),
        pytest.param(500.0, torch.float32, E4M3, id="beyond the largest"),
        pytest.param(math.nan, torch.float32, E4M3, id="NaN to e4m3"),
        pytest.param(math.nan, E4M3, torch.float32, id="NaN from e4m3"),
        pytest.param(1.9999, torch.float32, torch.bfloat16, id="bf16 cut off"),
        pytest.param(1e-39, torch.bfloat16, torch.float32, id="subnormal bf16"),
    ],
)
def test_the_interpreter_still_needs_help(value: float, source: torch.dtype, target: torch.dtype) -> None:
    """Triton issue 8322: the interpreter converts small formats wrongly. Does this test XPASS? Then upstream has
    repaired that cast: delete its `if INTERPRETED` branch and its row of the table in `dsv3_book/fp8/kernels/casts.py`
    (as soon as the oldest Triton that we support is repaired too), and correct chapter 9."""
    x = torch.tensor([value]).to(source).to(DEVICE)
    out = torch.empty(1, dtype=target, device=DEVICE)
    naive_kernel[(1,)](x, out, 1)
    torch.testing.assert_close(out.float(), x.to(target).float(), rtol=0, atol=0, equal_nan=True)
