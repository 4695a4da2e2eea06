"""Where each expert's rows and tiles begin: worked out on the GPU, so that no launch waits for the counts."""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor


@triton.jit
def starts_kernel(counts, starts, E, rows, LEVELS: tl.constexpr):
    """One program writes starts [3, 2^LEVELS + 1]: where every expert's rows start, where its tiles start if they are
    64 rows high, and if they are 128. Behind the last expert comes the total. Counts beyond `rows` are cut off."""
    EXPERTS: tl.constexpr = 1 << LEVELS
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    count = tl.minimum(end, rows) - tl.minimum(end - count, rows)
    for line in tl.static_range(3):
        length = count if line == 0 else tl.cdiv(count, 64 * line)
        tl.store(starts + line * (EXPERTS + 1) + expert, tl.cumsum(length, 0) - length)
        tl.store(starts + line * (EXPERTS + 1) + EXPERTS, tl.sum(length, 0))


@triton.jit
def tile_starts(starts, HEIGHT: tl.constexpr, LEVELS: tl.constexpr):
    """The line of `starts` for tiles of this height."""
    tl.static_assert(HEIGHT == 64 or HEIGHT == 128, "starts has lines for tiles of 64 and of 128 rows")
    return starts + (HEIGHT // 64) * ((1 << LEVELS) + 1)


@triton.jit
def expert_of(line, tile, LEVELS: tl.constexpr):
    """The expert that the tile belongs to: the last one whose start is not beyond it, found by halving. An empty expert
    starts where the next one does, so it is never the last."""
    expert = 0
    for level in tl.static_range(LEVELS):
        later = expert + (1 << (LEVELS - 1 - level))
        expert = tl.where(tl.load(line + later) <= tile, later, expert)
    return expert


def levels(E: int) -> int:
    """Halvings that find one of E experts."""
    return (E - 1).bit_length()


def group_starts(counts: Int[Tensor, " E"], rows: int) -> Int[Tensor, "3 lines"]:
    """The table of `starts_kernel`, on the device of the counts."""
    E = len(counts)
    starts = torch.empty(3, (1 << levels(E)) + 1, dtype=torch.int32, device=counts.device)
    starts_kernel[(1,)](counts.contiguous(), starts, E, rows, levels(E))
    return starts
