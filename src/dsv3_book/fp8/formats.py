"""The small number formats, bit by bit: E4M3, E5M2, E5M6 and UE8M0 as exact codecs (report §3.3; OCP FP8 1.0, MX 1.0).

A *code* is the integer whose bits are the number: sign, exponent, mantissa. Every value of every format is also an
fp32, so decoding is exact, and encoding is one rounding: to the nearest value, ties to the even code. Codes are uint8
(int16 for 12 bits); ``codes.view(torch.float8_e4m3fn)`` turns E4M3's into torch's own type, without a copy.

Out of range, where torch's versions and devices differ from each other, this is the rule here:

=========  ============================  ==================  ============
format     finite, beyond ``max``        ±inf                NaN
=========  ============================  ==================  ============
E4M3       ±448                          NaN (it has no inf) 0x7F
E5M2       ±57344                        ±inf                0x7F
E5M6       ±65024                        ±inf                0x7FF
UE8M0      2^127                         NaN (255)           255
=========  ============================  ==================  ============
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Integer, UInt8
from torch import Tensor

FP32_BIAS, FP32_MANTISSA = 127, 23


@dataclass(frozen=True)
class Format:
    """A format with a sign, an exponent field e and m mantissa bits: value = ±(1 + mantissa/2^m) · 2^(e − bias).

    Where e is 0 the value is subnormal: ±(mantissa/2^m) · 2^(1 − bias), without the leading 1.

    Args:
        bias: what is taken from the exponent field. 2^(exponent_bits − 1) − 1 for all formats here.
        has_inf: the top exponent is kept for inf and NaN, as in IEEE 754. E4M3 keeps only the all-ones code, for NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_inf: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def nan(self) -> int:
        """The code that encode writes for NaN: all ones behind a zero sign."""
        return (1 << (self.bits - 1)) - 1

    @property
    def top(self) -> int:
        """The code of the largest finite value."""
        return self.nan - (1 << self.mantissa_bits) if self.has_inf else self.nan - 1

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self._magnitude(self.top)

    @property
    def min_normal(self) -> float:
        """The smallest value with full precision; below it, neighbours keep their distance."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value, and the distance between neighbours below 2·min_normal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def encode(self, x: Float[Tensor, "*n"]) -> Integer[Tensor, "*n"]:
        """Codes of x: nearest value, ties to even, finite values beyond `max` become ±`max`. bf16 and fp16 are widened.

        Raises:
            ValueError: x is float64 (rounding it to fp32 first would round twice).
        """
        x = _fp32(x)
        size = x.abs()
        drop = FP32_MANTISSA - self.mantissa_bits
        # Normal values: the fp32's own bits with another bias, cut after m mantissa bits. Adding just under a half of
        # what is cut, plus the last kept bit, rounds to nearest even; a full mantissa's carry runs into the exponent.
        bits = size.view(torch.int32) - ((FP32_BIAS - self.bias) << FP32_MANTISSA)
        normal = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
        # Subnormal values are multiples of the smallest one, and the multiple is the code (2^m is min_normal's code).
        subnormal = (size.clamp(max=self.min_normal) / self.min_subnormal).round().int()
        code = torch.where(size < self.min_normal, subnormal, normal.clamp(max=self.top))
        code = torch.where(size.isinf(), self.top + 1, code)  # E4M3: this is NaN's code
        code = code | (x.signbit().int() << (self.bits - 1))
        spoiled = x.isnan() if self.has_inf else ~x.isfinite()
        return torch.where(spoiled, self.nan, code).to(_code_dtype(self.bits))

    def decode(self, codes: Integer[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
        """The exact values of codes, by looking them up in `table`.

        Raises:
            ValueError: `codes` are floating-point numbers, as torch takes its own 8-bit types to be.
        """
        return _table(self).to(codes.device)[_integers(codes)]

    def round(self, x: Float[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
        """The values that x becomes: encode, then decode."""
        return self.decode(self.encode(x))

    def table(self) -> Float32[Tensor, " codes"]:
        """The value of each code, 0 … 2^bits − 1."""
        return _table(self).clone()

    def fields(self, code: int) -> str:
        """A code's bits, with its fields apart: ``0 1111 110``."""
        text = f"{code:0{self.bits}b}"
        return f"{text[0]} {text[1 : 1 + self.exponent_bits]} {text[1 + self.exponent_bits :]}"

    def _magnitude(self, code: int) -> float:
        """By the definition: Python's doubles hold every value exactly."""
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if code > self.top:
            return float("inf") if self.has_inf and mantissa == 0 else float("nan")
        hidden = 1 << self.mantissa_bits if exponent else 0
        return (hidden + mantissa) * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)


@dataclass(frozen=True)
class ScaleFormat:
    """UE8M0: eight exponent bits, no sign, no mantissa. Code c is 2^(c − 127), 255 is NaN: for scales (OCP MX 1.0)."""

    name: str = "UE8M0"
    bits: int = 8
    nan: int = 255
    max: float = 2.0**127
    min: float = 2.0**-127

    def encode(self, x: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
        """The nearest power of two (1.5·2^k goes up), as torch's cast. A scale needs `ceil_power_of_two` instead.

        The sign is dropped, as torch does; 0 becomes 2^−127; NaN and ±inf become 255. Everything strictly between
        2^−127 and 2^−126, where fp32 is subnormal, goes up, as torch. From 1.5·2^127 on it saturates (torch: NaN).
        """
        x = _fp32(x)
        bits = x.abs().view(torch.int32)
        code = bits >> FP32_MANTISSA
        half = bits & 0x400000 != 0
        above = bits & 0x3FFFFF != 0
        code = (code + (half & (above | (code > 0))).int()).clamp(max=254)
        return torch.where(x.isfinite(), code, 255).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
        """2^(code − 127), exactly; 255 is NaN."""
        return self.table().to(codes.device)[_integers(codes)]

    def table(self) -> Float32[Tensor, " codes"]:
        """The value of each code, 0 … 255."""
        return torch.tensor([2.0 ** (c - 127) for c in range(255)] + [float("nan")], dtype=torch.float32)


E4M3 = Format("E4M3", exponent_bits=4, mantissa_bits=3, bias=7, has_inf=False)
E5M2 = Format("E5M2", exponent_bits=5, mantissa_bits=2, bias=15)
E5M6 = Format("E5M6", exponent_bits=5, mantissa_bits=6, bias=15)
UE8M0 = ScaleFormat()


def ceil_power_of_two(x: Float[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
    """The smallest normal power of two ≥ x, as fp32: 2^−126 … 2^127, inf beyond; NaN stays NaN.

    A scale must be rounded *up*: to nearest it may shrink by a third, and a tile's largest value, divided by it, would
    stand as far as 1.5 · 448, where it is clipped. On the bits: any mantissa at all carries into the exponent.
    """
    x = _fp32(x)
    bits = (x.clamp(min=2.0**-126).view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def pack12(codes: Integer[Tensor, "*n K"]) -> UInt8[Tensor, "*n bytes"]:
    """Two 12-bit codes a, b in three bytes: low 8 bits of a · high 4 of a, low 4 of b above them · high 8 of b.

    ceil(1.5·K) bytes: an odd last code takes two.
    """
    K = codes.shape[-1]
    both = torch.nn.functional.pad(codes.int(), (0, K % 2)).unflatten(-1, (-1, 2))
    a, b = both.unbind(-1)
    packed = torch.stack([a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4], -1).to(torch.uint8)
    return packed.flatten(-2)[..., : (3 * K + 1) // 2].contiguous()


def unpack12(packed: UInt8[Tensor, "*n bytes"], length: int) -> Integer[Tensor, "*n K"]:
    """The `length` codes that `pack12` packed, int16.

    Raises:
        ValueError: `length` codes don't make that many bytes.
    """
    if packed.shape[-1] != (3 * length + 1) // 2:
        raise ValueError(
            f"{length} codes of 12 bits are {(3 * length + 1) // 2} bytes, but the last axis has {packed.shape[-1]}: "
            "give the length that was packed"
        )
    triples = torch.nn.functional.pad(packed.int(), (0, length % 2)).unflatten(-1, (-1, 3))
    x, y, z = triples.unbind(-1)
    codes = torch.stack([x | ((y & 0xF) << 8), (y >> 4) | (z << 4)], -1)
    return codes.flatten(-2)[..., :length].to(torch.int16)


def _fp32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise ValueError("float64 would be rounded twice, to fp32 and to the format: cast it with .float() yourself")
    return x.detach().to(torch.float32)


def _integers(codes: Tensor) -> Tensor:
    if codes.is_floating_point():
        raise ValueError(f"codes are {codes.dtype}, expected integers: of an 8-bit type, give codes.view(torch.uint8)")
    return codes.long()


def _code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int16


@functools.cache
def _table(fmt: Format) -> Tensor:
    half = [fmt._magnitude(code) for code in range(1 << (fmt.bits - 1))]
    return torch.tensor(half + [-value for value in half], dtype=torch.float32)
