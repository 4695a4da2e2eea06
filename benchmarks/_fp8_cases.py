"""The products that `fp8_gemm.py` compares: operands, our kernel, its peers, and what the result should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _measure import DEVICE, Call
from torch import Tensor

from dsv3_book.fp8 import (
    dequantize_activation,
    dequantize_weight,
    kernels,
    quantize_activation,
    quantize_columns,
    quantize_weight,
)

# N×K of V3's linear layers: kv_a and q_a together, q_b, kv_b, o, an expert's up or gate, an expert's down.
WEIGHTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
# DeepGEMM's TFLOP/s on an H800, as published (PAPER §3): M = 4096, then grouped with 4 × 8192 rows.
DEEPGEMM = dict(zip(WEIGHTS, (1127, 1212, 775, 1520, 1410, 1168), strict=True))
DEEPGEMM_GROUPED = {(4096, 7168): 1346, (7168, 2048): 1214}
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One product of `kind`: [M, K] · [N, K]ᵀ, E times. Grouped and masked ones have M rows for each of E experts;
    Wgrad contracts K tokens for each, and M×N is the weight."""

    kind: str
    M: int
    N: int
    K: int
    E: int = 1
    published: int | None = None

    @property
    def flops(self) -> float:
        return 2.0 * self.E * self.M * self.N * self.K

    @property
    def moved(self) -> float:
        """The fewest bytes: codes and scales of both operands once, the result once."""
        M, N, K, E = self.M, self.N, self.K, self.E
        by_rows = "wgrad" in self.kind
        scales = 4 * E * (K / 128) * (M + (N if by_rows else N / 128))
        return E * ((M + N) * K + (4 if by_rows else 2) * M * N) + scales

    @property
    def title(self) -> str:
        rows = f"{self.E}×{self.M}" if self.E > 1 and "wgrad" not in self.kind else f"{self.M}"
        inner = f"{self.E}×{self.K}" if self.E > 1 and "wgrad" in self.kind else f"{self.K}"
        return f"{self.kind:13} {rows:>7} {self.N:>6} {inner:>7}"


def cases(small: bool) -> list[Case]:
    """The issue's shapes; or `small` ones, ragged on every side, for the interpreter."""
    if small:
        kinds = [("dense", 1), ("wgrad", 1), ("grouped", 3), ("masked", 2), ("grouped wgrad", 2)]
        return [Case(kind, 24, 80, 144, E) for kind, E in kinds]
    out = [
        Case("dense", M, N, K, 1, DEEPGEMM[N, K] if M == 4096 else None) for M in (4096, 128, 64) for N, K in WEIGHTS
    ]
    out += [Case("wgrad", N, K, 4096) for N, K in WEIGHTS]
    out += [Case("grouped", 8192, N, K, 4, value) for (N, K), value in DEEPGEMM_GROUPED.items()]
    out += [Case("masked", 256, N, K, 4) for N, K in DEEPGEMM_GROUPED]
    out += [Case("grouped wgrad", N, K, 8192, 4) for N, K in DEEPGEMM_GROUPED]
    return out


class Operands:
    """One set of random operands of a case. `sides()` are the competitors, `parts()` what the result should be."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, generator = case, torch.Generator(DEVICE).manual_seed(seed)
        E, M, N, K = case.E, case.M, case.N, case.K
        self.counts = torch.full((E,), K if "wgrad" in case.kind else M, dtype=torch.int64, device=DEVICE)
        self.ends = self.counts.cumsum(0).to(torch.int32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=BF16)

        if "wgrad" in case.kind:  # here x is the gradient of a layer's outputs, and w its inputs
            self.x, self.w = normal(E * K, M), normal(E * K, N)
            counts = self.counts if E > 1 else None
            self.a, self.b = (quantize_columns(t, counts) for t in (self.x, self.w))
        else:
            self.x, self.w = normal(E * M, K), normal(*(E, N, K) if E > 1 else (N, K))
            self.a, self.b = quantize_activation(self.x), quantize_weight(self.w)

    def sides(self) -> dict[str, Call]:
        """ours; bf16, torch.matmul or torch's grouped product, with bf16 results; scaled_mm, torch's own FP8 with the
        same scales, expert by expert where there are several. Our Wgrad writes fp32, as the trainer needs it."""
        x, w, (a, a_scale), (b, b_scale) = self.x, self.w, self.a, self.b
        E, M = self.case.E, self.case.M
        counts, ends = self.counts, self.ends
        match self.case.kind:
            case "dense":
                scaled = block_wise(a, a_scale, b, b_scale, BF16)
                return {
                    "ours": lambda: kernels.gemm(a, a_scale, b, b_scale, BF16),
                    "bf16": lambda: torch.matmul(x, w.t()),
                    "scaled_mm": scaled,
                }
            case "wgrad":
                scaled = block_wise(a, a_scale, b, b_scale, FP32)
                return {
                    "ours": lambda: kernels.gemm(a, a_scale, b, b_scale, FP32),
                    "bf16": lambda: torch.matmul(x.t(), w),
                    "scaled_mm": scaled,
                }
            case "grouped":
                rows = [slice(e * M, (e + 1) * M) for e in range(E)]
                each = [block_wise(a[r], a_scale[r], b[e], b_scale[e], BF16) for e, r in enumerate(rows)]
                return {
                    "ours": lambda: kernels.grouped_gemm(a, a_scale, b, b_scale, counts, BF16),
                    "bf16": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
                    "scaled_mm": lambda: [product() for product in each],
                }
            case "masked":
                a3, s3, x3 = (t.view(E, M, -1) for t in (a, a_scale, x))
                each = [block_wise(a3[e], s3[e], b[e], b_scale[e], BF16) for e in range(E)]
                return {
                    "ours": lambda: kernels.masked_gemm(a3, s3, b, b_scale, counts, BF16),
                    "bf16": lambda: torch.bmm(x3, w.transpose(1, 2)),
                    "scaled_mm": lambda: [product() for product in each],
                }
            case "grouped wgrad":
                rooms = list(self.rooms())
                each = [block_wise(a[:, r], a_scale[:, t], b[:, r], b_scale[:, t], FP32) for r, t in rooms]
                return {
                    "ours": lambda: kernels.grouped_wgrad(a, a_scale, b, b_scale, counts, FP32),
                    "bf16": lambda: F.grouped_mm(x.t(), w, offs=ends),
                    "scaled_mm": lambda: [product() for product in each],
                }
        raise ValueError(f"no such kind of product: {self.case.kind!r}")

    def rooms(self) -> Iterator[tuple[slice, slice]]:
        """Of each expert: the places of its tokens, and of their scales."""
        K, room = self.case.K, -(-self.case.K // 128)
        for e in range(self.case.E):
            yield slice(e * room * 128, e * room * 128 + K), slice(e * room, (e + 1) * room)

    def parts(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """(where in the result, A, B), dequantised: there it should be A·Bᵀ."""
        kind, E, M = self.case.kind, self.case.E, self.case.M
        if "wgrad" in kind:
            for e, (room, tiles) in enumerate(self.rooms()):
                values = (dequantize_activation(c[:, room], s[:, tiles]) for c, s in (self.a, self.b))
                yield (e if E > 1 else ...), *values
            return
        a, b = dequantize_activation(*self.a), dequantize_weight(*self.b).view(E, self.case.N, self.case.K)
        for e in range(E):
            rows = slice(e * M, (e + 1) * M)
            yield (e if kind == "masked" else rows), a[rows], b[e]


def block_wise(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Call:
    """torch's scaled_mm on the same codes and scales, the scales laid out beforehand as it wants them.

    It wants A's scales [M, K/128] and, by rows, B's [N, K/128] in column order; by blocks, B's as [K/128, N/128] in
    column order with K/128 rounded up to a multiple of 4. (torch 2.10 and newer, Hopper, cuBLAS 12.9 and newer.)
    """
    recipe = getattr(F, "ScalingType", None)
    by_rows = b_scale.shape[0] == b.shape[0]
    sa = a_scale.t().contiguous().t()
    sb = b_scale.t().contiguous().t() if by_rows else F.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t()

    def call() -> Tensor:
        if recipe is None:
            raise AttributeError(f"torch {torch.__version__} has no torch.nn.functional.ScalingType")
        kind_b = recipe.BlockWise1x128 if by_rows else recipe.BlockWise128x128
        return F.scaled_mm(a, b.t(), sa, recipe.BlockWise1x128, sb, kind_b, output_dtype=dtype)

    return call
