"""SwiGLU and the quantiser of what it feeds in one kernel: the activations between an expert's matrices never exist in
memory except as codes (report §3.3.3 keeps SwiGLU's inputs and computes its output again in backward)."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dsv3_book.fp8.kernels.casts import narrow, widen
from dsv3_book.fp8.kernels.launch import TILE, on_device_of
from dsv3_book.fp8.kernels.tiles import encode, finite_or_zero, tile_scale

TILES = 16
"""Tiles a program: 16 numbers a thread, of two matrices."""


@triton.jit
def silu(x):
    """x · sigmoid(x) in fp32. exp and this division are a GPU's fast ones, a few ulp of fp32 off (torch's exp is not
    correctly rounded either): rounded to bf16 or fp16 the result is at most one ulp from `reference`'s, nearly always
    the same. Below 2^-119, for x < -87, it may be 0."""
    return x / (1.0 + tl.exp(0.0 - x))


@triton.jit
def swiglu_quantize_kernel(
    gate, up, weight, codes, scale, F, tiles, POW2: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """As `quantize_rows_kernel`, with numbers computed on the way: rounded to gate's dtype as if they had been in
    memory. weight is None, or one number a row."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tiles_per_row = tl.cdiv(F, TILE)
    row, column = tile // tiles_per_row, tile % tiles_per_row * TILE
    within = tl.arange(0, TILE)
    offset = (row.to(tl.int64) * F + column)[:, None] + within[None, :]
    inside = (tile < tiles)[:, None] & ((column[:, None] + within[None, :]) < F)

    h = silu(widen(tl.load(gate + offset, inside, other=0.0))) * widen(tl.load(up + offset, inside, other=0.0))
    if weight is not None:
        h *= widen(tl.load(weight + row, tile < tiles, other=0.0))[:, None]
    values = widen(narrow(h, gate.dtype.element_ty))

    amax = tl.max(tl.abs(finite_or_zero(values)), axis=1)
    tile_scales = tile_scale(amax, POW2)
    tl.store(codes + offset, encode(values, tile_scales[:, None]), inside)
    tl.store(scale + tile, tile_scales, tile < tiles)


def swiglu_quantize(
    gate: Float[Tensor, "S F"], up: Float[Tensor, "S F"], weight: Float[Tensor, " S"] | None = None, pow2: bool = False
) -> tuple[Float[Tensor, "S F"], Float[Tensor, "S tiles"]]:
    """silu(gate) · up (· weight, one number a row), computed in fp32, rounded to gate's dtype, then to e4m3 in 1×128
    tiles: codes [S, F], scale [S, ⌈F/128⌉]. Two reads, one write."""
    gate, up = gate.contiguous(), up.contiguous()
    S, F = gate.shape
    codes = torch.empty_like(gate, dtype=torch.float8_e4m3fn)
    scale = torch.empty(S, triton.cdiv(F, TILE), dtype=torch.float32, device=gate.device)
    tiles = scale.numel()
    if tiles:
        weight = None if weight is None else weight.contiguous()
        with on_device_of(gate):
            swiglu_quantize_kernel[(triton.cdiv(tiles, TILES),)](
                gate, up, weight, codes, scale, F, tiles, pow2, TILES, TILE, num_warps=4
            )
    return codes, scale
