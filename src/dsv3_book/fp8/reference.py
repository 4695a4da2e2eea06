"""What every FP8 operation computes, in plain torch: the definition the kernels are held to, and what a CPU runs.

One rule makes all codes and scales (report §3.3.2; the floor and the non-finite values are our choice). For a tile:

    amax  = the largest |x| over the tile's finite elements, fp32
    scale = max(amax / 448, 2⁻¹²⁶)       with `pow2`: the smallest power of two that is no less
    code  = E4M3(x / scale)              rounded to nearest even; NaN and ±inf become NaN

so a tile of zeros has zero codes, and one bad value spoils itself but not its neighbours. On the way back a value is
code · scale: scales multiply, as `weight_scale_inv` of the released files does. (Only values within a rounding of
fp32's largest, 3.4e38, can come back infinite.) Tiles at an edge are short.

Nothing here checks its arguments; `quantize` and `gemm`, which call it, do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_book.fp8.formats import ceil_power_of_two
from dsv3_book.model.ops import times_transposed

TILE = 128
E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126  # the smallest normal fp32: 1 / scale stays finite


# Scales and codes ----------------------------------------------------------------------------------------------------
def scale_of(amax: Tensor, pow2: bool) -> Tensor:
    """The scale of tiles with these largest magnitudes."""
    scale = (amax / E4M3_MAX).clamp_min_(MIN_SCALE)
    return ceil_power_of_two(scale) if pow2 else scale


def _encode(tiles: Tensor, dims: tuple[int, ...], pow2: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales (reduced axes kept, of size 1) of tiles that span the axes `dims`."""
    tiles = tiles.float()
    amax = _largest(tiles, dims)
    if not amax.isfinite().all():  # the rare case pays for itself
        bad = ~tiles.isfinite()
        amax = _largest(tiles.masked_fill(bad, 0), dims)
        tiles = tiles.masked_fill(bad, torch.nan)
    scale = scale_of(amax, pow2)
    return (tiles / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _largest(tiles: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.maximum(tiles.amax(dims, keepdim=True), -tiles.amin(dims, keepdim=True))  # no tensor of all |x|


def decode(codes: Tensor) -> Tensor:
    """E4M3 codes as fp32. torch's cast is slow on a CPU; there the bits s·eeee·mmm move to where fp16 has them,
    s·0eeee·mmm0000000: that is the same number but for the factor 2⁸ between the two formats' biases."""
    codes = codes.contiguous()
    if codes.device.type != "cpu" or not codes.numel() or torch.compiler.is_compiling():  # it can't look at numbers
        return codes.float()
    bits = codes.view(torch.int8)
    if bits.amax() == 0x7F or bits.view(torch.uint8).amax() == 0xFF:  # fp16's NaN has another pattern
        return codes.float()
    half = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # int8's sign filled two bits
    return half.view(torch.float16).float().mul_(256)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with zeros behind, so that its last two axes are multiples of `rows` and `columns`."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    return F.pad(x, (0, right, 0, below)) if below or right else x


def tiles(n: int) -> int:
    """How many tiles of 128 cover n."""
    return -(-n // TILE)


# Quantisers ----------------------------------------------------------------------------------------------------------
def quantize_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """1×128 tiles of x [N, K]: codes [N, K], scale [N, ⌈K/128⌉]."""
    N, K = x.shape
    tiles = _padded(x, 1, TILE).reshape(N, -(-K // TILE), TILE)
    codes, scale = _encode(tiles, (-1,), pow2)
    return codes.flatten(1)[:, :K].contiguous(), scale.squeeze(-1)


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """code · scale in fp32, for scales [N, ⌈K/128⌉]."""
    N, K = codes.shape
    values = decode(codes)
    if K % TILE == 0:
        return values.view(N, K // TILE, TILE).mul_(scale[:, :, None]).view(N, K)
    return values.mul_(scale.repeat_interleave(TILE, 1)[:, :K])


def quantize_blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """128×128 blocks of w [E, N, K]: codes [E, N, K], scale [E, ⌈N/128⌉, ⌈K/128⌉]."""
    E, N, K = w.shape
    nb, kb = tiles(N), tiles(K)
    blocks = _padded(w, TILE, TILE).reshape(E, nb, TILE, kb, TILE)
    codes, scale = _encode(blocks, (-1, -3), pow2)
    return codes.view(E, nb * TILE, kb * TILE)[:, :N, :K].contiguous(), scale.view(E, nb, kb)


def dequantize_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """code · scale in fp32, for scales [E, ⌈N/128⌉, ⌈K/128⌉]."""
    _, N, K = codes.shape
    wide = scale.repeat_interleave(TILE, 2)[:, :, :K]
    return decode(codes).mul_(wide.repeat_interleave(TILE, 1)[:, :N])


def quantize_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all of x: codes like x, scale []."""
    if not x.numel():
        return x.to(torch.float8_e4m3fn), torch.full((), MIN_SCALE, device=x.device)
    codes, scale = _encode(x.reshape(1, -1), (-1,), False)
    return codes.view(x.shape), scale.view(())


def rooms(counts: Tensor) -> list[int]:
    """Where every expert's tokens start when each gets whole tiles of 128, and where the last one's end."""
    starts = [0]
    for n in counts.tolist():
        starts.append(starts[-1] + n + -n % TILE)
    return starts


def total_rooms(N: int, E: int) -> int:
    """Places enough for N tokens in E rooms, whoever gets them: a bound that needs no look at the counts."""
    return (N + (TILE - 1) * E) // TILE * TILE


def quantize_columns(x: Tensor, counts: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    """128×1 tiles down the tokens of x [N, D], stored transposed: codes [D, R], scale [D, ⌈R/128⌉].

    Without counts R = N. With counts [E] every expert's tokens get a room of whole tiles, so that no tile holds tokens
    of two experts, and R = total_rooms(N, E); places without a token are zero.
    """
    N, D = x.shape
    if counts is None:
        return _columns(x, N, pow2)
    starts, first = rooms(counts), 0
    roomy = x.new_zeros(starts[-1], D)
    for start, n in zip(starts, counts.tolist(), strict=False):
        roomy[start : start + n] = x[first : first + n]
        first += n
    return _columns(roomy, total_rooms(N, len(counts)), pow2)


def _columns(x: Tensor, R: int, pow2: bool) -> tuple[Tensor, Tensor]:
    """128×1 tiles of x [N, D], transposed, zeros behind up to R. Codes are turned, being small."""
    N, D = x.shape
    tiles = _padded(x, TILE, 1).reshape(-(-N // TILE), TILE, D)
    made, made_scale = _encode(tiles, (1,), pow2)
    codes = torch.zeros(D, R, dtype=torch.uint8, device=x.device)
    codes[:, :N] = made.view(torch.uint8).flatten(0, 1)[:N].t()
    scale = torch.full((D, -(-R // TILE)), MIN_SCALE, device=x.device)
    scale[:, : len(tiles)] = made_scale[:, 0].t()
    return codes.view(torch.float8_e4m3fn), scale


def requantize_columns(codes: Tensor, scale: Tensor, counts: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    """From 1×128 tiles [N, D] to the transposed 128×1 tiles of `quantize_columns`: Wgrad's second quantisation."""
    return quantize_columns(dequantize_rows(codes, scale), counts, pow2)


def swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    """1×128 tiles of silu(gate) · up (· weight per row) [S, F], computed in fp32 and rounded to gate's dtype first."""
    return quantize_rows(weighted_swiglu(gate, up, weight), pow2)


def weighted_swiglu(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    """silu(gate) · up (· weight per row), in fp32, rounded to gate's dtype at the end."""
    h = F.silu(gate.float()).mul_(up.float())
    if weight is not None:
        h.mul_(weight.float()[:, None])
    return h.to(gate.dtype)


# Products ------------------------------------------------------------------------------------------------------------
def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A·Bᵀ [M, N] of codes a [M, K], b [N, K]; b_scale by blocks [⌈N/128⌉, ⌈K/128⌉] or by rows [N, ⌈K/128⌉].

    The scales are applied to the operands, not to the partial sums: the same number up to fp32 rounding, and one
    product that every BLAS is good at. `gemm_by_tiles` is the algorithm of the report and of the kernels.
    """
    return times_transposed(dequantize_rows(a, a_scale), _dequantize_b(b, b_scale)).to(out_dtype)


def gemm_by_tiles(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`gemm` as the report does it (§3.3.2): a partial sum per 128 of K, promoted to fp32 where both scales meet it."""
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    by_rows = b_scale if b_scale.shape[0] == b.shape[0] else b_scale.repeat_interleave(TILE, 0)[: b.shape[0]]
    for t in range(a_scale.shape[1]):
        k = slice(t * TILE, (t + 1) * TILE)
        total += decode(a[:, k]) @ decode(b[:, k]).t() * a_scale[:, t, None] * by_rows[None, :, t]
    return total.to(out_dtype)


def _dequantize_b(b: Tensor, b_scale: Tensor) -> Tensor:
    if b_scale.shape[0] == b.shape[0]:
        return dequantize_rows(b, b_scale)
    return dequantize_blocks(b[None], b_scale[None])[0]


def grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Rows of a [S, K], sorted by expert, times that expert's b [E, N, K]ᵀ: [S, N].

    By plain `@`: oneDNN would compile a product anew for every number of rows, and loads are never twice the same
    (measured: a training step took twenty times as long).
    """
    values, first = dequantize_rows(a, a_scale), 0
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    for e, n in enumerate(counts.tolist()):
        if n:
            rows = slice(first, first + n)
            out[rows] = values[rows] @ _dequantize_b(b[e], b_scale[e]).t()
        first += n
    return out


def masked_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The same for a [E, room, K] of which the first counts[e] rows of expert e are real; the others give zeros."""
    out = torch.zeros(*a.shape[:2], b.shape[1], dtype=out_dtype, device=a.device)
    for e, n in enumerate(counts.tolist()):
        if n:
            out[e, :n] = dequantize_rows(a[e, :n], a_scale[e, :n]) @ _dequantize_b(b[e], b_scale[e]).t()
    return out


def grouped_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Per expert A·Bᵀ over its room of tokens, a [N1, R], b [N2, R] from `quantize_columns`: [E, N1, N2]."""
    out = torch.zeros(len(counts), a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    a_values, b_values = dequantize_rows(a, a_scale), dequantize_rows(b, b_scale)
    for start, n, e in zip(rooms(counts), counts.tolist(), range(len(counts)), strict=False):
        if n:
            room = slice(start, start + n)
            out[e] = a_values[:, room] @ b_values[:, room].t()
    return out
