"""Grader of chapter 7 on the training recipe: the learning rate as a function of the tokens seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from dsv3_book.exercises.grading import Case, Solution, grader
from dsv3_book.train.recipe import Recipe

V3 = Recipe()
PEAK, LOW, FINAL = V3.peak_lr, V3.low_lr, V3.final_lr


def _with(cosine: Callable[[float], float], final: float = FINAL, warmup: bool = True) -> Solution:
    """A learning rate whose fall from PEAK at 10T tokens to 14.3T is `cosine(tokens)`."""

    def learning_rate(step: int, tokens: float) -> float:
        if warmup and step + 1 < 2000:
            return PEAK * (step + 1) / 2000
        if tokens < 10e12:
            return PEAK
        if tokens < 14.3e12:
            return cosine(tokens)
        return LOW if tokens < 14.633e12 else final

    return learning_rate


def _cosine(tokens: float, low: float = LOW, turns: float = 1.0) -> float:
    return low + (PEAK - low) * (1 + math.cos(turns * math.pi * (tokens - 10e12) / 4.3e12)) / 2


def _line(tokens: float) -> float:
    return PEAK + (LOW - PEAK) * (tokens - 10e12) / 4.3e12


def _near(expected: float, mistakes: dict[str, float]) -> Callable[[float], str | None]:
    def judge(answer: float) -> str | None:
        if math.isclose(answer, expected, rel_tol=1e-6):
            return None
        why = next((f" ({what})" for what, value in mistakes.items() if math.isclose(answer, value, rel_tol=1e-6)), "")
        return f"returned {answer!r}{why}, expected {expected!r}"

    return judge


@grader(
    "recipe.learning_rate",
    minutes=20,
    level="medium",
    reference=lambda: V3.lr,
    wrong={
        "warm-up": lambda: _with(_cosine, warmup=False),
        "zero": lambda: _with(lambda tokens: _cosine(tokens, low=0.0)),
        "straight": lambda: _with(_line),
        "half a turn": lambda: _with(lambda tokens: _cosine(tokens, turns=2.0)),
        "167B": lambda: _with(_cosine, final=LOW),
    },
)
def learning_rate() -> Iterator[Case]:
    """V3's learning rate at a step (from 0) that is taken after so many tokens."""
    hint = "Warm-up counts steps, everything else tokens; check the five stretches one after the other."
    for step, tokens, says in (
        (0, 0.0, "the very first step takes 1/2000 of the peak"),
        (999, 12.6e9, "half-way through the warm-up"),
        (1999, 25.2e9, "the end of the warm-up"),
        (90_000, 5e12, "the long constant"),
        (190_000, 11e12, "a quarter into the cosine"),
        (210_000, 12.15e12, "the middle of the cosine"),
        (240_000, 14.5e12, "the first low constant"),
        (242_000, 14.7e12, "the very end"),
    ):
        mistakes: dict[str, float] = {}
        if step < 1999:
            mistakes["that is the peak: the warm-up is missing"] = PEAK
        if 10e12 < tokens < 14.3e12:
            mistakes |= {
                "that cosine ends at zero, not at 2.2e-5": _cosine(tokens, low=0.0),
                "that is a straight line, not a cosine": _line(tokens),
                "the cosine goes through half a turn, from 1 to −1, not a whole one": _cosine(tokens, turns=2.0),
            }
        if tokens > 14.633e12:
            mistakes["the last 167B tokens have a rate of their own"] = LOW
        yield Case((step, tokens), _near(V3.lr(step, tokens), mistakes), says=says, hint=hint)
