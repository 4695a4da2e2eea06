"""Each expert's rows times that expert's weight: rows sorted by expert, or a room of the same size for each expert.

Nothing here looks at the counts from the CPU: the kernels are persistent, and every program finds out on the GPU which
expert its next tile belongs to and how many rows are real.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float8e4m3fn, Int
from torch import Tensor

from dsv3_book.fp8.kernels.contract import contract, place, store
from dsv3_book.fp8.kernels.groups import expert_of, group_starts, levels, tile_starts
from dsv3_book.fp8.kernels.launch import on_device_of
from dsv3_book.fp8.kernels.tuning import (
    BAND,
    allocate_descriptors,
    autotuned,
    descriptor,
    for_tma,
    programs,
    size_class,
    width,
)


@autotuned
@triton.jit
def grouped_gemm_kernel(
    a_tma, b_tma, a, a_scale, b, b_scale, c, starts, M, N, K, E, a_stride, b_stride, size_class,
    B_BLOCKS: tl.constexpr, LEVELS: tl.constexpr, BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """The contiguous layout. Tiles are numbered expert after expert, and none belongs to two: an expert's last tile may
    reach into the next one's rows, but writes only its own."""
    if SPECIALISED:  # the compiler gives each half of the rows its own descriptor, so it must see ours being made
        a_tma = tl.make_tensor_descriptor(a, [M, K], [a_stride, 1], [BLOCK_M, 128])
        b_tma = tl.make_tensor_descriptor(b, [E * N, K], [b_stride, 1], [BLOCK_N, 128])
    WIDTH: tl.constexpr = 2 * BLOCK_N if WIDE else BLOCK_N
    tiles_n, tiles_k = tl.cdiv(N, WIDTH), tl.cdiv(K, 128)
    tile_line = tile_starts(starts, BLOCK_M, LEVELS)
    units = tl.load(tile_line + (1 << LEVELS)) * tiles_n
    for unit in tl.range(
        tl.program_id(0), units, tl.num_programs(0), flatten=not SPECIALISED, warp_specialize=SPECIALISED
    ):
        expert = expert_of(tile_line, unit // tiles_n, LEVELS)
        first_tile, next_tile = tl.load(tile_line + expert), tl.load(tile_line + expert + 1)
        tile_m, tile_n = place(unit - first_tile * tiles_n, next_tile - first_tile, tiles_n, BAND)
        row, column = tl.load(starts + expert) + tile_m * BLOCK_M, tile_n * WIDTH
        rows_end = tl.load(starts + expert + 1)
        scales = b_scale + expert.to(tl.int64) * tl.cdiv(N, 128) * tiles_k
        left, right = contract(
            a_tma, row, a_scale, row, rows_end, b_tma, expert * N + column, scales, column, N, tiles_k, 0, tiles_k,
            BLOCK_M, BLOCK_N, WIDE, B_BLOCKS,
        )  # fmt: skip
        store(c, left, row, rows_end, column, N, N, BLOCK_M, BLOCK_N)
        if WIDE:
            store(c, right, row, rows_end, column + BLOCK_N, N, N, BLOCK_M, BLOCK_N)


@autotuned
@triton.jit
def masked_gemm_kernel(
    a_tma, b_tma, a, a_scale, b, b_scale, c, counts, room, N, K, E, a_stride, b_stride, size_class,
    B_BLOCKS: tl.constexpr, BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """The masked layout: expert e has rows e·room … e·room + counts[e] - 1 of A; the other rows of C become zeros.
    Tiles without a real row contract nothing."""
    if SPECIALISED:
        a_tma = tl.make_tensor_descriptor(a, [E * room, K], [a_stride, 1], [BLOCK_M, 128])
        b_tma = tl.make_tensor_descriptor(b, [E * N, K], [b_stride, 1], [BLOCK_N, 128])
    WIDTH: tl.constexpr = 2 * BLOCK_N if WIDE else BLOCK_N
    tiles_m, tiles_n, tiles_k = tl.cdiv(room, BLOCK_M), tl.cdiv(N, WIDTH), tl.cdiv(K, 128)
    for unit in tl.range(
        tl.program_id(0),
        E * tiles_m * tiles_n,
        tl.num_programs(0),
        flatten=not SPECIALISED,
        warp_specialize=SPECIALISED,
    ):
        expert = unit // (tiles_m * tiles_n)
        tile_m, tile_n = place(unit % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
        row, column = expert * room + tile_m * BLOCK_M, tile_n * WIDTH
        real_end = expert * room + tl.load(counts + expert).to(tl.int32)
        last = tl.where(row < real_end, tiles_k, 0)
        scales = b_scale + expert.to(tl.int64) * tl.cdiv(N, 128) * tiles_k
        left, right = contract(
            a_tma, row, a_scale, row, real_end, b_tma, expert * N + column, scales, column, N, tiles_k, 0, last,
            BLOCK_M, BLOCK_N, WIDE, B_BLOCKS,
        )  # fmt: skip
        real = (row + tl.arange(0, BLOCK_M) < real_end)[:, None]  # what lies in other rows can be anything, even NaN
        store(c, tl.where(real, left, 0.0), row, (expert + 1) * room, column, N, N, BLOCK_M, BLOCK_N)
        if WIDE:
            store(c, tl.where(real, right, 0.0), row, (expert + 1) * room, column + BLOCK_N, N, N, BLOCK_M, BLOCK_N)


def grouped_gemm(
    a: Float8e4m3fn[Tensor, "S K"],
    a_scale: Float[Tensor, "S tiles"],
    b: Float8e4m3fn[Tensor, "E N K"],
    b_scale: Float[Tensor, "E row_tiles tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "S N"]:
    """Rows of a, sorted by expert, times that expert's b[e]ᵀ: [S, N]. Arguments as `fp8.gemm.grouped_fp8_gemm` checks
    them; counts stay on the device."""
    (S, K), (E, N, _) = a.shape, b.shape
    c = torch.empty(S, N, dtype=out_dtype, device=a.device)
    if not c.numel():
        return c
    if not K:
        return c.zero_()
    a, b, a_scale, b_scale = for_tma(a), for_tma(b.reshape(E * N, K)), a_scale.contiguous(), b_scale.contiguous()

    def units(shape: dict[str, Any]) -> int:  # no more than there would be if every expert's last tile had one row
        return (triton.cdiv(S, shape["BLOCK_M"]) + E) * triton.cdiv(N, width(shape))

    with on_device_of(a):
        allocate_descriptors()
        grouped_gemm_kernel[programs(a.device, units)](
            descriptor(a), descriptor(b), a, a_scale, b, b_scale, c, group_starts(counts, S), S, N, K, E, a.stride(0),
            b.stride(0), size_class(S // E), True, levels(E), BAND,
        )  # fmt: skip
    return c


def masked_gemm(
    a: Float8e4m3fn[Tensor, "E room K"],
    a_scale: Float[Tensor, "E room tiles"],
    b: Float8e4m3fn[Tensor, "E N K"],
    b_scale: Float[Tensor, "E row_tiles tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "E room N"]:
    """The first counts[e] rows of a[e] times b[e]ᵀ, then zeros: [E, room, N]."""
    (E, room, K), N = a.shape, b.shape[1]
    c = torch.empty(E, room, N, dtype=out_dtype, device=a.device)
    if not c.numel():
        return c
    if not K:
        return c.zero_()
    a, b = for_tma(a.reshape(E * room, K)), for_tma(b.reshape(E * N, K))
    a_scale, b_scale = a_scale.contiguous(), b_scale.contiguous()

    def units(shape: dict[str, Any]) -> int:
        return E * triton.cdiv(room, shape["BLOCK_M"]) * triton.cdiv(N, width(shape))

    with on_device_of(a):
        allocate_descriptors()
        masked_gemm_kernel[programs(a.device, units)](
            descriptor(a), descriptor(b), a, a_scale, b, b_scale, c, counts.contiguous(), room, N, K, E, a.stride(0),
            b.stride(0), size_class(room), True, BAND,
        )  # fmt: skip
    return c
