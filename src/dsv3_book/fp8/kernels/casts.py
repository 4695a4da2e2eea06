"""Casts, in the one place where the interpreter needs help.

On a GPU these helpers are the hardware's own instructions. Triton's interpreter (`TRITON_INTERPRET=1`, the way to run a
kernel without a GPU) converts the small formats with NumPy code that is wrong in a few cases (Triton issue 8322):

    ============================  =======================  ==========
    cast                          the interpreter gives    right
    ============================  =======================  ==========
    124.3 -> e4m3                 64 (the carry is lost)   128
    1.0625 -> e4m3 (a tie)        1.125 (ties go up)       1 (to even)
    NaN -> e4m3                   384                      NaN
    e4m3 codes 0x7F, 0xFF         480, -480                NaN
    1.9999 -> bf16                1.992 (cut off)          2
    1.01e-39, a bf16 -> fp32      4.4e-39 (if subnormal)   1.01e-39
    ============================  =======================  ==========

So when `INTERPRETED` the same casts are computed from the bits, exactly; tests compare them with torch's own casts, and
another test turns red the day the interpreter is right, when every `if INTERPRETED` branch below can go.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Are the kernels of this process interpreted? Decided when Triton decorates them: at import, once and for all."""


@triton.jit
def to_e4m3(x):
    """fp32 -> e4m3, to nearest, ties to even. Beyond ±448 it stays at ±448, ±inf too; NaN becomes the code 0x7F.

    An e4m3 number is sign, 4 bits of exponent (bias 7) and 3 of mantissa; fp32 has 8 (bias 127) and 23.
    """
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal numbers: 20 of the 23 mantissa bits go. Adding just under half of the last bit kept (exactly half where
        # that bit is odd) rounds to nearest even; a carry walks into the exponent by itself. 120: the biases'
        # difference.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes count steps of 2^-9, which is the spacing of fp32 numbers at 2^14: an addition rounds for us.
        small = tl.where(magnitude < 0x3C800000, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = (small + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code | ((bits >> 31) << 7))
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)  # cvt.rn.satfinite.e4m3x2.f32: two numbers an instruction


@triton.jit
def four_e4m3(a, b, c, d):
    """The codes of four numbers in one word of 32 bits, a's in the lowest byte."""
    if INTERPRETED:
        return _byte(a) | _byte(b) << 8 | _byte(c) << 16 | _byte(d) << 24
    # Left to itself the compiler casts neighbours of one tensor two by two and then takes them apart again.
    return tl.inline_asm_elementwise(
        """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _byte(x):
    return to_e4m3(x).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def from_e4m3(codes):
    """e4m3 -> fp32, exactly."""
    value = codes.to(tl.float32)
    if INTERPRETED:
        is_nan = (codes.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
        value = tl.where(is_nan, float("nan"), value)
    return value


@triton.jit
def widen(x):
    """fp32, bf16 or fp16 -> fp32, exactly. A bf16 is the upper half of an fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> fp32, bf16 or fp16, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
