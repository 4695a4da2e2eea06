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
    scale = tl.maximum(divide(amax, 448.0), 1.1754943508222875e-38)
    if POW2:  # any mantissa bit set: the next power of two
        scale = ((scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def divide(x, scale):
    """x / scale as IEEE division rounds it, NaN where x is not finite. Exact down to quotients of 2^-12 (less becomes
    the code 0 anyway), and of 2^-126 for a scale of 2^-64 or more. `scale` broadcasts to x.

    A GPU has no instruction for division; an exact one takes it about ten, more than the memory leaves time for. But a
    whole tile has one divisor: its reciprocal r is computed once, and each quotient is an estimate and one correction
    by its exact error, three instructions:

        q = x·r,   error = q·scale - x,   x / scale = q - error·r

    The error is computed without rounding (that is what `fma` is for). With r correctly rounded, q - error·r, rounded
    once, is then the correctly rounded quotient (Markstein's theorem), unless the error underflows: where the scale is
    tiny, all is moved away from there by a power of two. ±inf becomes inf - inf, NaN. The signs are such that -0 stays
    -0.
    """
    if INTERPRETED:  # its fma rounds twice
        return tl.where(tl.abs(x) < float("inf"), tl.div_rn(x, scale), float("nan"))
    away = tl.where(scale < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)  # scale < 2^-64: 2^64
    scale *= away
    minus_x = x * -away
    minus_r = tl.div_rn(-1.0, scale)
    q = minus_x * minus_r
    return tl.fma(tl.fma(q, scale, minus_x), minus_r, q)


@triton.jit
def encode(x, scale):
    """The codes of fp32 x. No clamp: |x / scale| is at most 448·(1 + 2^-23), which rounds to 448."""
    return to_e4m3(divide(x, scale))
