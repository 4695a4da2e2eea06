"""Graders of chapter 8: a code's value, scales never too small, tiles with an edge, weights back, a narrow sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader, same
from dsv3_book.exercises.rope import tensor_judge
from dsv3_book.fp8.formats import E4M3, ceil_power_of_two


# One code ------------------------------------------------------------------------------------------------------------
def _decode(code: int, bias: int = 7, subnormal: bool = True, nan: bool = True) -> float:
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if nan and code & 127 == 127:
        return math.nan
    if exponent == 0 and subnormal:
        size = mantissa / 8 * 2.0 ** (1 - bias)
    else:
        size = (1 + mantissa / 8) * 2.0 ** (exponent - bias)
    return -size if sign else size


def _decode_no_subnormal() -> Solution:
    return lambda code: _decode(code, subnormal=False)


def _decode_bias() -> Solution:
    return lambda code: _decode(code, bias=8)


def _decode_ieee() -> Solution:
    return lambda code: math.copysign(math.inf, 64 - code // 128 * 128) if (code >> 3) & 15 == 15 else _decode(code)


def _decode_no_nan() -> Solution:
    return lambda code: _decode(code, nan=False)


def _number(expected: float) -> Callable[[Any], str | None]:
    if math.isnan(expected):
        return lambda answer: None if math.isnan(answer) else f"returned  {answer}\nexpected  nan"
    return same(expected)


@grader(
    "fp8.decode",
    minutes=10,
    reference=lambda: _decode,
    wrong={
        "subnormal": _decode_no_subnormal,
        "bias": _decode_bias,
        "no infinity": _decode_ieee,
        "NaN": _decode_no_nan,
    },
)
def decode() -> Iterator[Case]:
    """An E4M3 code, 0 … 255, as a number."""
    small = "Exponent field 0 is subnormal: no leading 1, and the exponent is 1 − bias."
    for code, says, hint in (
        (0b0_0111_000, "one: exponent field 7, mantissa 0", "The bias is 7: an exponent field of 7 is 2^0."),
        (0b1_1000_100, "−3: the sign, and a mantissa of 4/8", "The sign is the top bit; 1 + 4/8 is 1.5."),
        (0b0_0000_001, "the smallest one, 2^−9", small),
        (0b0_1111_110, "the largest one", "There is no infinity in E4M3: exponent field 15 counts like any other."),
        (0b1_1111_111, "seven ones", "The code whose seven lower bits are all ones is NaN, with either sign."),
    ):
        yield Case((code,), _number(_decode(code)), says=says, hint=hint)


# A scale that is never too small -------------------------------------------------------------------------------------
def _by_log(rounding: Callable[[Tensor], Tensor]) -> Solution:
    return lambda x: torch.exp2(rounding(torch.log2(x)))


def _next_power() -> Solution:
    return lambda x: torch.exp2(torch.floor(torch.log2(x)) + 1)


@grader(
    "fp8.scale_up",
    minutes=15,
    level="medium",
    reference=lambda: ceil_power_of_two,
    wrong={
        "nearest": lambda: _by_log(torch.round),
        "already a power": _next_power,
        "logarithm": lambda: _by_log(torch.ceil),
    },
)
def scale_up() -> Iterator[Case]:
    """The smallest power of two that is no less than x (fp32, positive, normal)."""
    x = torch.tensor([1.25, 3.0, 0.3, 1e-20])
    hint = "Up, not to the nearest: a scale below the one you need makes the tile's largest value overflow."
    yield Case((x,), same(ceil_power_of_two(x)), says="between two powers", hint=hint)
    x = torch.tensor([1.0, 0.25, 2.0**100])
    yield Case((x,), same(x), says="powers stay", hint="What is already a power of two must not be doubled.")
    powers = torch.tensor([2.0**20, 2.0**-40, 2.0**64])
    hint = (
        "In fp32 the logarithm of such a number rounds to a whole one. Use the bits: "
        "`x.view(torch.int32)` has the exponent above 23 bits of mantissa, and any mantissa must carry into it."
    )
    x = torch.nextafter(powers, torch.tensor(math.inf))
    yield Case((x,), same(2 * powers), says="one bit above a power", hint=hint)


# Tiles ---------------------------------------------------------------------------------------------------------------
Rows = tuple[Tensor, Tensor]


def _rows(x: Tensor, tile: int, top: float = 448.0, floor: float = 2.0**-126) -> Rows:
    scale = torch.stack([t.abs().amax(-1) / top for t in x.split(tile, dim=-1)], -1).clamp(min=floor)
    return E4M3.round(x / scale.repeat_interleave(tile, -1)[..., : x.shape[-1]]), scale


def _judge_rows(expected: Rows) -> Callable[[Any], str | None]:
    def judge(answer: Any) -> str | None:
        if not (isinstance(answer, tuple) and len(answer) == 2):
            return "expected two tensors, (values on the E4M3 grid, scale)"
        values, scale = answer
        if problem := close(expected[1], atol=0)(scale):
            return f"the scale: {problem}"
        problem = close(expected[0])(values.float())
        return f"the values: {problem}" if problem else None

    return judge


@grader(
    "fp8.quantize_rows",
    minutes=20,
    level="medium",
    reference=lambda: _rows,
    wrong={
        "one scale for each tile": lambda: lambda x, tile: _rows(x, x.shape[-1]),
        "448": lambda: lambda x, tile: _rows(x, tile, top=1.0),
        "zeros": lambda: lambda x, tile: _rows(x, tile, floor=0.0),
    },
)
def quantize_rows() -> Iterator[Case]:
    """Values x / scale on the E4M3 grid, and the scales, of tiles along the last axis."""
    x = torch.tensor([[448.0, 2.0, -1.0, 0.0, 0.5, 0.26]])
    hint = "Cut the row into pieces: one scale for each tile, its largest magnitude / 448, so that this becomes 448."
    yield Case((x, 3), _judge_rows(_rows(x, 3)), says="two tiles of three", hint=hint)
    x = torch.linspace(-3, 5, 14).reshape(2, 7)
    hint = "The last tile of a row is short: its scale comes from what is there."
    yield Case((x, 4), _judge_rows(_rows(x, 4)), says="seven columns, tiles of four", hint=hint)
    x = torch.tensor([[0.0, 0.0, 1.0, 2.0]])
    hint = "The largest of a tile of zeros is 0, and 0 / 0 is NaN: let no scale fall below 2^−126."
    yield Case((x, 2), _judge_rows(_rows(x, 2)), says="a tile of zeros", hint=hint)


# Weights back --------------------------------------------------------------------------------------------------------
def _back(codes: Tensor, scale: Tensor, tile: int) -> Tensor:
    wide = scale.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


def _back_divided() -> Solution:
    return lambda codes, scale, tile: _back(codes, 1 / scale, tile)


def _back_turned() -> Solution:
    return lambda codes, scale, tile: _back(codes, scale.t().reshape(scale.shape), tile)


def _back_whole_only() -> Solution:
    def whole(codes: Tensor, scale: Tensor, tile: int) -> Tensor:
        rows, columns = (n // tile for n in codes.shape)
        out = codes.float()
        out[: rows * tile, : columns * tile] *= _back(torch.ones_like(out), scale, tile)[
            : rows * tile, : columns * tile
        ]
        return out

    return whole


@grader(
    "fp8.dequantize",
    minutes=10,
    reference=lambda: _back,
    wrong={"scales multiply": _back_divided, "rows of blocks": _back_turned, "short block": _back_whole_only},
)
def dequantize() -> Iterator[Case]:
    """A weight from its codes and `weight_scale_inv`."""
    whole = torch.arange(1.0, 17.0).reshape(4, 4)
    ragged = torch.arange(1.0, 16.0).reshape(3, 5)
    for values, scale, says in (
        (whole, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), "four whole blocks of 2×2"),
        (ragged, torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), "3×5 in blocks of 2×2"),
    ):
        args = (values.to(torch.float8_e4m3fn), scale, 2)
        mistakes = {
            "That divides. Whatever the name `weight_scale_inv` suggests, scales multiply.": _back_divided(),
            "scale[i, j] belongs to rows of blocks i and columns of blocks j.": _back_turned(),
            "The last, short block of an axis has a scale too.": _back_whole_only(),
        }
        judge = tensor_judge(_back(*args), {why: wrong(*args) for why, wrong in mistakes.items()})
        hint = "Give every element its block's scale: `repeat_interleave` along both axes, cut to the codes' shape."
        yield Case(args, judge, says=says, hint=hint)


# A narrow sum --------------------------------------------------------------------------------------------------------
Cut = Callable[[float], float]


def _add(register: float, products: list[float], bits: int, cut: Cut = math.trunc, seen: bool = True) -> float:
    terms = [t for t in [*products, register] if t]
    leading = [t for t in (terms if seen else products) if t]
    if not leading:
        return register
    unit = 2.0 ** (max(math.frexp(t)[1] - 1 for t in leading) - (bits - 1))
    total = sum(cut(t / unit) for t in terms)
    drop = 2.0 ** max(0, math.frexp(total)[1] - bits)
    return cut(total / drop) * drop * unit


def _narrow(register: float, products: list[float], bits: int) -> float:
    return _add(register, products, bits)


@grader(
    "fp8.narrow_add",
    minutes=30,
    level="hard",
    reference=lambda: _narrow,
    wrong={
        "not rounded": lambda: lambda r, p, bits: _add(r, p, bits, cut=round),
        "towards zero": lambda: lambda r, p, bits: _add(r, p, bits, cut=math.floor),
        "running sum": lambda: lambda r, p, bits: _add(r, p, bits, seen=False),
    },
)
def narrow_add() -> Iterator[Case]:
    """One step of the narrow accumulator, on plain floats."""
    up = "What is finer than the unit is cut, not rounded."
    zero = "Cutting goes towards zero: a negative number loses magnitude too. `math.trunc` does that, floor doesn't."
    seen = "The running sum takes part in looking for the largest exponent, and is cut to the unit like everybody."
    for register, products, bits, says, hint in (
        (0.0, [4.0, 1.0, 0.5], 4, "4 + 1 + 0.5 with 4 bits: the unit is 2^−1, all fit", seen),
        (0.0, [4.0, 1.0, 0.4375], 4, "0.4375 lies below the unit of 0.5", up),
        (0.0, [-4.0, -1.0, -0.4375], 4, "the same, negative", zero),
        (64.0, [1.0, 1.0, 7.0], 4, "the sum is 64 and the unit 8: nothing arrives", seen),
        (12.0, [3.0, 3.0, 3.0], 4, "21 = 10101 in binary has five bits: the result is cut as well", up),
        (0.0, [0.0, 0.0], 4, "nothing at all", "With no terms there is no largest exponent."),
    ):
        yield Case((register, products, bits), same(_narrow(register, products, bits)), says=says, hint=hint)
