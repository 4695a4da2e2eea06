"""Work that every rank does its part of, and that succeeds on all of them or fails on all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from dsv3_book.parallel.data import DataParallel
from dsv3_book.parallel.lost import named

T, R = TypeVar("T"), TypeVar("R")


class Failure(NamedTuple):
    """What went wrong on a rank, as text: not every exception can travel."""

    rank: int
    text: str


class Failed(RuntimeError):
    """Somebody's part failed; every rank raises this, with the same failures."""

    def __init__(self, failures: list[Failure]) -> None:
        self.failures = failures
        super().__init__("; ".join(f"rank {rank}: {text}" for rank, text in failures))


def together(
    what: str,
    parallel: DataParallel,
    work: Callable[[], T],
    join: Callable[[list[T]], list[R]],
    explain: Callable[[Exception], str] = str,
) -> R:
    """Every rank's `work`; then, on rank 0, `join` of what all of them returned; each rank gets its item of that list.

    what: the work's name, in errors.  explain: an exception in words.  Results travel as pickles, between these ranks.

    Raises:
        Failed: a rank's work raised, or rank 0's join did: on every rank, with the same text, naming ranks.
        RuntimeError: a rank died or did not answer within the group's timeout, naming the ranks asked.
    """
    caught: list[Exception] = []  # here, to be shown as the cause

    def attempt(rank: int, step: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, step()
        except Exception as error:
            caught.append(error)
            return False, [Failure(rank, explain(error))]

    def joined(outcomes: list[tuple[bool, Any]]) -> list[tuple[bool, Any]]:
        failures = [failure for good, found in outcomes if not good for failure in found]
        if not failures:
            good, found = attempt(0, lambda: join([result for _, result in outcomes]))
            if good:
                return [(True, item) for item in found]
            failures = found
        return [(False, failures) for _ in outcomes]

    mine = attempt(parallel.rank, work)
    if parallel.size == 1:
        (good, answer), *_ = joined([mine])
    else:
        outcomes: Any = [None] * parallel.size if parallel.rank == 0 else None
        box: list[Any] = [None]
        with named(what, parallel.group):
            dist.gather_object(mine, outcomes, group=parallel.group, group_dst=0)
        answers = joined(outcomes) if parallel.rank == 0 else None
        with named(what, parallel.group):
            dist.scatter_object_list(box, answers, group=parallel.group, group_src=0)
        good, answer = box[0]
    if not good:
        raise Failed(answer) from (caught[0] if caught else None)
    return answer
