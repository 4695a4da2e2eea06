"""128×128 blocks: one scale for a square of a weight, so the transposed weight needs no other codes (report §3.3.2)."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dsv3_book.fp8.kernels.casts import widen
from dsv3_book.fp8.kernels.launch import TILE, on_device_of
from dsv3_book.fp8.kernels.tiles import encode, finite_or_zero, tile_scale


@triton.jit
def quantize_blocks_kernel(w, codes, scale, N, K, POW2: tl.constexpr, TILE: tl.constexpr):
    """One block a program; it stays in registers from its only read to its only write. Blocks are numbered as `scale`
    lies in memory: expert, block of rows, block of columns."""
    block = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(N, TILE), tl.cdiv(K, TILE)
    expert = block // (row_blocks * column_blocks)
    row = block // column_blocks % row_blocks * TILE + tl.arange(0, TILE)
    column = block % column_blocks * TILE + tl.arange(0, TILE)
    offset = (expert.to(tl.int64) * N + row)[:, None] * K + column[None, :]
    inside = (row < N)[:, None] & (column < K)[None, :]  # blocks at both edges may be short

    values = widen(tl.load(w + offset, inside, other=0.0))
    amax = tl.max(tl.max(tl.abs(finite_or_zero(values)), axis=1), axis=0)
    block_scale = tile_scale(amax, POW2)
    tl.store(codes + offset, encode(values, block_scale), inside)
    tl.store(scale + block, block_scale)


def quantize_blocks(
    w: Float[Tensor, "E N K"], pow2: bool = False
) -> tuple[Float[Tensor, "E N K"], Float[Tensor, "E row_tiles tiles"]]:
    """w [E, N, K] in e4m3 with a scale for each 128×128 block: codes [E, N, K], scale [E, ⌈N/128⌉, ⌈K/128⌉] in fp32."""
    w = w.contiguous()
    E, N, K = w.shape
    codes = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    scale = torch.empty(E, triton.cdiv(N, TILE), triton.cdiv(K, TILE), dtype=torch.float32, device=w.device)
    if scale.numel():
        with on_device_of(w):
            # 64 numbers a thread: the masters are fp32, so two programs hold 128 KiB of reads in flight on an SM.
            quantize_blocks_kernel[(scale.numel(),)](w, codes, scale, N, K, pow2, TILE, num_warps=8)
    return codes, scale
