"""Graders of chapter 3: rotations of pairs, and weights reordered for code that pairs halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tensor_judge(expected: Tensor, mistakes: Mapping[str, Tensor]) -> Callable[[Any], str | None]:
    """`close(expected)`, which adds the name of a usual mistake if the answer is what that mistake gives."""
    right = close(expected, rtol=1e-4, atol=1e-5)

    def judge(answer: Any) -> str | None:
        problem = right(answer)
        if problem is None:
            return None
        same = (text for text, wrong in mistakes.items() if close(wrong, rtol=1e-4, atol=1e-5)(answer) is None)
        why = next(same, "")
        return f"{problem}\n{why}" if why else problem

    return judge


# One pair ------------------------------------------------------------------------------------------------------------
def _pair(x: Tensor, angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack([x[0] * c - x[1] * s, x[0] * s + x[1] * c])


def _pair_backwards() -> Solution:
    return lambda x, angle: _pair(x, -angle)


def _pair_in_degrees() -> Solution:
    return lambda x, angle: _pair(x, math.radians(angle))


def _pair_in_place() -> Solution:
    def rotate(x: Tensor, angle: float) -> Tensor:
        y = x.clone()
        y[0] = y[0] * math.cos(angle) - y[1] * math.sin(angle)
        y[1] = y[0] * math.sin(angle) + y[1] * math.cos(angle)
        return y

    return rotate


@grader(
    "rope.rotate_pair",
    minutes=5,
    reference=lambda: _pair,
    wrong={"sign": _pair_backwards, "radians": _pair_in_degrees, "overwritten": _pair_in_place},
)
def rotate_pair() -> Iterator[Case]:
    """Two numbers, turned."""
    for x, angle, says in (
        ([1.0, 0.0], math.pi / 2, "a quarter turn sends (1, 0) to (0, 1)"),
        ([0.0, 1.0], math.pi / 2, "and (0, 1) to (−1, 0)"),
        ([3.0, 4.0], 0.5, "any pair, any angle"),
    ):
        pair = torch.tensor(x)
        mistakes = {
            "That is the turn the other way: look at the sign of the two sines.": _pair_backwards()(pair, angle),
            "That takes the angle for degrees: it is in radians.": _pair_in_degrees()(pair, angle),
            "The first number was overwritten before the second was computed from it.": _pair_in_place()(pair, angle),
        }
        hint = "The two rows of the matrix are (cos, −sin) and (sin, cos)."
        yield Case((pair, angle), tensor_judge(_pair(pair, angle), mistakes), says=says, hint=hint)


# All pairs -----------------------------------------------------------------------------------------------------------
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _rotate_halves() -> Solution:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (a, b), cos, sin = x.chunk(2, -1), cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    return rotate


def _rotate_apart() -> Solution:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = _rotate(x, cos, sin)
        return torch.cat([y[..., 0::2], y[..., 1::2]], dim=-1)

    return rotate


def _rotate_by_head() -> Solution:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)

    return rotate


def _rotate_backwards() -> Solution:
    return lambda x, cos, sin: _rotate(x, cos, -sin)


@grader(
    "rope.rotate",
    minutes=15,
    level="medium",
    reference=lambda: _rotate,
    wrong={
        "neighbours": _rotate_halves,
        "places": _rotate_apart,
        "position": _rotate_by_head,
        "sign": _rotate_backwards,
    },
)
def rotate() -> Iterator[Case]:
    """Every neighbouring pair of [B, T, H, R], by the angle of its position and pair."""
    # As many tokens as heads, so that angles laid along the wrong axis broadcast without an error.
    for shape, says in (((1, 2, 2, 4), "two tokens, two heads, two pairs"), ((2, 5, 3, 8), "larger")):
        x = random_tensor(*shape)
        _, T, heads, R = shape
        turned = torch.outer(torch.arange(T) + 1.0, 10 ** -torch.arange(0, 1, 2 / R))
        args = (x, turned.cos(), turned.sin())
        mistakes = {
            "That pairs number j with number j + R/2; here neighbours are pairs: 0 and 1, 2 and 3.": _rotate_halves(),
            "The pairs are turned rightly but written apart: put them back into their places.": _rotate_apart(),
            "That turns the other way: look at the sign of the sines.": _rotate_backwards(),
        }
        if heads == T:
            mistakes["The angle belongs to the position, axis 1 of x; that lays it along the heads."] = (
                _rotate_by_head()
            )
        answers = {text: wrong(*args) for text, wrong in mistakes.items()}
        hint = "cos and sin are [T, R/2], x is [B, T, H, R]: give them an axis for the heads, and take x[..., 0::2]."
        yield Case(args, tensor_judge(_rotate(*args), answers), says=says, hint=hint)


# Weights for the other convention ------------------------------------------------------------------------------------
def _to_halves(weight: Tensor, heads: int, content: int, rope: int) -> Tensor:
    rows = weight.unflatten(0, (heads, content + rope))
    turned = rows[:, content:]
    return torch.cat([rows[:, :content], turned[:, 0::2], turned[:, 1::2]], dim=1).flatten(0, 1)


def _halves_everything() -> Solution:
    return lambda weight, heads, content, rope: _to_halves(weight, heads, 0, content + rope)


def _halves_inverse() -> Solution:
    def convert(weight: Tensor, heads: int, content: int, rope: int) -> Tensor:
        order = _to_halves(torch.arange(len(weight)), heads, content, rope)
        return weight[order.argsort()]

    return convert


def _halves_last_head() -> Solution:
    return lambda weight, heads, content, rope: _to_halves(weight, 1, len(weight) - rope, rope)


@grader(
    "rope.to_halves",
    minutes=25,
    level="medium",
    reference=lambda: _to_halves,
    wrong={"content": _halves_everything, "way back": _halves_inverse, "every head": _halves_last_head},
)
def to_halves() -> Iterator[Case]:
    """Rows of a projection, reordered so that code which pairs halves gives the same scores."""
    for (heads, content, R), says in (((2, 2, 6), "two heads of 2 + 6"), ((1, 4, 8), "one shared key behind a latent")):
        weight = random_tensor(heads * (content + R), 3)
        args = (weight, heads, content, R)
        mistakes = {
            "The content rows moved too: only the last R rows of a head are turned.": _halves_everything(),
            "That is the way back: first members must come first, (a0, b0, a1, b1 …) to (a0, a1 … b0, b1 …).": (
                _halves_inverse()
            ),
        }
        if heads > 1:
            mistakes["Only the last head changed; every head has R rows of its own."] = _halves_last_head()
        answers = {text: wrong(*args) for text, wrong in mistakes.items()}
        hint = "Look at the weight as [heads, content + R, inputs]; in each head, keep the content, reorder the rest."
        yield Case(args, tensor_judge(_to_halves(*args), answers), says=says, hint=hint)
