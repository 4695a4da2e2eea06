"""Graders of chapter 3: absorption, when it pays, and attention over the latent cache in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, grader
from dsv3_book.exercises.rope import random_tensor, tensor_judge


# Absorption ----------------------------------------------------------------------------------------------------------
def _absorb(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    return torch.einsum("bthd,hdc->bthc", q_nope, w_uk)


def _absorb_transposed() -> Solution:
    return lambda q_nope, w_uk: torch.einsum("bthd,hcd->bthc", q_nope, w_uk)


def _absorb_first_head() -> Solution:
    return lambda q_nope, w_uk: torch.einsum("bthd,dc->bthc", q_nope, w_uk[0])


def _absorb_summed() -> Solution:
    return lambda q_nope, w_uk: torch.einsum("bthd,hdc->btc", q_nope, w_uk)


@grader(
    "mla.absorb",
    minutes=10,
    reference=lambda: _absorb,
    wrong={"W_UK itself": _absorb_transposed, "matrix of its own": _absorb_first_head, "summed": _absorb_summed},
)
def absorb() -> Iterator[Case]:
    """The query as the latent sees it."""
    for (B, T, heads, d, c), says in (
        ((1, 1, 2, 2, 2), "two heads, head and latent both of 2"),
        ((2, 3, 4, 5, 7), "a latent of another width"),
    ):
        args = (random_tensor(B, T, heads, d), random_tensor(heads, d, c))
        answers = {
            "Each head has a matrix of its own; that uses the first head's for all.": _absorb_first_head()(*args),
            "The heads were summed; each keeps a query of its own, [B, T, H, C].": _absorb_summed()(*args),
        }
        if d == c:
            answers["That multiplies by W_UK itself; the query needs its transpose: sum over Dh."] = (
                _absorb_transposed()(*args)
            )
        hint = (
            "q · (W c) = (Wᵀ q) · c, for each head: sum over Dh and keep the head, so [B, T, H, C]. "
            "If heads were summed, none has a query of its own any more."
        )
        yield Case(args, tensor_judge(_absorb(*args), answers), says=says, hint=hint)


# When it pays --------------------------------------------------------------------------------------------------------
def _crossing(Dh: int, R: int, Dv: int, C: int) -> float:
    return C * (Dh + Dv) / (2 * C - Dh - Dv)


def _crossing_one_sided_rope() -> Solution:
    return lambda Dh, R, Dv, C: C * (Dh + Dv) / (2 * C - Dh - R - Dv)


def _crossing_scores_only() -> Solution:
    return lambda Dh, R, Dv, C: C * (Dh + Dv) / (C - Dh)


def _crossing_keys_only() -> Solution:
    return lambda Dh, R, Dv, C: C * Dh / (2 * C - Dh - Dv)


@grader(
    "mla.crossing",
    minutes=15,
    level="medium",
    reference=lambda: _crossing,
    wrong={
        "position part": _crossing_one_sided_rope,
        "weighted sum": _crossing_scores_only,
        "values too": _crossing_keys_only,
    },
)
def crossing() -> Iterator[Case]:
    """New tokens at once from which expanding the past costs fewer FLOPs than absorbing."""
    for args, says in (((4, 2, 4, 8), "small"), ((128, 64, 128, 512), "V3"), ((32, 16, 48, 64), "unequal heads")):
        yield Case(
            args,
            _crossing_judge(args),
            says=says,
            hint="Expanding costs 2·C·H·(Dh + Dv) once per past token; each new token then saves on every past one.",
        )


def _crossing_judge(args: tuple[int, int, int, int]) -> Callable[[Any], str | None]:
    right = _crossing(*args)
    mistakes = {
        "the position part R is paid in both forms, so it cancels": _crossing_one_sided_rope(),
        "that compares scores only: the weighted sum over the past is cheaper too": _crossing_scores_only(),
        "expanding makes the values too, not only keys": _crossing_keys_only(),
    }

    def judge(answer: Any) -> str | None:
        value = float(answer)
        if abs(value - right) <= 1e-6 * right:
            return None
        why = next((f" ({text})" for text, f in mistakes.items() if abs(value - f(*args)) <= 1e-6 * abs(value)), "")
        return f"returned {value:g}{why}, expected {right:g}"

    return judge


# In blocks -----------------------------------------------------------------------------------------------------------
def _in_blocks(q: Tensor, cache: Tensor, C: int, scale: float, block: int) -> Tensor:
    top = torch.full((len(q), 1), -torch.inf)
    total, out = torch.zeros(len(q), 1), torch.zeros(len(q), C)
    for part in cache.split(block):
        scores = scale * q @ part.T
        new_top = torch.maximum(top, scores.max(dim=-1, keepdim=True).values)
        p, shrink = (scores - new_top).exp(), (top - new_top).exp()
        total = total * shrink + p.sum(dim=-1, keepdim=True)
        out = out * shrink + p @ part[:, :C]
        top = new_top
    return out / total


def _blocks_without_shrinking() -> Solution:
    def attend(q: Tensor, cache: Tensor, C: int, scale: float, block: int) -> Tensor:
        top = torch.full((len(q), 1), -torch.inf)
        total, out = torch.zeros(len(q), 1), torch.zeros(len(q), C)
        for part in cache.split(block):
            scores = scale * q @ part.T
            top = torch.maximum(top, scores.max(dim=-1, keepdim=True).values)
            p = (scores - top).exp()
            total, out = total + p.sum(dim=-1, keepdim=True), out + p @ part[:, :C]
        return out / total

    return attend


def _blocks_averaged() -> Solution:
    def attend(q: Tensor, cache: Tensor, C: int, scale: float, block: int) -> Tensor:
        parts = cache.split(block)
        return torch.stack([(scale * q @ p.T).softmax(-1) @ p[:, :C] for p in parts]).mean(0)

    return attend


def _blocks_without_maximum() -> Solution:
    def attend(q: Tensor, cache: Tensor, C: int, scale: float, block: int) -> Tensor:
        p = (scale * q @ cache.T).exp()
        return p @ cache[:, :C] / p.sum(-1, keepdim=True)

    return attend


@grader(
    "mla.in_blocks",
    minutes=60,
    level="hard",
    reference=lambda: _in_blocks,
    wrong={
        "shrink": _blocks_without_shrinking,
        "average": _blocks_averaged,
        "overflows": _blocks_without_maximum,
    },
)
def in_blocks() -> Iterator[Case]:
    """One new token's absorbed attention over a cache that is read in blocks."""
    for heads, c, r, tokens, block, size, says in (
        (2, 3, 2, 8, 4, 1.0, "two blocks"),
        (3, 4, 2, 11, 4, 2.0, "a last block that is short"),
        (2, 4, 2, 9, 4, 30.0, "scores of several hundred, whose exp overflows fp32"),
    ):
        args = (size * random_tensor(heads, c + r), random_tensor(tokens, c + r) * size**0.5, c, 0.5, block)
        answers = {
            "What was summed with a smaller maximum must shrink when a larger one turns up.": (
                _blocks_without_shrinking()(*args)
            ),
            "That is the average of the blocks' results; a block with larger scores weighs more.": (
                _blocks_averaged()(*args)
            ),
        }
        hint = (
            "Subtract the largest score so far before exp, which overflows otherwise; keep that maximum, the sum and "
            "the weighted sum, and rescale both sums when the maximum moves."
        )
        yield Case(args, tensor_judge(_in_blocks(*args), answers), says=says, hint=hint)
