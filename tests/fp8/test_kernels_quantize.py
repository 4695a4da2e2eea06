"""The quantiser kernels against the reference, bit for bit: in Triton's interpreter, and on a GPU when there is one."""

import ctypes
import ctypes.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
import triton.language as tl
from kernelkit import DEVICE, DTYPES, awkward, bits, same

from dsv3_book.fp8 import kernels, reference
from dsv3_book.fp8.kernels import tiles

# Interpreted, a kernel's infinities make NumPy speak up.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")]
pow2s = st.booleans()


@st.composite
def rooms(draw: st.DrawFn) -> torch.Tensor:
    """Counts of tokens for some experts, zeros among them."""
    lengths = st.sampled_from([0, 1, 7, 128, 129])
    counts = draw(st.lists(lengths, min_size=1, max_size=4))
    return torch.tensor(counts, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)


@given(awkward([0, 1, 5, 33], [1, 80, 128, 300]), pow2s)
@settings(max_examples=60)
def test_rows(x: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_rows(x, pow2), reference.quantize_rows(x, pow2))


@pytest.mark.parametrize("pow2", [False, True])
def test_scales_next_to_powers_of_two(pow2: bool) -> None:
    """Largest magnitudes at 448·2^k and one step of fp32 to both sides, over the whole range of fp32."""
    exact = 448 * 2.0 ** torch.arange(-140, 119, dtype=torch.float64)
    at = exact.float().view(torch.int32)
    x = torch.cat([at - 1, at, at + 1]).view(torch.float32)[:, None].to(DEVICE)
    assert same(kernels.quantize_rows(x, pow2), reference.quantize_rows(x, pow2))


@given(awkward([1, 2], [1, 128, 150], [1, 80, 128, 130]), pow2s)
@settings(max_examples=30)
def test_blocks(w: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_blocks(w, pow2), reference.quantize_blocks(w, pow2))


@given(awkward([1, 5, 128, 200], [1, 64, 80, 130]), pow2s)
@settings(max_examples=20)
def test_columns(x: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_columns(x, None, pow2), reference.quantize_columns(x, None, pow2))


@given(st.data(), rooms(), pow2s)
@settings(max_examples=12)
def test_columns_of_experts(data: st.DataObject, counts: torch.Tensor, pow2: bool) -> None:
    x = data.draw(awkward([int(counts.sum())], [1, 70]))
    assert same(kernels.quantize_columns(x, counts, pow2), reference.quantize_columns(x, counts, pow2))


def test_counts_need_not_lie_side_by_side() -> None:
    x, counts = torch.ones(10, 5, device=DEVICE), torch.tensor([[3, 9], [0, 9], [7, 9]], device=DEVICE)[:, 0]
    assert same(kernels.quantize_columns(x, counts), reference.quantize_columns(x, counts, False))


@given(awkward([1, 5, 128, 200], [1, 64, 80, 130]), pow2s, pow2s)
@settings(max_examples=20)
def test_codes_to_columns(x: torch.Tensor, first: bool, pow2: bool) -> None:
    codes, scale = reference.quantize_rows(x, first)
    ours, expected = (m.requantize_columns(codes, scale, None, pow2) for m in (kernels, reference))
    assert same(ours, expected)


@given(st.data(), rooms(), pow2s)
@settings(max_examples=12)
def test_codes_to_columns_of_experts(data: st.DataObject, counts: torch.Tensor, pow2: bool) -> None:
    codes, scale = reference.quantize_rows(data.draw(awkward([int(counts.sum())], [1, 150])), True)
    ours, expected = (m.requantize_columns(codes, scale, counts, pow2) for m in (kernels, reference))
    assert same(ours, expected)


@given(awkward([1, 70], [1, 128]))
@settings(max_examples=20)
def test_tensor(x: torch.Tensor) -> None:
    assert same(kernels.quantize_tensor(x), reference.quantize_tensor(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(dtype: torch.dtype) -> None:
    x, counts = torch.empty(0, 5, dtype=dtype, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert [list(t.shape) for t in kernels.quantize_rows(x)] == [[0, 5], [0, 1]]
    assert [list(t.shape) for t in kernels.quantize_blocks(x[None])] == [[1, 0, 5], [1, 0, 1]]
    assert [list(t.shape) for t in kernels.quantize_columns(x)] == [[5, 0], [5, 0]]
    assert [list(t.shape) for t in kernels.swiglu_quantize(x, x)] == [[0, 5], [0, 1]]
    assert kernels.quantize_tensor(x)[1] == reference.MIN_SCALE
    assert same(kernels.quantize_columns(x, counts), reference.quantize_columns(x, counts, False))  # rooms all empty


# SwiGLU: exp is rounded differently everywhere -----------------------------------------------------------------------
def swiglu_of_the_kernel(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """What the interpreted kernel computes before it quantises: NumPy's exp, the same order of operations."""
    g = gate.float().numpy()
    h = torch.from_numpy(g / (1 + np.exp(0 - g))) * up.float()
    if weight is not None:
        h *= weight.float()[:, None]
    return h.to(gate.dtype)


@given(st.data(), st.booleans(), pow2s)
@settings(max_examples=40)
def test_swiglu(data: st.DataObject, weighted: bool, pow2: bool) -> None:
    gate = data.draw(awkward([1, 5, 33], [1, 80, 128, 300]))
    up = data.draw(awkward([gate.shape[0]], [gate.shape[1]])).to(gate.dtype)
    weight = data.draw(awkward([gate.shape[0]])).float() if weighted else None
    ours = kernels.swiglu_quantize(gate, up, weight, pow2)
    if DEVICE == "cpu":
        assert same(ours, reference.quantize_rows(swiglu_of_the_kernel(gate, up, weight), pow2))


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 8)])
def test_swiglu_before_it_is_quantised_is_a_step_from_the_reference(dtype: torch.dtype, steps: int) -> None:
    """Over all gates that are bf16 numbers: at most one step of bf16 or fp16 from the reference, and seldom that."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate > -87) & (gate < 60000)].to(dtype)[:, None]
    up = torch.ones_like(gate) * 0.7
    ours, expected = swiglu_of_the_kernel(gate, up, None), reference.weighted_swiglu(gate, up, None)
    apart = (bits(ours).int() - bits(expected).int()).abs()
    assert (ours.signbit() == expected.signbit()).all()
    assert apart.max() <= steps
    assert dtype == torch.float32 or (apart > 0).float().mean() < 1e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's exp")
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_a_gpu_is_within_a_code_of_the_reference(dtype: torch.dtype) -> None:
    """One step of gate's dtype moves a scale by 2^-7 at most, and a code to its neighbour."""
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(256, 512, generator=random).to(DEVICE, dtype) for _ in range(2))
    (codes, scale), (right, right_scale) = (m.swiglu_quantize(gate, up, None, False) for m in (kernels, reference))
    torch.testing.assert_close(scale, right_scale, rtol=2.0**-7, atol=0)
    apart = (bits(codes).int() - bits(right).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


# What a GPU computes and the interpreter doesn't ---------------------------------------------------------------------
@triton.jit
def divide_kernel(x, scale, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tiles.divide(tl.load(x + at), tl.load(scale + at)))


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c rounded once, by the C library, element by element."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return np.frompyfunc(fmaf, 3, 1)(a, b, c).astype(np.float32)


@pytest.mark.skipif(DEVICE != "cpu" or not ctypes.util.find_library("m"), reason="needs the interpreter, libm's fmaf")
def test_the_gpus_division_is_ieee_division(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of `divide` that GPUs take, interpreted with an exact fma: the bits of a true division."""
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]
        return interpreter.TensorHandle(exact_fma(x.data, y.data, z.data), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(tiles, "INTERPRETED", tl.constexpr(False))
    random, n = np.random.default_rng(0), 2**15
    # Scales over their whole range, many with a mantissa next to all ones or all zeros, where reciprocals are hardest.
    mantissa = np.where(random.random(n) < 0.5, random.integers(-3, 4, n) % 2**23, random.integers(0, 2**23, n))
    scale = (random.integers(1, 246, n) << 23 | mantissa).astype(np.uint32).view(np.float32)
    x = (scale * random.uniform(-448, 448, n) * 2.0 ** random.integers(-14, 1, n)).astype(np.float32)
    ties = (scale * (random.integers(16, 29, n) / 2.0 ** random.integers(-4, 14, n))).astype(np.float32)
    x = np.where(random.random(n) < 0.3, ties, x)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38]
    scale[:8] = 1.5
    out = torch.empty(n)
    divide_kernel[(1,)](torch.from_numpy(x), torch.from_numpy(scale), out, n)

    right = torch.from_numpy(np.where(np.isfinite(x), x / scale, np.float32(np.nan)))
    assert torch.equal(out.isnan(), right.isnan())
    exact = (right.abs() >= 2.0**-12) | (right == 0)
    assert torch.equal(bits(out)[exact], bits(right)[exact])
    little = ~exact & ~right.isnan()
    assert (out[little].abs() < 2.0**-11).all()
    assert torch.equal(out[little].signbit(), right[little].signbit())

    amax = torch.from_numpy(np.abs(x[np.isfinite(x)])[: 2**14])  # scales are made by the same division
    out = torch.empty(2**14)
    divide_kernel[(1,)](amax, torch.full_like(amax, 448.0), out, 2**14)
    assert torch.equal(out.clamp_min(2.0**-126), (amax / 448).clamp_min(2.0**-126))
