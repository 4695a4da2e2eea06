"""Graders of chapter 9: which speed binds, a dequantising kernel, the owner of a tile, a product in half steps.

The reader's kernels run in Triton's interpreter, or on a GPU where Triton compiles for one. Outputs lie between guards:
a store beyond an edge is seen instead of ruining memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from dsv3_book.exercises.grading import Case, Solution, grader, same
from dsv3_book.fp8 import reference

try:
    import triton
    import triton.language as tl
except ImportError:  # Linux only; the exercises without a kernel work without it
    triton = None


def kernel_grader(name: str, **about: Any) -> Callable[[Any], Any]:
    """`grader` for an exercise that runs a kernel: without Triton there is none."""
    return grader(name, **about) if triton is not None else lambda cases: cases


GUARD = 4096
UNTOUCHED = -12345.0


# Which speed binds ---------------------------------------------------------------------------------------------------
@grader(
    "kernels.fewest_rows",
    minutes=5,
    level="easy",
    reference=lambda: lambda peak, bandwidth: math.ceil(peak / bandwidth / 2),
    wrong={
        "two FLOPs": lambda: lambda peak, bandwidth: math.ceil(peak / bandwidth),
        "whole": lambda: lambda peak, bandwidth: peak / bandwidth / 2,
        "at least": lambda: lambda peak, bandwidth: math.floor(peak / bandwidth / 2),
    },
)
def fewest_rows():
    yield Case(
        (100.0, 10.0),
        same(5),
        says="100 FLOPs and 10 bytes a second",
        hint="A weight of one byte meets every row once: a multiply and an add, two FLOPs.",
    )
    yield Case(
        (1979e12, 3.35e12),
        same(296),
        says="an H800",
        hint="The answer is a whole number of rows, and at least as many as the ridge asks for: round up.",
    )


# Back again ----------------------------------------------------------------------------------------------------------
def _device() -> str:
    """Where kernels of this process run: interpreted ones take CPU tensors."""
    interpreted = triton is None or triton.knobs.runtime.interpret
    return "cpu" if interpreted or not torch.cuda.is_available() else "cuda"


def _guarded(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this shape and the memory around it."""
    size = math.prod(shape)
    around = torch.full((size + 2 * GUARD,), UNTOUCHED, device=_device())
    return around[GUARD : GUARD + size].view(shape), around


def _filled(expected: torch.Tensor, around: torch.Tensor, tolerance: float):
    def judge(answer: object) -> str | None:
        if not isinstance(answer, torch.Tensor):
            return f"returned a {type(answer).__name__}, expected the tensor `out`"
        outside = torch.cat([around[:GUARD], around[-GUARD:]])
        if (outside != UNTOUCHED).any():
            return f"wrote {(outside != UNTOUCHED).sum()} numbers outside of `out`"
        if answer.shape != expected.shape:
            return f"returned shape {list(answer.shape)}, expected {list(expected.shape)}"
        if (answer == UNTOUCHED).any():
            return f"left {(answer == UNTOUCHED).sum()} of {answer.numel()} places of `out` as they were"
        off = (answer.cpu().double() - expected.double()).abs()
        if not off.isfinite().all():
            return "the answer has NaN or infinities, and should have none"
        worst = float(off.max() / expected.abs().max())
        where = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
        return None if worst <= tolerance else f"off by {worst:.2g} of the largest number, worst at {where}"

    return judge


def _dequantise_case(rows: int, width: int, says: str, hint: str) -> Case:
    random = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=random) * 10.0 ** torch.randn(rows, 1, generator=random)
    codes, scale = reference.quantize_rows(x, False)
    spare = torch.full((GUARD + codes.numel(),), 448.0).to(torch.float8_e4m3fn)  # what lies behind the last row
    spare[: codes.numel()] = codes.flatten()
    codes = spare[: codes.numel()].view(codes.shape)
    out, around = _guarded(rows, width)
    judge = _filled(reference.dequantize_rows(codes, scale), around, 0.0)
    return Case((codes.to(_device()), scale.to(_device()), out), judge, says=says, hint=hint)


# A product in half steps ---------------------------------------------------------------------------------------------
def _halves_case(rows: int, columns: int, inner: int, says: str, hint: str) -> Case:
    random = torch.Generator().manual_seed(inner)
    A = torch.randn(rows, inner, generator=random) * (1 + torch.arange(inner) // 128)
    B = torch.randn(columns, inner, generator=random) / (1 + torch.arange(inner) // 128) ** 2
    a, a_scale = reference.quantize_rows(A, False)
    b, b_scale = (t[0] for t in reference.quantize_blocks(B[None], False))
    out, around = _guarded(rows, columns)
    left, right = reference.dequantize_rows(a, a_scale), reference.dequantize_blocks(b[None], b_scale[None])[0]
    tolerance = 2e-6 if _device() == "cpu" else 2e-3  # a tensor core's sum is narrow (chapter 8)
    judge = _filled(left.double() @ right.double().T, around, tolerance)
    padded = [torch.cat([t.flatten().view(torch.uint8), torch.full((GUARD,), 0x7E, dtype=torch.uint8)]) for t in (a, b)]
    a, b = (p[: t.numel()].view(torch.float8_e4m3fn).view(t.shape).to(_device()) for p, t in zip(padded, (a, b)))
    return Case((a, a_scale.to(_device()), b, b_scale.to(_device()), out), judge, says=says, hint=hint)


if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        codes, scale, out, width, TILE: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, FLOOR: tl.constexpr
    ):
        row, tile = tl.program_id(0), tl.program_id(1)
        tiles = width // TILE if FLOOR else tl.cdiv(width, TILE)
        column = tile * TILE + tl.arange(0, TILE)
        values = tl.load(codes + row * width + column, (column < width) | LOAD, other=0.0).to(tl.float32)
        values *= tl.load(scale + row * tiles + tile)
        tl.store(out + row * width + column, values, (column < width) | STORE)

    @triton.jit
    def _halves_kernel(
        a, a_scale, b, b_scale, out, rows, columns, inner,
        UNMASKED: tl.constexpr, DROPPED: tl.constexpr, ONE_SCALE: tl.constexpr, BY_STEP: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(0) * 128 + tl.arange(0, 128)
        n = tl.program_id(1) * 128 + tl.arange(0, 128)
        m_in, n_in = m < rows, n < columns
        total, tiles = tl.zeros((128, 128), tl.float32), tl.cdiv(inner, 128)
        for t in range(inner // 128 if DROPPED else tiles):
            at = 0 if ONE_SCALE else (tl.minimum(2 * t, tiles - 1) if BY_STEP else t)
            partial = tl.zeros((128, 128), tl.float32)
            for half in range(2):
                k = t * 128 + half * 64 + tl.arange(0, 64)
                k_in = (k < inner) | UNMASKED
                left = tl.load(a + m[:, None] * inner + k[None, :], m_in[:, None] & k_in[None, :], other=0.0)
                right = tl.load(b + n[:, None] * inner + k[None, :], n_in[:, None] & k_in[None, :], other=0.0)
                partial += tl.dot(left, right.T)
            scale = tl.load(a_scale + m * tiles + at, m_in, other=0.0)
            total += partial * (scale * tl.load(b_scale + tl.program_id(1) * tiles + at))[:, None]
        tl.store(out + m[:, None] * columns + n[None, :], total, m_in[:, None] & n_in[None, :])


def _dequantise(load: bool = False, store: bool = False, floor: bool = False) -> Solution:
    """The solution; with an argument a typical mistake: no mask on the load, on the store, tiles rounded down."""

    def solution(codes, scale, out):
        _dequantize_kernel[scale.shape](codes, scale, out, codes.shape[1], 128, load, store, floor)
        return out

    return solution


def _whole_tiles() -> Solution:
    def solution(codes, scale, out):
        grid = (scale.shape[0], codes.shape[1] // 128)
        _dequantize_kernel[grid](codes, scale, out, codes.shape[1], 128, False, False, False)
        return out

    return solution


def _halves(**mistakes: bool) -> Solution:
    flags = [mistakes.get(name, False) for name in ("unmasked", "dropped", "one_scale", "by_step")]

    def solution(a, a_scale, b, b_scale, out):
        grid = (triton.cdiv(len(a), 128), triton.cdiv(len(b), 128))
        _halves_kernel[grid](a, a_scale, b, b_scale, out, *out.shape, a.shape[1], *flags)
        return out

    return solution


@kernel_grader(
    "kernels.dequantize",
    minutes=20,
    level="medium",
    reference=_dequantise,
    wrong={
        "outside": lambda: _dequantise(store=True),
        "round up": lambda: _dequantise(floor=True),
        "short tile": _whole_tiles,
    },
)
def dequantize():
    yield _dequantise_case(
        3,
        256,
        "three rows of two whole tiles",
        "A program for each row and tile; scale [row, tile] multiplies its 128 codes.",
    )
    yield _dequantise_case(
        5,
        200,
        "rows of 200: the last tile is short",
        "The short tile needs a program too, and masks where its row ends: beyond lies the next row, or "
        "what is outside of the tensor. Scales of a row: 200 / 128, round up.",
    )
    yield _dequantise_case(
        4,
        80,
        "rows shorter than a tile",
        "A single short tile: the number of tiles must round up to 1, and the mask ends at 80.",
    )


@kernel_grader(
    "kernels.halves",
    minutes=30,
    level="hard",
    reference=_halves,
    wrong={
        "short tile": lambda: _halves(dropped=True),
        "mask": lambda: _halves(unmasked=True),
        "changes every 128": lambda: _halves(one_scale=True),
        "two steps": lambda: _halves(by_step=True),
    },
)
def halves():
    whole = (
        "The scale changes every 128, that is after two steps: both of a pair use the scales of tile step // 2 and are "
        "promoted together."
    )
    edge = (
        "Two things: the short tile must be promoted even if its pair of steps is not complete; where k ≥ inner lies "
        "the next row, or nothing of yours: mask both loads with other=0.0."
    )
    yield _halves_case(5, 130, 384, "three whole tiles along the inner dimension", whole)
    yield _halves_case(3, 20, 320, "320: the last tile is short, and its second half has nothing in it", edge)
    yield _halves_case(3, 20, 80, "80: the second half is short", edge)


# Whose tile ----------------------------------------------------------------------------------------------------------
def _owner(tile: int, counts: list[int], height: int):
    first = 0
    for expert, count in enumerate(counts):
        tiles = -(-count // height)
        if tile < tiles:
            start = first + tile * height
            return expert, start, min(start + height, first + count)
        tile, first = tile - tiles, first + count
    raise ValueError("no such tile")


def _dense() -> Solution:
    def solution(tile, counts, height):
        start, first = tile * height, 0
        for expert, count in enumerate(counts):
            if start < first + count:
                return expert, start, min(start + height, first + count)
            first += count
        return len(counts) - 1, start, first

    return solution


def _padded() -> Solution:
    def solution(tile, counts, height):
        expert, start, end = _owner(tile, counts, height)
        gap = sum(-count % height for count in counts[:expert])
        return expert, start + gap, end + gap

    return solution


def _overhang() -> Solution:
    def solution(tile, counts, height):
        expert, start, _ = _owner(tile, counts, height)
        return expert, start, start + height

    return solution


@grader(
    "kernels.owner",
    minutes=15,
    level="medium",
    reference=lambda: _owner,
    wrong={"two experts": _dense, "without gaps": _padded, "next expert's": _overhang},
)
def owner():
    yield Case(
        (0, [4, 4], 4),
        same((0, 0, 4)),
        says="the first tile of two experts with a tile each",
        hint="Return (expert, first row, end row).",
    )
    yield Case(
        (1, [3, 0, 9], 4),
        same((2, 3, 7)),
        says="3, 0 and 9 rows: tile 0 is expert 0's, tile 1 is expert 2's first",
        hint="No tile holds rows of two experts, so expert 2's first tile begins at its own first row, 3: rows lie "
        "one after another, without gaps.",
    )
    yield Case(
        (3, [3, 0, 9], 4),
        same((2, 11, 12)),
        says="the last tile, which holds a single row",
        hint="The tile ends where the expert's rows end, at 12: what follows would be the next expert's.",
    )
    yield Case((0, [0, 0, 2, 5], 4), same((2, 0, 2)), says="experts without rows own nothing",
               hint="Skip experts without tiles; a tile ends before the next expert's rows.")  # fmt: skip
