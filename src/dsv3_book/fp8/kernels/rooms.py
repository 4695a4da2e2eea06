"""Where tokens sorted by expert go when every expert gets a room of whole tiles: nothing but their counts is needed."""

import triton
import triton.language as tl


@triton.jit
def tokens_in_place(counts, place, experts, EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """The tokens for the tile that starts at `place` (a multiple of TILE): the first one's number, and how many.

    Expert e's room starts after the rooms of the experts before it, and is its count rounded up to whole tiles. Beyond
    the last room there are no tokens. `EXPERTS` is the power of two that `experts` fits in. The counts stay on the GPU:
    every program adds them up for itself, 256 at most, while a launch that waited for them would empty the machine.
    """
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, expert < experts, other=0).to(tl.int32)
    room = (count + TILE - 1) // TILE * TILE
    start = tl.cumsum(room, 0) - room
    mine = (start <= place) & (place < start + room)  # true for one expert at most
    first = tl.sum(tl.where(mine, tl.cumsum(count, 0) - count + place - start, 0), 0)
    tokens = tl.sum(tl.where(mine, count - (place - start), 0), 0)
    return first, tl.minimum(tokens, TILE)
