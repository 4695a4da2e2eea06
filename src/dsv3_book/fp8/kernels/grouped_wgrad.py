"""Weight gradients of all experts: each contracts its own tokens, which lie in its room of both operands' columns."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float8e4m3fn, Int
from torch import Tensor

from dsv3_book.fp8.kernels.contract import contract, place, store
from dsv3_book.fp8.kernels.groups import group_starts, levels, tile_starts
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
def grouped_wgrad_kernel(
    a_tma, b_tma, a, a_scale, b, b_scale, c, starts, M, N, R, E, a_stride, b_stride, size_class,
    B_BLOCKS: tl.constexpr, LEVELS: tl.constexpr, BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """C [E, M, N]. A room is whole tiles of 128 tokens, its unused places are zeros: no tile of K holds two experts'
    tokens, and none needs a mask. An expert without tokens has a room of no tiles, and its sums stay zero."""
    if SPECIALISED:  # the compiler gives each half of the rows its own descriptor, so it must see ours being made
        a_tma = tl.make_tensor_descriptor(a, [M, R], [a_stride, 1], [BLOCK_M, 128])
        b_tma = tl.make_tensor_descriptor(b, [N, R], [b_stride, 1], [BLOCK_N, 128])
    WIDTH: tl.constexpr = 2 * BLOCK_N if WIDE else BLOCK_N
    tiles_m, tiles_n, tiles_r = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH), tl.cdiv(R, 128)
    rooms = tile_starts(starts, 128, LEVELS)
    for unit in tl.range(
        tl.program_id(0),
        E * tiles_m * tiles_n,
        tl.num_programs(0),
        flatten=not SPECIALISED,
        warp_specialize=SPECIALISED,
    ):
        expert = unit // (tiles_m * tiles_n)
        tile_m, tile_n = place(unit % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
        row, column = tile_m * BLOCK_M, tile_n * WIDTH
        first, last = tl.load(rooms + expert), tl.minimum(tl.load(rooms + expert + 1), tiles_r)
        left, right = contract(
            a_tma, row, a_scale, row, M, b_tma, column, b_scale, column, N, tiles_r, first, last,
            BLOCK_M, BLOCK_N, WIDE, B_BLOCKS,
        )  # fmt: skip
        gradient = c + expert.to(tl.int64) * M * N
        store(gradient, left, row, M, column, N, N, BLOCK_M, BLOCK_N)
        if WIDE:
            store(gradient, right, row, M, column + BLOCK_N, N, N, BLOCK_M, BLOCK_N)


def grouped_wgrad(
    a: Float8e4m3fn[Tensor, "M R"],
    a_scale: Float[Tensor, "M tiles"],
    b: Float8e4m3fn[Tensor, "N R"],
    b_scale: Float[Tensor, "N tiles"],
    counts: Int[Tensor, " E"],
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "E M N"]:
    """Per expert A·Bᵀ over its room, a and b from `quantize_columns(…, counts)`: [E, M, N]; zeros without tokens."""
    (M, R), N, E = a.shape, b.shape[0], len(counts)
    c = torch.empty(E, M, N, dtype=out_dtype, device=a.device)
    if not c.numel():
        return c
    if not R:
        return c.zero_()
    a, b, a_scale, b_scale = for_tma(a), for_tma(b), a_scale.contiguous(), b_scale.contiguous()

    def units(shape: dict[str, Any]) -> int:
        return E * triton.cdiv(M, shape["BLOCK_M"]) * triton.cdiv(N, width(shape))

    with on_device_of(a):
        allocate_descriptors()
        grouped_wgrad_kernel[programs(a.device, units)](
            descriptor(a), descriptor(b), a, a_scale, b, b_scale, c, group_starts(counts, R), M, N, R, E, a.stride(0),
            b.stride(0), size_class(M), False, levels(E), BAND,
        )  # fmt: skip
    return c
