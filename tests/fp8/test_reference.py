"""The quantisers and products in plain torch against an independent definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book import fp8
from dsv3_book.fp8 import reference

# Every non-negative E4M3 value by its definition: 4 bits of exponent (bias 7), 3 of mantissa, 0x7F is NaN.
MAGNITUDES = np.array([(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)])


def nearest_code(x: float) -> int:
    """The E4M3 code of an exact number: nearest, a tie to the even code, NaN as 0x7F."""
    if math.isnan(x):
        return 0x7F
    gaps = np.abs(MAGNITUDES - abs(x))
    best = np.flatnonzero(gaps == gaps.min())
    code = int(best[0] if len(best) == 1 else best[best % 2 == 0][0])
    return code | (0x80 if math.copysign(1, x) < 0 else 0)


def quantize_tile(x: np.ndarray, pow2: bool) -> tuple[np.ndarray, np.float32]:
    """The rule of one tile, element by element. x is float32 [n]."""
    finite = np.isfinite(x)
    amax = np.float32(np.abs(x[finite]).max(initial=0))
    scale = max(np.float32(amax / np.float32(448)), np.float32(2.0**-126))
    if pow2:
        mantissa, exponent = math.frexp(float(scale))
        scale = np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
    with np.errstate(all="ignore"):
        quotient = np.where(finite, (x / scale).astype(np.float32), np.nan)
    return np.array([nearest_code(float(np.clip(q, -448, 448))) for q in quotient], dtype=np.uint8), scale


def independent_rows(x: torch.Tensor, pow2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """1×128 tiles of x [N, K] by `quantize_tile`."""
    values = x.float().numpy()
    tiles = range(0, x.shape[1], 128)
    done = [[quantize_tile(row[t : t + 128], pow2) for t in tiles] for row in values]
    codes = np.stack([np.concatenate([c for c, _ in row]) for row in done])
    return torch.from_numpy(codes), torch.tensor(np.array([[s for _, s in row] for row in done]))


@st.composite
def awkward(draw: st.DrawFn, rows: int = 4, columns: int = 300) -> torch.Tensor:
    """Random matrices with what breaks quantisers: outliers, zeros, subnormals, the largest fp32, NaN, infinities."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    x *= 10.0 ** draw(st.integers(-44, 37))
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e-38, 1e4, 448.0, 464.0]
    for value in draw(st.lists(st.sampled_from(special), max_size=6)):
        x[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = value
    if draw(st.booleans()):
        x[draw(st.integers(0, shape[0] - 1))] = 0
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def same_codes(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


@given(awkward(), st.booleans())
@settings(max_examples=60)
def test_activation_tiles_are_the_definitions_bit_for_bit(x: torch.Tensor, pow2: bool) -> None:
    codes, scale = fp8.quantize_activation(x, pow2)
    expected, expected_scale = independent_rows(x, pow2)
    assert same_codes(codes, expected)
    assert torch.equal(scale, expected_scale)


@given(awkward(), st.booleans())
@settings(max_examples=30)
def test_columns_are_the_rows_of_the_transpose(x: torch.Tensor, pow2: bool) -> None:
    codes, scale = fp8.quantize_columns(x, pow2=pow2)
    expected, expected_scale = independent_rows(x.t(), pow2)
    assert same_codes(codes, expected)
    assert torch.equal(scale, expected_scale)


@given(awkward(rows=140, columns=200), st.booleans())
@settings(max_examples=30)
def test_weight_blocks_are_the_definitions_bit_for_bit(w: torch.Tensor, pow2: bool) -> None:
    codes, scale = fp8.quantize_weight(w, pow2)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float()
            expected, expected_scale = quantize_tile(block.flatten().numpy(), pow2)
            ours = codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].contiguous()
            assert same_codes(ours.flatten(), torch.from_numpy(expected))
            assert scale[i, j].item() == expected_scale


@given(awkward())
@settings(max_examples=20)
def test_one_scale_for_a_tensor(x: torch.Tensor) -> None:
    codes, scale = fp8.quantize_tensor(x)
    expected, expected_scale = quantize_tile(x.float().flatten().numpy(), False)
    assert same_codes(codes.flatten(), torch.from_numpy(expected))
    assert scale.item() == expected_scale


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(any), st.booleans())
@settings(max_examples=20)
def test_every_expert_has_a_room_of_its_own(counts: list[int], pow2: bool) -> None:
    x = torch.randn(sum(counts), 17)
    codes, scale = fp8.quantize_columns(x, torch.tensor(counts), pow2)
    assert codes.shape[1] == reference.total_rooms(len(x), len(counts)) and codes.shape[1] % 128 == 0
    start = first = 0
    for n in counts:
        expected, expected_scale = fp8.quantize_columns(x[first : first + n], pow2=pow2) if n else (None, None)
        stop = start + n + -n % 128
        if n:
            assert same_codes(codes[:, start : start + n].contiguous(), expected)
            assert torch.equal(scale[:, start // 128 : stop // 128], expected_scale)
        assert not codes[:, start + n : stop].contiguous().view(torch.uint8).any()
        start, first = stop, first + n
    assert not codes[:, start:].contiguous().view(torch.uint8).any()


def test_powers_of_two_make_the_second_quantisation_nearly_free() -> None:
    """With exact scales only values at the bottom of their new tile are rounded again; fp32 scales round nearly all."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    changed = {}
    for pow2 in (False, True):
        codes, scale = fp8.quantize_activation(x, pow2)
        once = fp8.dequantize_activation(codes, scale)
        twice = fp8.dequantize_activation(*fp8.requantize_columns(codes, scale, pow2=pow2)).t()
        changed[pow2] = (once != twice).double().mean().item()
    assert changed[True] < 0.02 and changed[False] > 0.5


def bound(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """2e-6 of ‖A's row‖ · ‖B's row‖, for every element of the product."""
    return 2e-6 * a.norm(dim=-1)[..., :, None] * b.norm(dim=-1)[..., None, :] + 1e-300


sizes = st.integers(1, 270)


@given(sizes, sizes, st.integers(1, 600), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=30)
def test_gemm_is_the_product_of_the_dequantised(M: int, N: int, K: int, rows: bool, pow2: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = fp8.quantize_activation(torch.randn(M, K, generator=g), pow2)
    wide = torch.randn(N, K, generator=g) * torch.randn(N, 1, generator=g).exp()
    b = fp8.quantize_activation(wide, pow2) if rows else fp8.quantize_weight(wide, pow2)
    a64 = fp8.dequantize_activation(*a).double()
    b64 = (fp8.dequantize_activation(*b) if rows else fp8.dequantize_weight(*b)).double()
    exact = a64 @ b64.t()
    assert ((fp8.fp8_gemm(*a, *b, torch.float32) - exact).abs() <= bound(a64, b64)).all()
    assert ((reference.gemm_by_tiles(*a, *b, torch.float32) - exact).abs() <= bound(a64, b64)).all()
    assert fp8.fp8_gemm(*a, *b).dtype == torch.bfloat16


@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), sizes, sizes, st.integers(0, 99))
@settings(max_examples=20)
def test_grouped_products(counts: list[int], N: int, K: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(sum(counts), K, generator=g), torch.randn(len(counts), N, K, generator=g)
    dy = torch.randn(sum(counts), N, generator=g)
    n = torch.tensor(counts)
    a, b = fp8.quantize_activation(x), fp8.quantize_weight(w)
    y = fp8.grouped_fp8_gemm(*a, *b, n, torch.float32)
    xc, dyc = fp8.quantize_columns(x, n), fp8.quantize_columns(dy, n)
    dw = fp8.grouped_fp8_wgrad(*dyc, *xc, n)
    room = max(counts) + 1
    roomy = torch.randn(len(counts), room, K, generator=g)
    m = fp8.quantize_activation(roomy)
    masked = fp8.masked_fp8_gemm(*m, *b, n, torch.float32)
    first = 0
    for e, count in enumerate(counts):
        rows = slice(first, first + count)
        b64 = fp8.dequantize_weight(b[0][e], b[1][e]).double()
        a64 = fp8.dequantize_activation(a[0][rows], a[1][rows]).double()
        assert ((y[rows] - a64 @ b64.t()).abs() <= bound(a64, b64)).all()
        m64 = fp8.dequantize_activation(m[0][e], m[1][e]).double()
        assert ((masked[e] - m64 @ b64.t()).abs() <= bound(m64, b64))[:count].all()
        assert not masked[e, count:].any()
        if count:
            x64 = fp8.dequantize_activation(*fp8.quantize_columns(x[rows])).double()
            dy64 = fp8.dequantize_activation(*fp8.quantize_columns(dy[rows])).double()
            assert ((dw[e] - dy64 @ x64.t()).abs() <= bound(dy64, x64)).all()
        else:
            assert not dw[e].any()
        first += count


@given(awkward())
@settings(max_examples=20)
def test_e5m6_keeps_six_bits_of_mantissa(x: torch.Tensor) -> None:
    packed, scale = fp8.quantize_e5m6(x)
    assert packed.shape[-1] == -(-3 * x.shape[-1] // 2)
    back = fp8.dequantize_e5m6(packed, scale, x.shape[-1])
    finite = x.float().isfinite()
    wide = scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    step = torch.maximum(x.float().abs() * 2.0**-7, wide * 2.0**-21)
    assert ((back - x.float()).abs() <= step)[x.float().abs() < 3e38].all()
    assert not back[~finite].isfinite().any()


def test_the_fused_swiglu_is_swiglu_then_quantise() -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(40, 200, generator=g).bfloat16() for _ in range(2))
    weight = torch.rand(40, generator=g)
    h = (torch.nn.functional.silu(gate.double()) * up.double() * weight[:, None]).bfloat16()
    codes, scale = fp8.swiglu_quantize(gate, up, weight)
    expected, expected_scale = fp8.quantize_activation(h)
    assert (codes.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 2  # a bf16 rounding on the edge
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)


def test_nothing_is_lost_where_nothing_is() -> None:
    codes, scale = fp8.quantize_activation(torch.zeros(0, 130))
    assert codes.shape == (0, 130) and scale.shape == (0, 2)
    out = fp8.fp8_gemm(codes, scale, *fp8.quantize_weight(torch.ones(3, 130)), torch.float32)
    assert out.shape == (0, 3)


def test_products_by_expert_never_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles one anew for every number of rows, and no two steps load the experts alike: steps became minutes."""
    monkeypatch.setattr(reference, "times_transposed", None)
    n, w = torch.tensor([300, 212]), fp8.quantize_weight(torch.ones(2, 256, 256))
    x = torch.ones(512, 256)
    fp8.grouped_fp8_gemm(*fp8.quantize_activation(x), *w, n)
    fp8.masked_fp8_gemm(*fp8.quantize_activation(x.view(2, 256, 256)), *w, torch.tensor([250, 3]))
    fp8.grouped_fp8_wgrad(*fp8.quantize_columns(x, n), *fp8.quantize_columns(x, n), n)
