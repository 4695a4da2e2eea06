"""1×128 tiles: 128 numbers of a row share a scale. For activations and for the gradients of outputs (report §3.3.2)."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dsv3_book.fp8.kernels.casts import widen
from dsv3_book.fp8.kernels.launch import TILE, on_device_of
from dsv3_book.fp8.kernels.tiles import encode, finite_or_zero, tile_scale

TILES = 32
"""Tiles a program: 4096 numbers, 32 a thread, so each thread has 64 bytes of bf16 on their way to it at once."""


@triton.jit
def quantize_rows_kernel(
    x, codes, scale, K, tiles, POW2: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Tiles are numbered along the rows: neighbours in memory are neighbours here, in x, in codes and in scale."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tiles_per_row = tl.cdiv(K, TILE)
    row, column = tile // tiles_per_row, tile % tiles_per_row * TILE
    within = tl.arange(0, TILE)
    offset = (row.to(tl.int64) * K + column)[:, None] + within[None, :]
    inside = (tile < tiles)[:, None] & ((column[:, None] + within[None, :]) < K)  # a row's last tile may be short

    values = widen(tl.load(x + offset, inside, other=0.0))
    amax = tl.max(tl.abs(finite_or_zero(values)), axis=1)
    tile_scales = tile_scale(amax, POW2)
    tl.store(codes + offset, encode(values, tile_scales[:, None]), inside)
    tl.store(scale + tile, tile_scales, tile < tiles)


def quantize_rows(x: Float[Tensor, "N K"], pow2: bool = False) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N tiles"]]:
    """x [N, K] in e4m3 with a scale for each 1×128 tile: codes [N, K], scale [N, ⌈K/128⌉] fp32; value = code · scale.

    x is fp32, bf16 or fp16; `pow2` rounds every scale up to a power of two. One read of x, one write of the codes.
    """
    x = x.contiguous()
    N, K = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(N, triton.cdiv(K, TILE), dtype=torch.float32, device=x.device)
    tiles = scale.numel()
    with on_device_of(x):
        if tiles:
            quantize_rows_kernel[(triton.cdiv(tiles, TILES),)](
                x, codes, scale, K, tiles, pow2, TILES, TILE, num_warps=4
            )
    return codes, scale
