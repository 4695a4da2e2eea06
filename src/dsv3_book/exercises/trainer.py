"""Graders of chapter 17: a rank's micro-batches, repeated work, a box filled from pieces, even stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader, same


# A rank's micro-batches ----------------------------------------------------------------------------------------------
def _share(rank: int, world: int, pp: int, sequences: int, micro: int) -> range:
    dp = world // pp
    each = sequences // (micro * dp)
    place = rank % dp
    return range(place * each, (place + 1) * each)


def _over_all_ranks() -> Solution:
    return lambda rank, world, pp, sequences, micro: _share(rank, world, 1, sequences, micro)


def _by_pipeline() -> Solution:
    return lambda rank, world, pp, sequences, micro: _share(rank // pp, world, pp, sequences, micro)


def _every_dpth() -> Solution:
    return lambda rank, world, pp, sequences, micro: range(rank % (world // pp), sequences // micro, world // pp)


def _in_sequences() -> Solution:
    return lambda rank, world, pp, sequences, micro: _share(rank, world, pp, sequences, 1)


@grader(
    "trainer.share",
    minutes=5,
    level="easy",
    reference=lambda: _share,
    wrong={
        "All ranks of a pipeline": _over_all_ranks,
        "rank % dp": _by_pipeline,
        "follow each other": _every_dpth,
        "micro-batches, not sequences": _in_sequences,
    },
)
def share() -> Iterator[Case]:
    yield Case(
        (1, 2, 1, 8, 1),
        same(range(4, 8)),
        says="two processes, each a pipeline of its own, eight sequences",
        hint="Each pipeline's micro-batches follow each other: rank 1 has the second half.",
    )
    yield Case(
        (1, 2, 2, 8, 1),
        same(range(8)),
        says="two processes that are one pipeline",
        hint="All ranks of a pipeline work on the same micro-batches: only dp = world / pp pipelines share them out.",
    )
    yield Case(
        (6, 8, 4, 16, 1),
        same(range(8)),
        says="rank 6 of 8, four of them in a pipeline: dp = 2, so ranks 6 and 7 are stage 3",
        hint="The pipeline that a rank belongs to is rank % dp: pipeline ranks are furthest apart.",
    )
    yield Case(
        (3, 4, 1, 32, 4),
        same(range(6, 8)),
        says="micro-batches of four sequences",
        hint="Count micro-batches, not sequences: 32 sequences are 8 of them, 2 for each of 4 ranks.",
    )


# Repeated work -------------------------------------------------------------------------------------------------------
def _computed(steps: int, every: int, killed: list[int]) -> int:
    total = begin = 0
    for end in killed:
        total += end - begin
        begin = end // every * every
    return total + steps - begin


def _from_scratch() -> Solution:
    return lambda steps, every, killed: sum(killed) + steps


def _whole_intervals() -> Solution:
    return lambda steps, every, killed: steps + every * len(killed)


def _nothing_twice() -> Solution:
    return lambda steps, every, killed: steps


def _one_before() -> Solution:
    return lambda steps, every, killed: steps + sum((end - 1) % every + 1 for end in killed)


@grader(
    "trainer.computed",
    minutes=10,
    level="easy",
    reference=lambda: _computed,
    wrong={
        "checkpoint": _from_scratch,
        "since the checkpoint": _whole_intervals,
        "twice": _nothing_twice,
        "just saved": _one_before,
    },
)
def computed() -> Iterator[Case]:
    yield Case(
        (20, 5, [8]),
        same(23),
        says="this page's accident: killed after step 8 of 20, saved every 5",
        hint="Steps 6, 7 and 8 are computed twice: those since the checkpoint of step 5, and no others.",
    )
    yield Case(
        (20, 5, [10]),
        same(20),
        says="killed right after a save",
        hint="The checkpoint of step 10 was just saved, so nothing is lost.",
    )
    yield Case(
        (100, 10, [9, 9, 47]),
        same(100 + 9 + 9 + 7),
        says="twice before the first checkpoint, then once more",
        hint="Without a checkpoint the run begins again at 0; after step 47 it goes on from 40.",
    )


# A box from pieces ---------------------------------------------------------------------------------------------------
Pieces = list[tuple[int, Tensor]]
Filled = tuple[Tensor, int]


def _fill(pieces: Pieces, begin: int, size: int) -> Filled:
    out, missing = torch.zeros(size), torch.ones(size, dtype=torch.bool)
    for offset, piece in pieces:
        low, high = max(begin, offset), min(begin + size, offset + len(piece))
        if low < high:
            out[low - begin : high - begin] = piece[low - offset : high - offset]
            missing[low - begin : high - begin] = False
    return out, int(missing.sum())


def _in_given_order() -> Solution:
    def solution(pieces: Pieces, begin: int, size: int) -> Filled:
        return torch.cat([piece for _, piece in pieces])[begin : begin + size], 0

    return solution


def _one_piece() -> Solution:
    def solution(pieces: Pieces, begin: int, size: int) -> Filled:
        for offset, piece in pieces:
            if offset <= begin and begin + size <= offset + len(piece):
                return piece[begin - offset : begin - offset + size], 0
        return torch.zeros(size), size

    return solution


def _counted_twice() -> Solution:
    def solution(pieces: Pieces, begin: int, size: int) -> Filled:
        out, missing = torch.zeros(size), size
        for offset, piece in pieces:
            low, high = max(begin, offset), min(begin + size, offset + len(piece))
            if low < high:
                out[low - begin : high - begin] = piece[low - offset : high - offset]
                missing -= high - low
        return out, missing

    return solution


def _never_missing() -> Solution:
    return lambda pieces, begin, size: (_fill(pieces, begin, size)[0], 0)


def _filled(values: Tensor, missing: int) -> Callable[[Any], str | None]:
    def judge(answer: Any) -> str | None:
        if not isinstance(answer, tuple) or len(answer) != 2:
            return f"returned a {type(answer).__name__}, expected a pair: the numbers, and how many are missing"
        if wrong := close(values)(answer[0]):
            return f"the numbers: {wrong}"
        if int(answer[1]) != missing:
            return f"the numbers are right, but it says that {int(answer[1])} are missing; {missing} are"
        return None

    return judge


@grader(
    "trainer.fill",
    minutes=25,
    level="medium",
    reference=lambda: _fill,
    wrong={
        "offset": _in_given_order,
        "several pieces": _one_piece,
        "count": _counted_twice,
        "no piece holds": _never_missing,
    },
)
def fill() -> Iterator[Case]:
    numbers = torch.arange(1.0, 13.0)
    thirds = [(8, numbers[8:]), (0, numbers[:4]), (4, numbers[4:8])]
    yield Case(
        (thirds, 5, 3),
        _filled(numbers[5:8], 0),
        says="a box that lies within one piece; the pieces come in any order",
        hint="Look at a piece's offset, not at its place in the list.",
    )
    yield Case(
        (thirds, 2, 9),
        _filled(numbers[2:11], 0),
        says="a box that meets all three pieces",
        hint="A box may need several pieces: copy from each what lies in both.",
    )
    yield Case(
        ([(0, numbers[:7]), (5, numbers[5:])], 4, 6),
        _filled(numbers[4:10], 0),
        says="pieces that overlap",
        hint="What several ranks hold alike may be copied from any of them, but count it once.",
    )
    yield Case(
        ([(0, numbers[:4]), (8, numbers[8:])], 2, 8),
        _filled(torch.cat([numbers[2:4], torch.zeros(4), numbers[8:10]]), 4),
        says="a file that lacks the middle",
        hint="Four of these numbers no piece holds: leave zeros there, and count them. Unsaid, they would be this "
        "chapter's bug.",
    )


# Even stages ---------------------------------------------------------------------------------------------------------
def _longest(costs: list[float], sizes: list[int]) -> float:
    ends = list(itertools.accumulate(sizes))
    return max(sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True))


def _cut(costs: list[float], stages: int) -> list[int]:
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for s in range(1, stages + 1):
        for n in range(s, len(costs) + 1):
            best[n, s] = min(
                (max(best[k, s - 1][0], sum(costs[k:n])), best[k, s - 1][1] + [n - k])
                for k in range(s - 1, n)
                if (k, s - 1) in best
            )
    return best[len(costs), stages][1]


def _by_count_of_pieces() -> Solution:
    def solution(costs: list[float], stages: int) -> list[int]:
        each, more = divmod(len(costs), stages)
        return [each + (stage < more) for stage in range(stages)]

    return solution


def _greedy() -> Solution:
    def solution(costs: list[float], stages: int) -> list[int]:
        mean, sizes, filled = sum(costs) / stages, [0], 0.0
        for number, cost in enumerate(costs):
            left = len(costs) - number
            if len(sizes) < stages and sizes[-1] and (filled + cost > mean or left <= stages - len(sizes)):
                sizes, filled = [*sizes, 0], 0.0
            sizes[-1] += 1
            filled += cost
        return sizes

    return solution


def _out_of_order() -> Solution:
    def solution(costs: list[float], stages: int) -> list[int]:
        filled, counts = [0.0] * stages, [0] * stages
        for cost in sorted(costs, reverse=True):
            least = filled.index(min(filled))
            filled[least], counts[least] = filled[least] + cost, counts[least] + 1
        return counts

    return solution


def _judge(costs: list[float], stages: int) -> Callable[[Any], str | None]:
    best = _longest(costs, _cut(costs, stages))

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, list | tuple) or not all(isinstance(size, int) for size in answer):
            return f"returned {answer!r}, expected a list of {stages} sizes"
        if len(answer) != stages or sum(answer) != len(costs) or min(answer) < 1:
            return f"{list(answer)} doesn't cut {len(costs)} pieces into {stages} runs, none of them empty"
        longest = _longest(costs, list(answer))
        if longest > best * (1 + 1e-9):
            return f"{list(answer)}: the longest stage takes {longest:g}; {best:g} is possible"
        return None

    return judge


@grader(
    "trainer.cut",
    minutes=45,
    level="hard",
    reference=lambda: _cut,
    wrong={"equally many": _by_count_of_pieces, "run full": _greedy, "order": _out_of_order},
)
def cut() -> Iterator[Case]:
    alike = [1.0] * 6
    yield Case(
        (alike, 3),
        _judge(alike, 3),
        says="six layers alike, three stages",
        hint="Two each.",
    )
    tail = [1.0] * 7 + [4.0, 1.0]
    yield Case(
        (tail, 3),
        _judge(tail, 3),
        says="seven layers, a head that takes as long as four, and MTP",
        hint="Stages with equally many pieces aren't equally long: the head's stage should have little else. And "
        "pieces stay in order: a stage is a run of them.",
    )
    bumpy = [2.0, 3.0, 2.0, 2.0, 3.0]
    yield Case(
        (bumpy, 3),
        _judge(bumpy, 3),
        says="2, 3, 2, 2, 3 in three stages",
        hint="Filling a stage until it would run full is not enough: a cut that is a little over the mean here may be "
        "far better for the rest. Pieces must stay in order, too. Try all cuts (dynamic programming), or all bounds "
        "(how many stages does a bound need?).",
    )
