"""What all products share: a tile of A·Bᵀ, its scales and its store, and the order in which tiles are visited.

Hopper's tensor core adds up FP8 products in about 14 bits (chapter 8), so each 128 of K gets a fresh accumulation;
that is also where the scales change. The partial sum then moves to fp32 registers, times both scales (report §3.3.2):

    total += tensor_core(A[:, k : k+128] · B[:, k : k+128]ᵀ) · a_scale · b_scale

This promotion is ordinary arithmetic, one multiply-add for 128 on the tensor core, and still takes a quarter of the
tensor core's time. Meanwhile that should work for somebody else. Two ways, of which autotuning takes the faster:

- *specialised*: one group of four warps only loads; two groups multiply 64 rows of the tile each and take turns: one
  promotes while the other multiplies. The compiler splits the program so if told to (`warp_specialize`).
- *pipelined*: all warps do everything, loads run `num_stages` tiles ahead, and tiles are small enough for two programs
  on each SM: while one promotes, the other multiplies.

Every element's sum runs over K in the same order whatever the tile's shape: autotuning never changes a bit of C.
"""

import triton
import triton.language as tl

from dsv3_book.fp8.kernels.casts import INTERPRETED, from_e4m3, narrow


@triton.jit
def partial_sum(a, b):
    """A·Bᵀ of codes [rows, 128] and [columns, 128], on the tensor core."""
    if INTERPRETED:  # whose own product of codes takes NaN for 480
        return tl.dot(from_e4m3(a), from_e4m3(b).T, input_precision="ieee")
    return tl.dot(a, b.T)


@triton.jit
def promoted(total, partial, a_scale, b_scale, B_BLOCKS: tl.constexpr):
    """total + partial · both scales: one for each row of A, and one for all of B's tile or one for each row of B.

    By blocks the scales are multiplied first, which saves a multiplication for each number of the tile, so their
    product must be a normal fp32: beyond 2^128 a zero times it is NaN, below 2^-126 digits are lost.
    """
    if B_BLOCKS:
        return total + partial * (a_scale * b_scale)[:, None]
    return total + partial * a_scale[:, None] * b_scale[None, :]


@triton.jit
def scales_of_b(b_scale, column, columns_end, k, stride, BLOCK_N: tl.constexpr, B_BLOCKS: tl.constexpr):
    """The scale of the 128×128 block that holds rows column … column + BLOCK_N of B, or these rows' own scales."""
    if B_BLOCKS:
        block = tl.minimum(column, columns_end - 1) // 128
        scale = tl.load(b_scale + block.to(tl.int64) * stride + k)
    else:
        columns = column + tl.arange(0, BLOCK_N)
        scale = tl.load(b_scale + columns.to(tl.int64) * stride + k, mask=columns < columns_end, other=0.0)
    return scale


@triton.jit
def contract(
    a, a_row, a_scale, row, rows_end, b, b_row, b_scale, column, columns_end, stride_scale, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, B_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The tile at (row, column), [BLOCK_M, BLOCK_N], contracted over the tiles first … last - 1 of K.

    a and b are TMA descriptors: one thread asks for a whole [BLOCK, 128] tile, the copy engine brings it, and what lies
    outside of the matrix arrives as zeros, so a short last tile of K costs no mask. a_row and b_row are the tile's
    first rows there. WIDE: two tiles side by side for one load of A; else the second, at column + BLOCK_N, stays zero.
    """
    rows = row + tl.arange(0, BLOCK_M)
    a_scale += rows.to(tl.int64) * stride_scale
    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(first, last):
        row_scale = tl.load(a_scale + k, mask=rows < rows_end, other=0.0)  # asked for early: needed after the product
        left_scale = scales_of_b(b_scale, column, columns_end, k, stride_scale, BLOCK_N, B_BLOCKS)
        codes = a.load([a_row, k * 128])
        partial = partial_sum(codes, b.load([b_row, k * 128]))
        left = promoted(left, partial, row_scale, left_scale, B_BLOCKS)
        if WIDE:
            right_scale = scales_of_b(b_scale, column + BLOCK_N, columns_end, k, stride_scale, BLOCK_N, B_BLOCKS)
            partial = partial_sum(codes, b.load([b_row + BLOCK_N, k * 128]))
            right = promoted(right, partial, row_scale, right_scale, B_BLOCKS)
    return left, right


@triton.jit
def store(c, tile, row, rows_end, column, columns_end, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes the tile at (row, column) of C, up to the ends."""
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside = (rows < rows_end)[:, None] & (columns < columns_end)[None, :]
    c += row.to(tl.int64) * stride + column  # one address for the tile and small offsets take fewer registers than many
    offsets = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(c + offsets, narrow(tile, c.dtype.element_ty), inside)


@triton.jit
def place(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Row and column of the tile-th tile: down BAND tiles, then the next column, and the next band at the end.

    The programs that run at the same time then cover a patch that is about square and share its rows of A and B in the
    L2 cache: 128 tiles of 128×128 as a patch of 8 by 16 read 24 × 128 rows; all in one row they would read 129 × 128.
    """
    band = tile // (BAND * tiles_n)
    within = tile % (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)  # the last band may be lower
    return band * BAND + within % height, within // height
