"""Dense C = A·Bᵀ of FP8 codes: A with 1×128 scales, B with 128×128 (a weight) or 1×128 scales (Wgrad)."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from dsv3_book.fp8.kernels.casts import narrow
from dsv3_book.fp8.kernels.contract import contract, place, store
from dsv3_book.fp8.kernels.launch import on_device_of
from dsv3_book.fp8.kernels.tuning import (
    BAND,
    allocate_descriptors,
    autotuned,
    descriptor,
    for_tma,
    programs,
    size_class,
    split_count,
    width,
)


@autotuned
@triton.jit
def gemm_kernel(
    a_tma, b_tma, a, a_scale, b, b_scale, c, M, N, K, a_stride, b_stride, size_class,
    B_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """A persistent kernel: as many programs as run at once, each takes every so-many-th tile.

    With SPLITS > 1 a unit of work is a tile over a part of K, and c holds the parts' sums, [SPLITS, M, N].
    """
    if SPECIALISED:  # the compiler gives each half of the rows its own descriptor, so it must see ours being made
        a_tma = tl.make_tensor_descriptor(a, [M, K], [a_stride, 1], [BLOCK_M, 128])
        b_tma = tl.make_tensor_descriptor(b, [N, K], [b_stride, 1], [BLOCK_N, 128])
    WIDTH: tl.constexpr = 2 * BLOCK_N if WIDE else BLOCK_N
    tiles_m, tiles_n, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH), tl.cdiv(K, 128)
    part = tl.cdiv(tiles_k, SPLITS)

    # Flattened, the loops over tiles and over K become one, and the next tile's loads start during this one's last
    # products. Specialised, the loading warps run ahead by themselves.
    units = tiles_m * tiles_n * SPLITS
    for unit in tl.range(
        tl.program_id(0), units, tl.num_programs(0), flatten=not SPECIALISED, warp_specialize=SPECIALISED
    ):
        split = unit % SPLITS
        tile_m, tile_n = place(unit // SPLITS, tiles_m, tiles_n, BAND)
        row, column = tile_m * BLOCK_M, tile_n * WIDTH
        first, last = split * part, tl.minimum((split + 1) * part, tiles_k)
        left, right = contract(
            a_tma, row, a_scale, row, M, b_tma, column, b_scale, column, N, tiles_k, first, last,
            BLOCK_M, BLOCK_N, WIDE, B_BLOCKS,
        )  # fmt: skip
        c_part = c + split.to(tl.int64) * M * N
        store(c_part, left, row, M, column, N, N, BLOCK_M, BLOCK_N)
        if WIDE:
            store(c_part, right, row, M, column + BLOCK_N, N, N, BLOCK_M, BLOCK_N)


@triton.jit
def sum_splits_kernel(parts, c, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """c = the sum of `parts` [SPLITS, size], in order: the same bits each time, which atomic additions don't give."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(c + at, narrow(total, c.dtype.element_ty), mask=at < size)


def gemm(
    a: Float8e4m3fn[Tensor, "M K"],
    a_scale: Float[Tensor, "M tiles"],
    b: Float8e4m3fn[Tensor, "N K"],
    b_scale: Float[Tensor, "row_tiles tiles"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "M N"]:
    """A·Bᵀ [M, N]; b_scale [⌈N/128⌉, ⌈K/128⌉] or [N, ⌈K/128⌉]. Arguments as `fp8.gemm.fp8_gemm` checks them.

    The copy engine wants rows that start at multiples of 16 bytes: an operand with other rows is copied first.
    """
    (M, K), N = a.shape, b.shape[0]
    c = torch.empty(M, N, dtype=out_dtype, device=a.device)
    if not c.numel():
        return c
    if not K:
        return c.zero_()
    by_blocks = b_scale.shape[0] != N or N == 1
    splits = split_count(M, N, K, a.device)
    target = c if splits == 1 else torch.empty(splits, M, N, device=a.device)
    a, b, a_scale, b_scale = for_tma(a), for_tma(b), a_scale.contiguous(), b_scale.contiguous()
    grid = programs(a.device, lambda shape: splits * triton.cdiv(M, shape["BLOCK_M"]) * triton.cdiv(N, width(shape)))
    with on_device_of(a):
        allocate_descriptors()
        gemm_kernel[grid](
            descriptor(a), descriptor(b), a, a_scale, b, b_scale, target, M, N, K, a.stride(0), b.stride(0),
            size_class(M), by_blocks, splits, BAND,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(M * N, 1024),)](target, c, M * N, splits, 1024)
    return c
