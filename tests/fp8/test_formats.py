"""The codecs: every code there and back, encode against torch's casts and against the nearest value of a table."""

import bisect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.fp8.formats import E4M3, E5M2, E5M6, UE8M0, Format, ceil_power_of_two, pack12, unpack12

FORMATS = [E4M3, E5M2, E5M6]
TORCH = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
words = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


def from_bits(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


def every_code(fmt: Format) -> torch.Tensor:
    return torch.arange(2**fmt.bits).to(torch.uint8 if fmt.bits <= 8 else torch.int16)


def interesting(fmt: Format) -> torch.Tensor:
    """All values, all half-way points, and the fp32 neighbours on either side of both; zeros; fp32's own extremes."""
    values = fmt.table()[: fmt.top + 1].double()
    middles = (values[1:] + values[:-1]) / 2
    around = torch.cat([values, middles]).float()
    up, down = (torch.nextafter(around, torch.tensor(to)) for to in (math.inf, 0.0))
    tiny = from_bits([0, 1, 2, 0x7FFFFF, 0x800000, 0x800001])
    all_of = torch.cat([around, up, down, tiny])
    return torch.cat([all_of, -all_of])


def nearest(fmt: Format, x: float) -> int:
    """By the definition, in exact fractions: the nearest of all finite values; of two as near, the even code."""
    magnitudes = _fractions(fmt)
    size = Fraction(abs(x))
    at = bisect.bisect(magnitudes, size)
    code = min(range(max(0, at - 2), min(len(magnitudes), at + 2)), key=lambda c: (abs(magnitudes[c] - size), c % 2))
    return code | (int(math.copysign(1, x) < 0) << (fmt.bits - 1))


_cache: dict[str, list[Fraction]] = {}


def _fractions(fmt: Format) -> list[Fraction]:
    if fmt.name not in _cache:  # written out from the OCP definition, not from the codec's own table
        e, m, bias = fmt.exponent_bits, fmt.mantissa_bits, 2 ** (fmt.exponent_bits - 1) - 1
        top = 2 ** (e + m) - 2 if fmt.name == "E4M3" else (2**e - 1) * 2**m - 1
        out = []
        for code in range(top + 1):
            exponent, mantissa = code >> m, Fraction(code & (2**m - 1), 2**m)
            out.append((mantissa + (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - bias))
        _cache[fmt.name] = out
    return _cache[fmt.name]


def test_the_formats_are_those_of_the_standard():
    assert (E4M3.max, E4M3.min_normal, E4M3.min_subnormal) == (448.0, 2.0**-6, 2.0**-9)
    assert (E5M2.max, E5M2.min_normal, E5M2.min_subnormal) == (57344.0, 2.0**-14, 2.0**-16)
    assert (E5M6.max, E5M6.min_normal, E5M6.min_subnormal, E5M6.bits) == (65024.0, 2.0**-14, 2.0**-20, 12)
    assert E4M3.table()[[0x00, 0x01, 0x08, 0x38, 0x7E]].tolist() == [0.0, 2.0**-9, 2.0**-6, 1.0, 448.0]
    assert int(E4M3.table().isnan().sum()) == 2 and int(E4M3.table().isinf().sum()) == 0
    assert int(E5M2.table().isnan().sum()) == 6 and int(E5M2.table().isinf().sum()) == 2
    assert E4M3.fields(0x7E) == "0 1111 110" and E5M6.fields(0xC00) == "1 10000 000000"


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_code_round_trips_and_nan_stays_nan(fmt):
    codes = every_code(fmt)
    values = fmt.decode(codes)
    number = ~values.isnan()
    assert torch.equal(fmt.encode(values)[number], codes[number])  # −0.0 and infinities included
    assert fmt.decode(fmt.encode(values[~number])).isnan().all()
    assert values[number].unique().numel() == int(number.sum()) - 1  # only ±0 are equal
    assert torch.equal(values, fmt.table()) or torch.equal(values[number], fmt.table()[number])


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_decode_is_torchs(fmt):
    codes = every_code(fmt)
    assert torch.equal(codes.view(TORCH[fmt.name]).float().nan_to_num(-1), fmt.decode(codes).nan_to_num(-1))
    assert torch.equal(UE8M0.decode(codes).nan_to_num(-1), codes.view(torch.float8_e8m0fnu).float().nan_to_num(-1))


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@given(random=words)
def test_encode_is_torchs_within_range(fmt, random):
    limit = fmt.max * (1 + 2.0 ** -(fmt.mantissa_bits + 2))  # half of the way to the middle beyond max
    x = torch.cat([from_bits(random), interesting(fmt)])
    x = x[x.abs() <= limit]
    assert torch.equal(fmt.encode(x), x.to(TORCH[fmt.name]).view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_encode_is_the_nearest_value(fmt):
    x = interesting(fmt)
    assert fmt.encode(x).tolist() == [nearest(fmt, v) for v in x.tolist()]


@given(random=words, exponents=st.lists(st.integers(100, 145), min_size=1, max_size=32))
def test_random_bits_become_the_nearest_value_of_e5m6(random, exponents):
    """Random words are mostly out of E5M6's range, so their exponent is drawn again; E5M6 has no torch type to ask."""
    near = [(w & 0x807FFFFF) | (exponents[i % len(exponents)] << 23) for i, w in enumerate(random)]
    x = torch.cat([from_bits(random), from_bits(near)])
    x = x[x.isfinite()]
    codes = E5M6.encode(x)
    table = E5M6.table()[: E5M6.top + 1].double()
    size = x.double().abs().clamp(max=E5M6.max)
    at = torch.searchsorted(table, size).clamp(max=E5M6.top)  # table[at] ≥ size
    below = (at - 1).clamp(min=0)
    up, down = table[at] - size, size - table[below]
    best = torch.where((up < down) | ((up == down) & (at % 2 == 0)), at, below)
    best = torch.where(size == 0, 0, best)
    assert torch.equal(codes.int(), (best | (x.signbit().long() << 11)).int())


def test_out_of_range_is_ours_and_stated():
    """torch 2.13 on a CPU makes 448 of 500 and inf in E4M3, other versions and devices NaN; E5M2 makes 65504 inf."""
    x = torch.tensor([464.0, 500.0, 1e38, math.inf, -1e38, -math.inf, math.nan, -math.nan])
    assert E4M3.encode(x).tolist() == [0x7E, 0x7E, 0x7E, 0x7F, 0xFE, 0x7F, 0x7F, 0x7F]
    assert E5M2.encode(x[2:]).tolist() == [0x7B, 0x7C, 0xFB, 0xFC, 0x7F, 0x7F]
    assert E5M6.encode(x[2:]).tolist() == [0x7BF, 0x7C0, 0xFBF, 0xFC0, 0x7FF, 0x7FF]
    assert E5M2.encode(torch.tensor([60000.0, 65504.0])).tolist() == [0x7B, 0x7B]  # finite: never inf
    spoiled = torch.tensor([math.nan]).to(torch.float8_e4m3fn).float()
    assert spoiled.isnan().all()  # the one thing out of range on which all agree


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_first(fmt, dtype):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(fmt.encode(x), fmt.encode(x.float()))


@pytest.mark.parametrize("call", [E4M3.encode, UE8M0.encode, ceil_power_of_two])
def test_float64_is_refused(call):
    with pytest.raises(ValueError, match=r"rounded twice.*\.float\(\)"):
        call(torch.ones(2, dtype=torch.float64))


def test_empty_and_scalar_shapes():
    assert E4M3.encode(torch.empty(0, 3)).shape == (0, 3)
    assert E4M3.encode(torch.tensor(1.0)).item() == 0x38
    assert E4M3.round(torch.tensor([0.3])).item() == 0.3125


def test_mantissa_carry_reaches_the_exponent():
    """What Triton's interpreter gets wrong: 124.3 is nearer to 128 than to 120; 3·2^−10 is a tie, and goes to even."""
    assert E4M3.round(torch.tensor([124.3, 500.0, 3 * 2.0**-10])).tolist() == [128.0, 448.0, 2.0**-8]


# Scales --------------------------------------------------------------------------------------------------------------
@given(random=words)
def test_ue8m0_encode_is_torchs(random):
    powers = UE8M0.table()[:255]
    x = torch.cat([from_bits(random), powers, powers * 1.25, powers[:-1] * 1.5, powers[:-1] * 1.75, -powers])
    x = torch.cat(
        [x, torch.nextafter(x, torch.tensor(0.0)), torch.nextafter(x, torch.tensor(math.inf)), torch.zeros(1)]
    )
    beyond = x.abs() >= 1.5 * 2.0**127
    ours, theirs = UE8M0.encode(x), x.to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(ours[~beyond], theirs[~beyond])
    finite = beyond & x.isfinite()
    assert (ours[finite] == 254).all() and (ours[beyond & ~x.isfinite()] == 255).all()


def test_ue8m0_codes_round_trip():
    codes = torch.arange(255).to(torch.uint8)
    assert torch.equal(UE8M0.encode(UE8M0.decode(codes)), codes)
    assert UE8M0.encode(torch.tensor([math.nan, math.inf, -math.inf])).tolist() == [255] * 3


@given(random=words)
def test_ceiling_is_the_smallest_power_that_holds_x(random):
    x = torch.cat([from_bits(random).abs(), from_bits([0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x7F000000, 0x7F800000])])
    x = x[~x.isnan() & (x <= 2.0**127)]
    up = ceil_power_of_two(x)
    assert (up >= x).all() and ((up / 2 < x) | (up == 2.0**-126)).all()
    assert (torch.frexp(up).mantissa == 0.5).all() and (up >= 2.0**-126).all()


def test_ceiling_of_what_is_no_scale():
    x = torch.tensor([math.nan, math.inf, 1.5 * 2.0**127, -3.0])
    assert ceil_power_of_two(x).nan_to_num(-1, posinf=7).tolist() == [-1, 7, 7, 2.0**-126]


def test_nearest_power_of_two_lets_the_largest_value_overflow():
    """Why a scale needs the ceiling: amax = 600 wants 600/448 = 1.34; to nearest that is 1, and 600 no longer fits."""
    scale = torch.tensor([600.0 / 448])
    assert UE8M0.decode(UE8M0.encode(scale)).item() == 1.0 and ceil_power_of_two(scale).item() == 2.0


# Packing -------------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 4095), max_size=33), st.integers(1, 3))
def test_packing_is_exact_and_small(codes, rows):
    one = torch.tensor(codes, dtype=torch.int16).expand(rows, -1)
    packed = pack12(one)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, math.ceil(1.5 * len(codes)))
    assert torch.equal(unpack12(packed, len(codes)), one)


def test_every_pair_position_carries_all_twelve_bits():
    codes = torch.arange(4096, dtype=torch.int16)
    pairs = torch.stack([codes, codes.flip(0)], -1)
    assert torch.equal(unpack12(pack12(pairs), 2), pairs)
    assert pack12(torch.tensor([0xABC, 0x123])).tolist() == [0xBC, 0x3A, 0x12]


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"5 codes of 12 bits are 8 bytes.*has 9"):
        unpack12(torch.zeros(9, dtype=torch.uint8), 5)
