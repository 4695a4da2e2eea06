"""State for checkpoint tests: tensors of several kinds, cut into boxes at random and dealt to ranks."""

import random
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from dsv3_book.slab import Slab, Value

SHAPES = {
    "model.experts": ((8, 3, 5), torch.float32),
    "model.matrix": ((6, 11), torch.bfloat16),
    "optimizer.moment": ((97,), torch.float32),
    "optimizer.step": ((), torch.float32),
    "rng.0": ((40,), torch.uint8),
}


def wholes(step: int = 0) -> dict[str, Tensor]:
    """Every tensor, complete; other numbers for every step."""
    draw = torch.Generator().manual_seed(step)
    return {
        name: (torch.randn(shape, generator=draw) * 50).to(dtype)
        if dtype != torch.uint8
        else torch.randint(256, shape, generator=draw, dtype=dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def cut(shape: tuple[int, ...], draw: random.Random, axis: int = 0) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of boxes that make up a whole: cut along each axis in turn, every strip otherwise."""
    if axis == len(shape):
        return [((0,) * len(shape), shape)]
    ends = sorted({0, shape[axis], *(draw.randrange(shape[axis] + 1) for _ in range(draw.randrange(3)))})
    boxes = []
    for begin, end in pairwise(ends):
        for offset, sizes in cut(shape, draw, axis + 1):
            at = tuple(begin if i == axis else o for i, o in enumerate(offset))
            boxes.append((at, tuple(end - begin if i == axis else n for i, n in enumerate(sizes))))
    return boxes


def part(whole: Tensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]


def deal(rank: int, ranks: int, seed: int, step: int = 0, copies: int = 2) -> dict[str, Value]:
    """What `rank` holds of `wholes(step)`: boxes as the seed cuts them, each on 1 to `copies` ranks.

    A tensor that is not cut comes as it is; some ranks have nothing of a name.
    """
    draw = random.Random(seed)
    held: dict[str, Value] = {}
    for name, whole in wholes(step).items():
        mine = []
        for offset, sizes in cut(tuple(whole.shape), draw):
            owners = draw.sample(range(ranks), draw.randint(1, min(copies, ranks)))
            if rank in owners and prod(sizes):
                mine.append(Slab(part(whole, offset, sizes).clone(), tuple(whole.shape), offset))
        if len(mine) == 1 and mine[0].tensor.shape == whole.shape:
            held[name] = mine[0].tensor
        elif mine:
            held[name] = mine if len(mine) > 1 else mine[0]
    return held


def tensors_in(value: Value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [slab.tensor for slab in ([value] if isinstance(value, Slab) else value)]


def blank(held: dict[str, Value]) -> dict[str, Value]:
    """The same boxes, filled with something else."""
    for value in held.values():
        for tensor in tensors_in(value):
            tensor.fill_(77)
    return held


def same(a: dict[str, Value], b: dict[str, Value]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(x, y) for name in a for x, y in zip(tensors_in(a[name]), tensors_in(b[name]), strict=True)
    )
