"""128×1 tiles: 128 tokens of a channel share a scale, and the tokens of a channel lie side by side.

Wgrad contracts the tokens, so its operands are scaled along them and transposed (report §3.3.2). The kernel takes the
numbers themselves, or codes with 1×128 scales, which it turns into the other tiling without anything in between in
memory.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.fp8.kernels.casts import four_e4m3, from_e4m3, widen
from dsv3_book.fp8.kernels.launch import TILE, on_device_of
from dsv3_book.fp8.kernels.rooms import tokens_in_place
from dsv3_book.fp8.kernels.tiles import divide, finite_or_zero, tile_scale
from dsv3_book.fp8.reference import total_rooms

BLOCK_D = 64
"""Channels a program: of bf16 a cache line of 128 bytes to read for each token; 128 tokens in e4m3 are one to write."""


@triton.jit
def rows_of(x, x_scale, first, within, tokens, block, D, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """Tokens first + within of x in fp32, BLOCK_D channels of them, zeros where `within` is beyond the last token."""
    # Four channels a thread make whole cache lines a warp. Of more channels it would have more scales to compute.
    column = tl.max_contiguous(block * BLOCK_D + tl.arange(0, BLOCK_D), 4)
    token = (first + within).to(tl.int64)
    inside = (within < tokens)[:, None] & (column < D)[None, :]
    values = tl.load(x + token[:, None] * D + column[None, :], inside, other=0.0)
    if x_scale is None:
        values = widen(values)
    else:  # BLOCK_D divides TILE: all these channels had one scale for a token
        scale = tl.load(x_scale + token * tl.cdiv(D, TILE) + block * BLOCK_D // TILE, within < tokens, other=0.0)
        values = from_e4m3(values) * scale[:, None]
    return values


@triton.jit
def quantize_columns_kernel(
    x, x_scale, counts, codes, scale, N, D, R, row_words, experts,
    POW2: tl.constexpr, EXPERTS: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of tokens by BLOCK_D channels: read along the channels, written along the tokens.

    x_scale is None for numbers, counts is None (and EXPERTS 0) for tokens in one piece. Neighbouring programs take
    neighbouring tiles of tokens: their codes and scales are neighbours in memory.

    Turning a tile means that every thread's codes go to other threads, byte by byte, which is slow. So a thread reads
    four tokens of its channels and makes words of 32 bits of their codes; a quarter as many words are then turned.
    """
    tiles = tl.cdiv(R, TILE)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if EXPERTS > 0:
        first, tokens = tokens_in_place(counts, tile * TILE, experts, EXPERTS, TILE)
    else:
        first, tokens = tile * TILE, N - tile * TILE
    within = tl.arange(0, TILE // 4) * 4
    a = rows_of(x, x_scale, first, within, tokens, block, D, BLOCK_D, TILE)
    b = rows_of(x, x_scale, first, within + 1, tokens, block, D, BLOCK_D, TILE)
    c = rows_of(x, x_scale, first, within + 2, tokens, block, D, BLOCK_D, TILE)
    d = rows_of(x, x_scale, first, within + 3, tokens, block, D, BLOCK_D, TILE)

    ab = tl.maximum(tl.abs(finite_or_zero(a)), tl.abs(finite_or_zero(b)))
    cd = tl.maximum(tl.abs(finite_or_zero(c)), tl.abs(finite_or_zero(d)))
    tile_scales = tile_scale(tl.max(tl.maximum(ab, cd), axis=0), POW2)
    by = tile_scales[None, :]
    words = four_e4m3(divide(a, by), divide(b, by), divide(c, by), divide(d, by))

    column = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    tl.store(scale + column * tiles + tile, tile_scales, column < D)
    if WORDS:  # R is a multiple of 4, every row of codes is made of whole words, and `codes` points to words
        word = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        inside = (column < D)[:, None] & (word < row_words)[None, :]
        tl.store(codes + column[:, None] * row_words + word[None, :], words.T, inside)
    else:
        for byte in tl.static_range(4):
            code = (words.T >> (8 * byte) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            place = tile * TILE + within + byte
            inside = (column < D)[:, None] & (place < R)[None, :]
            tl.store(codes + column[:, None] * R + place[None, :], code, inside)


def _launch(x: Tensor, x_scale: Tensor | None, counts: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    N, D = x.shape
    experts = 0 if counts is None else counts.shape[0]
    R = N if counts is None else total_rooms(N, experts)
    codes = torch.empty(D, R, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(D, triton.cdiv(R, TILE), dtype=torch.float32, device=x.device)
    if scale.numel():
        counts = None if counts is None else counts.contiguous()
        EXPERTS = triton.next_power_of_2(experts) if experts else 0
        words = R % 4 == 0
        grid = (scale.shape[1] * triton.cdiv(D, BLOCK_D),)
        with on_device_of(x):
            quantize_columns_kernel[grid](
                x, x_scale, counts, codes.view(torch.int32) if words else codes, scale, N, D, R, R // 4, experts,
                pow2, EXPERTS, words, BLOCK_D, TILE, num_warps=4,
            )  # fmt: skip
    return codes, scale


def quantize_columns(
    x: Float[Tensor, "N D"], counts: Int[Tensor, " E"] | None = None, pow2: bool = False
) -> tuple[Float[Tensor, "D R"], Float[Tensor, "D tiles"]]:
    """128×1 tiles down the tokens of x [N, D], stored transposed: codes [D, R], scale [D, ⌈R/128⌉].

    Without counts R = N. With counts [E] every expert's tokens get a room of whole tiles, and R = total_rooms(N, E);
    places without a token are zero.
    """
    return _launch(x, None, counts, pow2)


def requantize_columns(
    codes: Float[Tensor, "N D"],
    scale: Float[Tensor, "N tiles"],
    counts: Int[Tensor, " E"] | None = None,
    pow2: bool = False,
) -> tuple[Float[Tensor, "D R"], Float[Tensor, "D row_tiles"]]:
    """The same from codes [N, D] with 1×128 scales [N, ⌈D/128⌉]: Wgrad's second quantisation, one byte in, one out."""
    return _launch(codes, scale.contiguous(), counts, pow2)
