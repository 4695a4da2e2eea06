"""What every quantiser does to a tile: its scale, and its numbers divided by the scale.

The rule, for a tile of any shape (`reference.py` says the same with torch, and both give the same bits):

    amax  = the largest finite |x|           NaN and ±inf don't spoil their neighbours' scale
    scale = max(amax / 448, 2^-126)          448 is the largest e4m3; rounded up to a power of two if asked
    code  = e4m3(x / scale)                  NaN and ±inf become the code NaN
"""

import triton
import triton.language as tl

from dsv3_book.fp8.kernels.casts import INTERPRETED, to_e4m3


@triton.jit
def finite_or_zero(x):
    """x where it is finite, else 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def tile_scale(amax, POW2: tl.constexpr):
    """The scale of a tile whose largest finite magnitude is amax: amax / 448 correctly rounded, never below 2^-126."""
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)
    if POW2:  # any mantissa bit set: the next power of two
        scale = ((scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def divide(x, scale, POW2: tl.constexpr):
    """x / scale as IEEE division rounds it, where the result matters (quotients under 2^-12 become the code 0 anyway).

    A division costs a GPU about ten instructions, more than the memory leaves time for. But a whole tile has one
    divisor, so its reciprocal is computed once (`scale` has fewer elements than x), and each quotient is an estimate
    and one correction with the exact remainder, three instructions:

        q = x·r,   remainder = x - q·scale,   x / scale = q + remainder·r

    With r correctly rounded this is the correctly rounded quotient (Markstein's theorem; see the test), as long as the
    remainder does not underflow. Tiles with tiny scales are moved away from there by a power of two, exactly.
    """
    if INTERPRETED:  # its tl.fma rounds twice
        return tl.div_rn(x, scale)
    if POW2:
        return x * tl.div_rn(1.0, scale)  # exact
    shift = tl.where(scale < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)  # scale < 2^-64: 2^64
    x, scale = x * shift, scale * shift
    reciprocal = tl.div_rn(1.0, scale)
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)


@triton.jit
def encode(x, scale, POW2: tl.constexpr):
    """The codes of fp32 x, whose scale broadcasts to it. |x / scale| is at most 448·(1 + 2^-23), which rounds to the
    code of 448: nothing is left to clamp."""
    quotient = divide(finite_or_zero(x), scale, POW2)
    return to_e4m3(tl.where(tl.abs(x) < float("inf"), quotient, float("nan")))
