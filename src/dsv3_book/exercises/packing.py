"""Graders of chapter 2: where windows begin, and an order that is computed instead of stored."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from dsv3_book.exercises.data import list_judge
from dsv3_book.exercises.grading import Case, Solution, grader


# Windows -------------------------------------------------------------------------------------------------------------
def _starts(tokens: int, T: int, J: int) -> list[int]:
    return list(range(0, tokens - (T + 1 + J) + 1, T))


def _starts_disjoint() -> Solution:
    return lambda tokens, T, J: list(range(0, tokens - (T + 1 + J) + 1, T + 1 + J))


def _starts_one_short() -> Solution:
    return lambda tokens, T, J: list(range(0, tokens - (T + 1 + J), T))


def _starts_past_the_end() -> Solution:
    return lambda tokens, T, J: list(range(0, tokens - 1, T))


@grader(
    "packing.starts",
    minutes=15,
    level="medium",
    reference=lambda: _starts,
    wrong={"never a target": _starts_disjoint, "one more": _starts_one_short, "past the end": _starts_past_the_end},
)
def starts() -> Iterator[Case]:
    """Where training windows begin, so that each token but the first is the main model's target once."""
    for args, says in (
        ((10, 4, 0), "10 tokens, T = 4: windows 0 … 4 and 4 … 8"),
        ((11, 4, 1), "with one MTP token: 0 … 5 and 4 … 9"),
        ((13, 4, 0), "a window that ends on the very last token"),
        ((1000, 64, 2), "larger"),
    ):
        mistakes = {
            "Windows don't overlap there, so a token between two of them is never a target.": _starts_disjoint()(*args),
            "There is room for one more window.": _starts_one_short()(*args),
            "The last window reaches past the end of the tokens.": _starts_past_the_end()(*args),
        }
        hint = "A window is T + 1 + J tokens long, but the next one begins T tokens later."
        yield Case(args, list_judge(_starts(*args), mistakes), says=says, hint=hint)


# An order that is computed -------------------------------------------------------------------------------------------
def _order(numbers: Sequence[int], n: int, seed: int) -> list[int]:
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def once(x: int) -> int:
        left, right = x >> half, x & mask
        for turn in range(4):
            left, right = right, left ^ (random.Random(f"{seed}/{turn}/{right}").getrandbits(64) & mask)
        return left << half | right

    out = []
    for number in numbers:
        x = once(number)
        while x >= n:
            x = once(x)
        out.append(x)
    return out


def _order_hash() -> Solution:
    return lambda numbers, n, seed: [random.Random(f"{seed}/{i}").randrange(n) for i in numbers]


def _order_list() -> Solution:
    def order(numbers: Sequence[int], n: int, seed: int) -> list[int]:
        everything = list(range(n))
        random.Random(seed).shuffle(everything)
        return [everything[i] for i in numbers]

    return order


def _order_state() -> Solution:
    return lambda numbers, n, seed: random.sample(range(n), len(numbers))


def _order_no_seed() -> Solution:
    return lambda numbers, n, seed: _order(numbers, n, 0)


def _order_stride() -> Solution:
    def order(numbers: Sequence[int], n: int, seed: int) -> list[int]:
        step = next(a for a in range(n // 3 + seed + 2, 2 * n + seed + 2) if math.gcd(a, n) == 1)
        return [(step * i + seed) % n for i in numbers]

    return order


@grader(
    "packing.order",
    minutes=45,
    level="hard",
    reference=lambda: _order,
    wrong={
        "more than once": _order_hash,
        "MemoryError": _order_list,
        "same number": _order_state,
        "seed": _order_no_seed,
        "stride": _order_stride,
    },
)
def order() -> Iterator[Case]:
    """A shuffle of 0 … n-1, asked for in pieces, that stores nothing."""
    seen: dict[int, list[int]] = {}

    def judge(numbers: Sequence[int], n: int, seed: int) -> Callable[[Any], str | None]:
        def of(answer: Any) -> str | None:
            given = [int(x) for x in answer]
            if len(given) != len(numbers):
                return f"returned {len(given)} numbers for {len(numbers)}"
            if bad := [x for x in given if not 0 <= x < n]:
                return f"{bad[0]} is not in 0 … {n - 1}"
            if len(set(numbers)) == 1:
                return None if len(set(given)) == 1 else f"the same number was sent to {given[:3]}: a state is kept"
            if len(set(given)) < len(given):
                twice = next(x for x in given if given.count(x) > 1)
                return f"{twice} comes more than once, so another window never comes: not a permutation"
            if len({(b - a) % n for a, b in pairwise(given)}) == 1 and len(given) > 3:
                return "neighbours always lie the same stride apart: that is hardly a shuffle"
            if len(given) == n and any(given == other for s, other in seen.items() if s != seed):
                return "two different seeds give the same order"
            if len(given) == n:
                seen[seed] = given
            return None

        return of

    hint = "Cut the number's bits in two halves, xor one with a hash of the other, swap; repeat until it is below n."
    for args, says in (
        (([5] * 20, 100, 0), "number 5, asked for twenty times"),
        ((list(range(100)), 100, 0), "all of 100"),
        ((list(range(100)), 100, 1), "all of 100, with another seed"),
        ((list(range(37)), 37, 2), "37, which is no power of two"),
        (([0, 1, 2, 3, 10**15 - 1], 10**15, 3), "five of a million billion: no list of all of them fits anywhere"),
    ):
        yield Case(args, judge(*args), says=says, hint=hint)
