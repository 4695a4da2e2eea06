"""Graders of chapter 10: shapes of scales, bytes kept, the backward pass in FP8, a fair comparison, a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book import fp8
from dsv3_book.exercises.grading import Case, Solution, close, grader, same

Pair = tuple[Tensor, Tensor]


def _tiles(n: int) -> int:
    return -(-n // 128)


# Shapes of scales ----------------------------------------------------------------------------------------------------
def _shapes(
    N: int, i: int, o: int, tiles: Callable[[int], int] = _tiles, turned: bool = True
) -> dict[str, tuple[int, int]]:
    wgrad = {"x Wgrad": (i, tiles(N)), "dy Wgrad": (o, tiles(N))}
    if not turned:
        wgrad = {"x Wgrad": (N, tiles(i)), "dy Wgrad": (N, tiles(o))}
    return {"x Fprop": (N, tiles(i)), "W": (tiles(o), tiles(i)), "dy Dgrad": (N, tiles(o))} | wgrad


def _floor() -> Solution:
    return lambda N, i, o: _shapes(N, i, o, lambda n: n // 128)


def _never_turned() -> Solution:
    return lambda N, i, o: _shapes(N, i, o, turned=False)


@grader(
    "fp8_training.scale_shapes",
    minutes=5,
    reference=lambda: _shapes,
    wrong={"short": _floor, "tokens": _never_turned},
)
def scale_shapes() -> Iterator[Case]:
    yield Case(
        (512, 256, 384),
        same(_shapes(512, 256, 384)),
        says="512 tokens, 256 inputs, 384 outputs: whole tiles everywhere",
        hint=(
            "Wgrad sums over tokens: one scale per channel and 128 tokens, channels first. The weight has one scale "
            "for each block of 128×128."
        ),
    )
    yield Case(
        (200, 7168, 576),
        same(_shapes(200, 7168, 576)),
        says="V3's kv_a_proj_with_mqa on 200 tokens: ragged outputs and tokens",
        hint="576 are four and a half tiles. The last tile of an axis may be short, but it has a scale: round up.",
    )


# Bytes kept ----------------------------------------------------------------------------------------------------------
def _kept(n: int, form: str) -> int:
    if form == "bf16":
        return 2 * n
    return (n if form == "e4m3" else math.ceil(1.5 * n)) + 4 * _tiles(n)


def _no_scales() -> Solution:
    return lambda n, form: _kept(n, form) - (0 if form == "bf16" else 4 * _tiles(n))


@grader("fp8_training.kept_bytes", minutes=10, reference=lambda: _kept, wrong={"scales": _no_scales})
def kept_bytes() -> Iterator[Case]:
    yield Case((7168, "bf16"), same(14336), says="an input of V3's width in BF16", hint="Two bytes a number.")
    yield Case(
        (7168, "e4m3"),
        same(7392),
        says="the same in E4M3",
        hint="A byte a number, and the scales: 4 bytes for every 128.",
    )
    yield Case(
        (16384, "e5m6"),
        same(25088),
        says="the input of V3's o_proj in E5M6",
        hint="Twelve bits a number: two numbers in three bytes. And the scales, in fp32.",
    )
    yield Case((576, "e4m3"), same(596), says="576 numbers", hint="The last tile is short and has a scale as well: 5.")


# The backward pass ---------------------------------------------------------------------------------------------------
def _backward(dy: Tensor, x: Pair, w: Pair) -> tuple[Tensor, Tensor]:
    transposed = w[0].t().contiguous(), w[1].t().contiguous()
    dx = fp8.fp8_gemm(*fp8.quantize_activation(dy), *transposed, torch.float32)
    return dx, fp8.fp8_gemm(*fp8.quantize_columns(dy), *fp8.requantize_columns(*x), torch.float32)


def _exact_dy() -> Solution:
    def solution(dy: Tensor, x: Pair, w: Pair) -> tuple[Tensor, Tensor]:
        return dy @ fp8.dequantize_weight(*w), dy.t() @ fp8.dequantize_activation(*x)

    return solution


def _rows_of_dy() -> Solution:
    def solution(dy: Tensor, x: Pair, w: Pair) -> tuple[Tensor, Tensor]:
        by_rows = fp8.dequantize_activation(*fp8.quantize_activation(dy))
        return _backward(dy, x, w)[0], by_rows.t() @ fp8.dequantize_activation(*fp8.requantize_columns(*x)).t()

    return solution


def _scales_stay() -> Solution:
    def solution(dy: Tensor, x: Pair, w: Pair) -> tuple[Tensor, Tensor]:
        wrong = w[0].t().contiguous(), w[1].reshape(w[1].t().shape)
        dx = fp8.fp8_gemm(*fp8.quantize_activation(dy), *wrong, torch.float32)
        return dx, _backward(dy, x, w)[1]

    return solution


def _two(expected: tuple[Tensor, Tensor]) -> Callable[[Any], str | None]:
    """A judge of (dx, dw): to rounding of fp32 sums, far below what a quantisation more or less would change."""

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(t, Tensor) for t in answer):
            return "expected a pair of tensors, (dx, dw)"
        for name, got, right in zip(("dx", "dw"), answer, expected, strict=True):
            if got.shape != right.shape:
                return f"{name} is {list(got.shape)}, expected {list(right.shape)}"
            error = float((got.float() - right).norm() / right.norm())
            if not error < 1e-4:
                return f"{name} is off by {error:.1%} of its norm"
        return None

    return judge


@grader(
    "fp8_training.backward",
    minutes=20,
    level="medium",
    reference=lambda: _backward,
    wrong={"dy too": _exact_dy, "twice": _rows_of_dy, "scales": _scales_stay},
)
def backward() -> Iterator[Case]:
    g = torch.Generator().manual_seed(0)
    for N, i, o, says in ((100, 64, 48, "one tile each way"), (200, 300, 130, "several tiles, ragged ones among them")):
        x, w, dy = (torch.randn(s, generator=g) for s in ((N, i), (o, i), (N, o)))
        w *= torch.logspace(-1, 1, i)  # blocks that differ
        pairs = fp8.quantize_activation(x), fp8.quantize_weight(w)
        yield Case(
            (dy, *pairs),
            _two(_backward(dy, *pairs)),
            says=f"dy {list(dy.shape)}, x {list(x.shape)}, W {list(w.shape)}: {says}",
            hint=(
                "dx = dy·W with dy in 1×128 tiles; transpose the weight's codes and its scales both. dw = dyᵀ·x is "
                "[outputs, inputs], both factors in 128×1 tiles: dy too must be quantised (so twice in all, once each "
                "way), and x's kept codes again."
            ),
        )


# A fair comparison ---------------------------------------------------------------------------------------------------
def _paired(a: list[float], b: list[float], error: bool = True) -> tuple[float, float]:
    d = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64) - 1
    spread = d.std().item()
    return d.mean().item(), spread / len(a) ** 0.5 if error else spread


def _spread() -> Solution:
    return lambda a, b: _paired(a, b, error=False)


def _unpaired() -> Solution:
    def solution(a: list[float], b: list[float]) -> tuple[float, float]:
        x, y = torch.tensor(a), torch.tensor(b)
        error = ((x.var() + y.var()) / len(a)).sqrt() / y.mean()
        return (x.mean() / y.mean() - 1).item(), error.item()

    return solution


def _numbers(expected: tuple[float, float]) -> Callable[[Any], str | None]:
    return lambda answer: close(torch.tensor(expected), rtol=1e-3, atol=1e-7)(torch.tensor(answer).float())


@grader(
    "fp8_training.paired",
    minutes=10,
    level="medium",
    reference=lambda: lambda a, b: _paired(a, b),
    wrong={"√n": _spread, "each seed": _unpaired},
)
def paired() -> Iterator[Case]:
    a, b = [2.02, 3.03, 4.04, 5.05], [2.0, 3.0, 4.0, 5.0]
    yield Case(
        (a, b),
        _numbers((0.01, 0.0)),
        says="four seeds, each exactly 1 % above",
        hint=(
            "A relative difference for each seed first, and only then mean and error: runs of one seed share weights "
            "and text, and what they have in common cancels."
        ),
    )
    a, b = [3.0, 3.3, 3.06], [3.0, 3.0, 3.0]
    yield Case(
        (a, b),
        _numbers(_paired(a, b)),
        says="three seeds: +0 %, +10 %, +2 %",
        hint="The error of a mean is the standard deviation (with n − 1) divided by √n.",
    )


# A cache of codes ----------------------------------------------------------------------------------------------------
def _cache(quantise: Solution) -> Solution:
    seen: dict[str, Any] = {"weight": None, "version": None, "codes": None}

    def codes(weight: Tensor) -> Any:
        if seen["weight"] is not weight or seen["version"] != weight._version:
            seen.update(weight=weight, version=weight._version, codes=quantise(weight))
        return seen["codes"]

    return codes


def _no_cache() -> Solution:
    return lambda quantise: lambda weight: quantise(weight)


def _by_weight() -> Solution:
    def make(quantise: Solution) -> Solution:
        seen: dict[int, Any] = {}
        return lambda weight: seen.setdefault(id(weight), quantise(weight) if id(weight) not in seen else None)

    return make


def _by_version() -> Solution:
    def make(quantise: Solution) -> Solution:
        seen: dict[int, Any] = {}

        def codes(weight: Tensor) -> Any:
            if weight._version not in seen:
                seen[weight._version] = quantise(weight)
            return seen[weight._version]

        return codes

    return make


def _play(change: str, made: list[int]) -> Callable[[Any], str | None]:
    """A judge that uses the reader's cache: a weight three times, with something happening before the third."""

    def judge(codes: Any) -> str | None:
        if not callable(codes):
            return "expected a function of a weight"
        made.clear()
        weight = torch.nn.Parameter(torch.ones(4))
        codes(weight)
        codes(weight)
        if len(made) != 1:
            return f"two uses of an unchanged weight called quantise {len(made)} times"
        if change == "step":
            with torch.no_grad():
                weight.add_(1)
        if change == "other":
            weight = torch.nn.Parameter(torch.full((4,), 3.0))
        if not torch.equal(codes(weight), weight.detach()):
            return f"got the codes {codes(weight).tolist()} of a weight that is {weight.tolist()}"
        return None

    return judge


@grader(
    "fp8_training.cache",
    minutes=30,
    level="hard",
    reference=lambda: _cache,
    wrong={"once": _no_cache, "_version": _by_weight, "which weight": _by_version},
)
def cache() -> Iterator[Case]:
    made: list[int] = []

    def quantise(weight: Tensor) -> Tensor:
        made.append(1)
        return weight.detach().clone()

    for change, says, hint in (
        ("", "the same weight again and again", "An unchanged weight must be quantised once: keep the codes."),
        ("step", "an optimiser's step in between", "The weight is the same object, but weight._version has risen."),
        ("other", "another weight, changed as often", "Remember which weight the codes are of, not only its version."),
    ):
        yield Case((quantise,), _play(change, made), says=says, hint=hint)
