"""Graders of chapter 14: how much is hidden, an order for a pair, and the driver of a pair."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from dsv3_book.exercises.grading import Case, Solution, close, grader
from dsv3_book.pipeline.overlap import ORDER
from dsv3_book.pipeline.pair import RELEASED, Layer, pair

Intervals = Sequence[tuple[float, float]]


# How much is hidden --------------------------------------------------------------------------------------------------
def _hidden(twice: bool = False, any_touch: bool = False) -> Solution:
    def solution(travels: Intervals, computes: Intervals) -> float:
        total = 0.0
        for begin, end in travels:
            shares = [min(end, b) - max(begin, a) for a, b in computes]
            if any_touch:
                total += (end - begin) * any(share > 0 for share in shares)
            else:
                total += sum(share if twice else max(0.0, share) for share in shares)
        return total

    return solution


@grader(
    "overlap.hidden",
    minutes=10,
    level="easy",
    reference=lambda: _hidden(),
    wrong={"negative": lambda: _hidden(twice=True), "part": lambda: _hidden(any_touch=True)},
)
def hidden():
    yield Case(
        ([(0.0, 4.0)], [(1.0, 2.0), (3.0, 6.0)]),
        close(2.0),
        says="a transfer from 0 to 4 over computations 1–2 and 3–6",
        hint="Only the part of a transfer that lies under a computation is hidden.",
    )
    yield Case(
        ([(0.0, 1.0), (5.0, 7.0)], [(2.0, 3.0), (6.0, 9.0)]),
        close(1.0),
        says="a transfer with no computation beside it",
        hint="Two intervals that don't meet share nothing, not a negative time: take the max with 0.",
    )
    yield Case(([], [(0.0, 1.0)]), close(0.0), says="no transfer at all", hint="The sum over nothing is 0.")


# An order for a pair -------------------------------------------------------------------------------------------------
SLOW_LINKS: Layer = {
    "attention(F)": 3.0,
    "mlp(F)": 3.0,
    "attention(B)": 6.0,
    "mlp(B)": 3.0,
    "attention(W)": 2.0,
    "mlp(W)": 3.0,
    "dispatch(F)": 4.0,
    "combine(F)": 6.0,
    "dispatch(B)": 6.0,
    "combine(B)": 4.0,
}


def _judge_order(bound: float) -> Callable[[Any], str | None]:
    def judge(order: Any) -> str | None:
        try:
            span = pair([SLOW_LINKS] * 4, [SLOW_LINKS] * 4, tuple(order)).span
        except (ValueError, TypeError) as error:
            return f"can't run: {error}"
        return None if span <= bound + 1e-9 else f"takes {span:g}, more than {bound:g}"

    return judge


def _forward_then_backward() -> Solution:
    forward = ("attention(F)", "dispatch(F)", "mlp(F)", "combine(F)")
    backward = ("combine(B)", "mlp(B)", "mlp(W)", "dispatch(B)", "attention(B)", "attention(W)")
    return lambda: forward + backward


@grader(
    "overlap.order",
    minutes=25,
    level="medium",
    reference=lambda: lambda: RELEASED,
    wrong={"tokens travel": _forward_then_backward},
)
def order():
    released = pair([SLOW_LINKS] * 4, [SLOW_LINKS] * 4).span
    yield Case(
        (),
        _judge_order(released),
        says=f"an order of the ten parts that needs no more than {released:g} for four layers",
        hint="While one chunk's tokens travel, let the other one compute: alternate them.",
    )


# The driver ----------------------------------------------------------------------------------------------------------
Parts = Generator[str, None, Any]


def _chunk(log: list[str], side: str, layers: Sequence[bool], result: str) -> Parts:
    """A chunk that writes down what it does; True is a layer with experts, False a dense one."""
    forward = ("attention", "dispatch", "mlp", "combine") if side == "F" else ()
    backward = ("combine", "mlp", "dispatch", "mlp W", "attention", "attention W") if side == "B" else ()
    dense = ("attention",) if side == "F" else ("attention", "attention W")
    for experts in layers:
        for part in (forward or backward) if experts else dense:
            yield part
            log.append(f"{side} {part}")
    return result


def _reference() -> Solution:
    def driver(forward: Parts, backward: Parts) -> tuple[Any, Any]:
        chunks, results = {"F": forward, "B": backward}, {"F": None, "B": None}
        coming: dict[str, str | None] = {side: next(chunk, None) for side, chunk in chunks.items()}

        def step(side: str) -> None:
            try:
                coming[side] = next(chunks[side])
            except StopIteration as stop:
                coming[side], results[side] = None, stop.value

        while any(coming.values()):
            both = all(coming.values())
            for side, part in ORDER:
                if coming[side] == part or (coming[side] and not both):
                    step(side)
        return results["F"], results["B"]

    return driver


def _in_turn() -> Solution:
    def driver(forward: Parts, backward: Parts) -> tuple[Any, Any]:
        def finish(chunk: Parts) -> Any:
            while True:
                try:
                    next(chunk)
                except StopIteration as stop:
                    return stop.value

        return finish(forward), finish(backward)

    return driver


def _no_results() -> Solution:
    def driver(forward: Parts, backward: Parts) -> tuple[Any, Any]:
        _reference()(forward, backward)
        return None, None

    return driver


def _case(f: Sequence[bool], b: Sequence[bool], says: str, hint: str) -> Case:
    expected: list[str] = []
    results = _reference()(_chunk(expected, "F", f, "y"), _chunk(expected, "B", b, "dx"))
    log: list[str] = []

    def judge(answer: Any) -> str | None:
        for number, (did, wanted) in enumerate(zip(log, expected, strict=False)):
            if did != wanted:
                return f"part number {number} was {did!r}, where the order has {wanted!r}"
        if len(log) < len(expected):
            return f"stopped after {len(log)} of {len(expected)} parts"
        return None if answer == results else f"returned {answer!r} instead of {results!r}, the chunks' own results"

    return Case((_chunk(log, "F", f, "y"), _chunk(log, "B", b, "dx")), judge, says, hint)


@grader(
    "overlap.driver",
    minutes=40,
    level="hard",
    reference=_reference,
    wrong={"order": _in_turn, "StopIteration": _no_results},
)
def driver():
    yield _case([True, True], [True, True], "two layers with experts in both chunks",
                "Go round the order; a chunk goes on only when its next part is the one named. What a generator "
                "returns is in StopIteration.value.")  # fmt: skip
    yield _case([False, True], [True], "a dense layer, and fewer layers backward than forward",
                "When one chunk has come to its end, run the other to its end, too.")  # fmt: skip
