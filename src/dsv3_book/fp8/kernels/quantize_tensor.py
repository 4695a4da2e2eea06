"""One scale for a whole tensor, to compare with: two passes, one after the other."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dsv3_book.fp8.kernels.casts import widen
from dsv3_book.fp8.kernels.launch import on_device_of
from dsv3_book.fp8.kernels.tiles import encode, finite_or_zero, tile_scale

BLOCK = 4096


@triton.jit
def amax_kernel(x, amax, n, BLOCK: tl.constexpr):
    """amax (fp32 as int32: magnitudes are ordered as their bits are) becomes the largest finite |x|."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = widen(tl.load(x + at, at < n, other=0.0))
    tl.atomic_max(amax, tl.max(tl.abs(finite_or_zero(values)), axis=0).to(tl.int32, bitcast=True))


@triton.jit
def encode_kernel(x, amax, codes, scale, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one_scale = tile_scale(tl.load(amax).to(tl.float32, bitcast=True), False)
    tl.store(codes + at, encode(widen(tl.load(x + at, at < n, other=0.0)), one_scale), at < n)
    if tl.program_id(0) == 0:
        tl.store(scale, one_scale)


def quantize_tensor(x: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, ""]]:
    """x in e4m3 with one scale for all of it: codes like x, scale []. Two reads of x, one write of the codes."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    grid = (max(1, triton.cdiv(x.numel(), BLOCK)),)
    with on_device_of(x):
        amax_kernel[grid](x, amax, x.numel(), BLOCK, num_warps=4)
        encode_kernel[grid](x, amax, codes, scale, x.numel(), BLOCK, num_warps=4)
    return codes, scale
