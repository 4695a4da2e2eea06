"""A tensor core's narrow accumulator, bit by bit: the model of Hopper's FP8 sums that claim C11 is tested with.

**The model.** A·Bᵀ of E4M3 codes is summed along K in steps of 32 products. In one step, for one output:

1. Products are exact. A product's exponent is the sum of its factors' exponents (−6 for subnormals; zeros have none),
   so before normalisation its magnitude lies below 4 · 2^exponent. The running sum, normalised, has its own exponent.
2. All 33 are aligned to the largest of these exponents, e: each becomes a multiple of the unit 2^(e − (bits − 1)), and
   what is finer is cut off, towards zero (``toward="zero"``) or as a two's complement shift does (``toward="down"``).
3. The 33 multiples are added exactly: the adder has room for carries.
4. The result goes back to the register normalised, cut to `bits` significant bits in the same way.

With ``promote_every=128`` the register is added to an fp32 number every 128 products (rounded to nearest) and starts
again from zero, which is the report's repair (§3.3.2). There is no other rounding.

**What is known, and what is ours.** The report (§3.3.2, §3.5.2) gives: 32 products aligned by right shifts to the
largest exponent, the highest 14 bits kept, the rest truncated, sums kept in registers of that precision, an error up
to about 2 % at K = 4096. arXiv 2411.10958 measured a register of one sign, eight exponent and 13 mantissa
bits, whose further bits are cut: 14 significant bits, `bits=14` here. arXiv 2511.10909 and 2512.07004 publish models
that agree with an H100 bit for bit, of this kind. Ours was written from the report's description, was *not* compared
with a GPU, and points 1 (exponents before normalisation), 3 and the direction of the cut are our reading of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

STEP = 32  # products that one fp8 wgmma (k32) sums at once
HOPPER_BITS = 14

Cut = Callable[[Tensor], Tensor]  # torch.trunc or torch.floor


def accumulate(
    a: Float8e4m3fn[Tensor, "M K"],
    b: Float8e4m3fn[Tensor, "N K"],
    bits: int = HOPPER_BITS,
    promote_every: int | None = None,
    step: int = STEP,
    toward: Literal["zero", "down"] = "zero",
) -> Float32[Tensor, "M N"]:
    """A·Bᵀ of codes (no scales) as a tensor core with a `bits`-bit accumulator sums it: exact under the model above.

    A short last step is padded with zeros, which changes nothing.

    Raises:
        ValueError: other dtypes; K that differ; NaN codes; bits outside 4 … 40; `promote_every` is no multiple of
            `step`.
    """
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is {codes.dtype}, expected torch.float8_e4m3fn: quantise it first")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} differ in their last axis, which A·Bᵀ contracts")
    if not 4 <= bits <= 40:
        raise ValueError(f"bits={bits}: the emulation is exact for 4 … 40 bits")
    if promote_every is not None and (promote_every < step or promote_every % step):
        raise ValueError(
            f"promote_every={promote_every} must be a multiple of step={step}: a step can't be interrupted"
        )
    wide = torch.float32 if bits <= 16 else torch.float64  # 33 multiples below 2^(bits+1) must add exactly
    cut = torch.trunc if toward == "zero" else torch.floor
    (av, ae), (bv, be) = _operand(a, step, wide), _operand(b, step, wide)  # [M or N, steps, step]
    if av.isnan().any() or bv.isnan().any():
        raise ValueError("a NaN code has no place in this model: sums with NaN are NaN on every machine")

    register = torch.zeros(a.shape[0], b.shape[0], dtype=wide, device=a.device)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for s in range(av.shape[1]):
        products = av[:, None, s] * bv[None, :, s]  # [M, N, step], exact
        register = add_step(register, products, ae[:, None, s] + be[None, :, s], bits, cut)
        if promote_every is not None and (s + 1) * step % promote_every == 0:
            total += register.float()
            register = torch.zeros_like(register)
    return total + register.float() if promote_every is not None else register.float()


def add_step(
    register: Float[Tensor, "M N"],
    products: Float[Tensor, "M N step"],
    exponents: Int[Tensor, "M N step"],
    bits: int,
    cut: Cut,
) -> Float[Tensor, "M N"]:
    """Points 2 to 4 of the model: what the register holds after one step's products."""
    largest = torch.maximum(exponents.amax(-1), _exponent(register))
    unit = _power_of_two(largest - (bits - 1))
    whole = cut(products / unit[..., None]).sum(-1) + cut(register / unit)
    return _significant(whole, bits, cut) * unit


def hopper_tolerance(K: int, guaranteed: bool = False) -> float:
    """How far a Hopper GEMM, promoted every 128, may be from exact: |C − exact| ≤ tolerance · ‖a_m‖ · ‖b_n‖.

    ‖a_m‖ and ‖b_n‖ are the fp64 norms of the dequantised row of A and row of B of that output. Derived from the model:

    *Guaranteed*, whatever the codes (zeros or normal numbers): a unit is at most 2^−13 of the largest product or of
    the partial sum, so of ‖a_g‖‖b_g‖ of the group (Cauchy–Schwarz). 128 products, 4 registers going in and 4 coming
    out lose less than one each, and 4 more cover second order. Over the groups, by Cauchy–Schwarz again, 140 · 2^−13
    = 1.7e-2 of ‖a‖‖b‖, plus K/128 · 2^−24 for fp32. It does not grow with K.

    *Expected*, for operands of mixed signs, outliers included: no product is larger than ‖a_g‖‖b_g‖, so a unit is at
    most 2^−13 of that; what is cut has no common sign, so 140 cuts add up to √140 units, and errors of groups add like
    √groups where norms add like groups. Twice that is returned, 2.9e-3 / √(K/128). The emulation stays below a half of
    it with one per cent of outliers 50 times larger, and far below without. Not checked on a GPU. Operands of one sign
    add up their errors instead (about 5e-4 at any large K): from K = 4096 on, take `guaranteed` for them.
    """
    groups = max(1.0, K / 128)
    fp32 = groups * 2.0**-24
    if guaranteed:
        return 140 * 2.0**-13 + fp32
    return 2 * 140**0.5 * 2.0**-13 / groups**0.5 + fp32


def _operand(codes: Tensor, step: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and exponents by steps, [rows, steps, step]; exponents of zeros are lower than any sum of two others."""
    values = torch.nn.functional.pad(codes.float(), (0, -codes.shape[1] % step)).unflatten(1, (-1, step))
    exponents = torch.where(values == 0, -100, _exponent(values).clamp(min=-6)).to(torch.int16)
    return values.to(wide), exponents


def _exponent(x: Tensor) -> Tensor:
    """floor(log2|x|), exactly; far below everything for 0."""
    return torch.where(x == 0, -100, torch.frexp(x).exponent - 1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, from its bits."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _significant(whole: Tensor, bits: int, cut: Cut) -> Tensor:
    """Integers cut to their `bits` leading bits."""
    drop = (_exponent(whole) - (bits - 1)).clamp(min=0)
    unit = _power_of_two(drop)
    return cut(whole / unit) * unit
