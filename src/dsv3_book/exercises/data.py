"""Graders of chapter 2: merges applied, bits per byte, Fill-in-Middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dsv3_book.exercises.grading import Case, Solution, grader


def list_judge(expected: list[Any], mistakes: Mapping[str, Any]) -> Callable[[Any], str | None]:
    """A judge for lists that knows what the usual mistakes would return: text -> that answer."""

    def judge(answer: Any) -> str | None:
        try:
            given = [x.item() if hasattr(x, "item") else x for x in answer]
        except TypeError:
            return f"returned {answer!r}, expected a list"
        if given == expected:
            return None
        why = next((f"\n{text}" for text, wrong in mistakes.items() if wrong == given), "")
        return f"returned  {given}\nexpected  {expected}{why}"

    return judge


# Encoding with merges ------------------------------------------------------------------------------------------------
def _encode(text: str, merges: list[tuple[str, str]]) -> list[str]:
    symbols = list(text)
    for a, b in merges:
        out: list[str] = []
        for symbol in symbols:
            # What was merged just now is a + b, which is not a, so `aaa` becomes `aa`, `a`.
            if out and out[-1] == a and symbol == b:
                out[-1] = a + b
            else:
                out.append(symbol)
        symbols = out
    return symbols


def _encode_longest() -> Solution:
    def encode(text: str, merges: list[tuple[str, str]]) -> list[str]:
        known = {a + b for a, b in merges} | set(text)
        out, at = [], 0
        while at < len(text):
            end = next(e for e in range(len(text), at, -1) if text[at:e] in known)
            out.append(text[at:end])
            at = end
        return out

    return encode


def _encode_first_only() -> Solution:
    def encode(text: str, merges: list[tuple[str, str]]) -> list[str]:
        symbols = list(text)
        for a, b in merges:
            for i in range(len(symbols) - 1):
                if (symbols[i], symbols[i + 1]) == (a, b):
                    symbols[i : i + 2] = [a + b]
                    break
        return symbols

    return encode


def _encode_overlapping() -> Solution:
    def encode(text: str, merges: list[tuple[str, str]]) -> list[str]:
        symbols = list(text)
        for a, b in merges:
            pairs = list(zip(symbols, symbols[1:] + [""], strict=True))
            after = {i + 1 for i, pair in enumerate(pairs) if pair == (a, b)}
            symbols = [a + b if p == (a, b) else p[0] for i, p in enumerate(pairs) if p == (a, b) or i not in after]
        return symbols

    return encode


@grader(
    "data.bpe_encode",
    minutes=10,
    reference=lambda: _encode,
    wrong={"order": _encode_longest, "every place": _encode_first_only, "overlap": _encode_overlapping},
)
def bpe_encode() -> Iterator[Case]:
    """A text's tokens, given the merges in the order in which they were learned."""
    toy = [("h", "e"), ("t", "he"), ("he", "m")]
    for args, says in (
        (("then", toy), "the toy's merges"),
        (("them", toy), "`the` was learned before `hem`"),
        (("abc", [("b", "c"), ("a", "b")]), "two merges that want the same letter"),
        (("abab", [("a", "b")]), "the same pair twice"),
        (("aaa", [("a", "a")]), "three equal letters"),
        (("xyz", []), "nothing learned yet"),
    ):
        mistakes = {
            "That takes the longest token that fits; BPE applies merges in the order they were learned.": (
                _encode_longest()(*args)
            ),
            "A merge happens in every place where the pair stands, not in the first one only.": (
                _encode_first_only()(*args)
            ),
            "A letter was used twice: merged pairs must not overlap.": _encode_overlapping()(*args),
        }
        hint = "For each merge in turn, go through the symbols from the left and join the pair wherever it stands."
        yield Case(args, list_judge(_encode(*args), mistakes), says=says, hint=hint)


# Bits per byte -------------------------------------------------------------------------------------------------------
def _bits_per_byte(losses: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(losses) / math.log(2) / sum(sizes)


def _nats_per_byte() -> Solution:
    return lambda losses, sizes: sum(losses) / sum(sizes)


def _without_specials() -> Solution:
    return lambda losses, sizes: _bits_per_byte([x for x, n in zip(losses, sizes, strict=True) if n], sizes)


def _bits_per_token() -> Solution:
    return lambda losses, sizes: sum(losses) / math.log(2) / len(losses)


def _mean_of_ratios() -> Solution:
    def bits(losses: Sequence[float], sizes: Sequence[int]) -> float:
        ratios = [x / n for x, n in zip(losses, sizes, strict=True) if n]
        return sum(ratios) / len(ratios) / math.log(2)

    return bits


@grader(
    "data.bits_per_byte",
    minutes=5,
    reference=lambda: _bits_per_byte,
    wrong={"nats": _nats_per_byte, "eos": _without_specials, "per token": _bits_per_token, "weight": _mean_of_ratios},
)
def bits_per_byte() -> Iterator[Case]:
    """From the loss of each predicted token, in nats, and the bytes that it stands for."""
    bit = math.log(2)
    for args, says in (
        (([3 * bit, 5 * bit, 2 * bit], [2, 3, 0]), "`hi` `all` eos: 3 + 5 + 2 bits for 5 bytes"),
        (([1.0, 0.25, 4.0, 0.5], [1, 7, 2, 0]), "any losses"),
    ):
        losses, sizes = args
        right = _bits_per_byte(losses, sizes)
        mistakes = {
            "that is in nats: a nat is 1/ln 2 bits": _nats_per_byte()(losses, sizes),
            "the loss of eos is missing: it stands for no bytes, but must be predicted too": (
                _without_specials()(losses, sizes)
            ),
            "that is bits per token": _bits_per_token()(losses, sizes),
            "a mean of ratios gives short tokens too much weight: divide sums": _mean_of_ratios()(losses, sizes),
        }

        def judge(answer: Any, right: float = right, mistakes: Mapping[str, float] = mistakes) -> str | None:
            if math.isclose(answer, right, rel_tol=1e-6):
                return None
            why = next((f" ({t})" for t, x in mistakes.items() if math.isclose(answer, x, rel_tol=1e-6)), "")
            return f"returned {answer!r}{why}, expected {right!r}"

        yield Case(args, judge, says=says, hint="All bits that were paid, divided by all bytes that were bought.")


# Fill-in-Middle ------------------------------------------------------------------------------------------------------
Marks = tuple[int, int, int, int, int]  # bos, eos, begin, hole, end


def _fim(ids: list[int], start: int, end: int, marks: Marks) -> list[int]:
    bos, eos, fim_begin, fim_hole, fim_end = marks
    return [bos, fim_begin, *ids[:start], fim_hole, *ids[end:], fim_end, *ids[start:end], eos]


def _fim_in_place() -> Solution:
    def frame(ids: list[int], start: int, end: int, marks: Marks) -> list[int]:
        bos, eos, a, b, c = marks
        return [bos, a, *ids[:start], b, *ids[start:end], c, *ids[end:], eos]

    return frame


def _fim_suffix_first() -> Solution:
    def frame(ids: list[int], start: int, end: int, marks: Marks) -> list[int]:
        bos, eos, a, b, c = marks
        return [bos, a, *ids[end:], b, *ids[:start], c, *ids[start:end], eos]

    return frame


def _fim_no_frame() -> Solution:
    return lambda ids, start, end, marks: _fim(ids, start, end, marks)[1:-1]


def _fim_early_eos() -> Solution:
    def frame(ids: list[int], start: int, end: int, marks: Marks) -> list[int]:
        bos, eos, a, b, c = marks
        return [bos, a, *ids[:start], b, *ids[end:], eos, c, *ids[start:end]]

    return frame


@grader(
    "data.fim",
    minutes=10,
    reference=lambda: _fim,
    wrong={
        "middle comes last": _fim_in_place,
        "prefix comes first": _fim_suffix_first,
        "bos and eos": _fim_no_frame,
        "eos closes": _fim_early_eos,
    },
)
def fim() -> Iterator[Case]:
    """A document's ids, cut in two places, in prefix-suffix-middle order and framed."""
    marks: Marks = (0, 1, 4, 3, 5)
    for ids, start, end, says in (
        ([10, 11, 12, 13, 14], 2, 3, "one token in the middle"),
        ([10, 11, 12, 13, 14], 1, 4, "three in the middle"),
        ([10, 11, 12], 0, 3, "everything is middle: prefix and suffix are empty"),
        ([10, 11, 12], 1, 1, "nothing is middle"),
    ):
        args = (ids, start, end, marks)
        mistakes = {
            "The parts stand in the text's order; the middle comes last.": _fim_in_place()(*args),
            "That is suffix-prefix-middle; in PSM the prefix comes first.": _fim_suffix_first()(*args),
            "The document's frame is missing: bos and eos.": _fim_no_frame()(*args),
            "eos closes the whole document, after the middle.": _fim_early_eos()(*args),
        }
        hint = "bos, begin, prefix, hole, suffix, end, middle, eos."
        yield Case(args, list_judge(_fim(*args), mistakes), says=says, hint=hint)
