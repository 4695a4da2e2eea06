"""Products of FP8 matrices with tile scales: C = A·Bᵀ, dense, grouped by expert, and for weight gradients (§3.3.2).

A is [M, K] with a scale per row and 128 of K. B is [N, K] with a scale per 128×128 block (a weight), or per row and 128
of K (Wgrad, where both sides are activations or gradients). Sums are fp32: every 128 of K the partial sum leaves the
tensor core and is added, times both scales, to an fp32 accumulator. M, N and K can be any number.

Raises ValueError, naming the operand, for other dtypes, scales of another shape, inner sizes that differ, counts that
do not add up, and operands on different devices.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float8e4m3fn, Int
from torch import Tensor

from dsv3_book.fp8 import operators
from dsv3_book.fp8.quantize import at_hand, check_axes, check_codes, check_counts, same_device
from dsv3_book.fp8.reference import tiles, total_rooms

OUTPUTS = (torch.bfloat16, torch.float32)


def fp8_gemm(
    a: Float8e4m3fn[Tensor, "M K"],
    a_scale: Float[Tensor, "M tiles"],
    b: Float8e4m3fn[Tensor, "N K"],
    b_scale: Float[Tensor, "row_tiles tiles"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "M N"]:
    """A·Bᵀ [M, N]; b_scale [⌈N/128⌉, ⌈K/128⌉] or [N, ⌈K/128⌉]."""
    _check_operands(a, "M K", b, "N K", out_dtype)
    (M, K), N = a.shape, b.shape[0]
    check_codes("a", a, a_scale, (M, tiles(K)))
    rows = N if b_scale.shape[:1] == (N,) else tiles(N)
    check_codes("b", b, b_scale, (rows, tiles(K)))
    same_device(a, b)
    return operators.gemm(a, a_scale, b, b_scale, out_dtype)


def grouped_fp8_gemm(
    a: Float8e4m3fn[Tensor, "S K"],
    a_scale: Float[Tensor, "S tiles"],
    b: Float8e4m3fn[Tensor, "E N K"],
    b_scale: Float[Tensor, "E row_tiles tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "S N"]:
    """The contiguous layout: rows of A sorted by expert, the first counts[0] meet b[0], and so on. Counts can be 0."""
    _check_operands(a, "S K", b, "E N K", out_dtype)
    check_codes("a", a, a_scale, (a.shape[0], tiles(a.shape[1])))
    _check_experts(b, b_scale, counts)
    check_counts(counts, a.shape[0], a.device)
    same_device(a, b)
    return operators.grouped_gemm(a, a_scale, b, b_scale, counts, out_dtype)


def masked_fp8_gemm(
    a: Float8e4m3fn[Tensor, "E room K"],
    a_scale: Float[Tensor, "E room tiles"],
    b: Float8e4m3fn[Tensor, "E N K"],
    b_scale: Float[Tensor, "E row_tiles tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "E room N"]:
    """The masked layout, for decoding: every expert has the same room, of which counts[e] rows are real; the others
    give zeros."""
    _check_operands(a, "E room K", b, "E N K", out_dtype)
    check_codes("a", a, a_scale, (*a.shape[:2], tiles(a.shape[2])))
    _check_experts(b, b_scale, counts)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"a has rooms for {a.shape[0]} experts, but b holds {b.shape[0]}")
    check_counts(counts, None, a.device)
    if at_hand(counts) and bool((counts > a.shape[1]).any()):
        raise ValueError(f"counts {counts.tolist()} must not exceed the room of {a.shape[1]} rows")
    same_device(a, b)
    return operators.masked_gemm(a, a_scale, b, b_scale, counts, out_dtype)


def grouped_fp8_wgrad(
    a: Float8e4m3fn[Tensor, "N1 R"],
    a_scale: Float[Tensor, "N1 tiles"],
    b: Float8e4m3fn[Tensor, "N2 R"],
    b_scale: Float[Tensor, "N2 tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "E N1 N2"]:
    """Per expert A·Bᵀ over its room of tokens, both from `quantize_columns(…, counts)`; zeros for an expert without."""
    _check_operands(a, "N1 R", b, "N2 R", out_dtype)
    check_codes("a", a, a_scale, (a.shape[0], tiles(a.shape[1])))
    check_codes("b", b, b_scale, (b.shape[0], tiles(b.shape[1])))
    check_counts(counts, None, a.device)
    if at_hand(counts) and a.shape[1] != total_rooms(int(counts.sum()), len(counts)):
        raise ValueError(
            f"a has {a.shape[1]} places, but {int(counts.sum())} tokens of {len(counts)} experts have "
            f"{total_rooms(int(counts.sum()), len(counts))}: quantise both operands with these counts"
        )
    same_device(a, b)
    return operators.grouped_wgrad(a, a_scale, b, b_scale, counts, out_dtype)


def _check_operands(a: Tensor, a_axes: str, b: Tensor, b_axes: str, out_dtype: torch.dtype) -> None:
    check_axes("a", a, a_axes)
    check_axes("b", b, b_axes)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} differ in their last axis, which A·Bᵀ contracts: "
            f"{a.shape[-1]} against {b.shape[-1]}"
        )
    if out_dtype not in OUTPUTS:
        raise ValueError(f"out_dtype is {out_dtype}, expected torch.bfloat16 or torch.float32")


def _check_experts(b: Tensor, b_scale: Tensor, counts: Tensor) -> None:
    E, N, K = b.shape
    check_codes("b", b, b_scale, (E, tiles(N), tiles(K)))
    if counts.shape != (E,):
        raise ValueError(f"counts is {list(counts.shape)}, but b holds {E} experts: expected [{E}]")
