"""One sentence for every message that could not be finished: who waited, for what, with whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def named(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around a collective's start or wait: turns torch's error into one that names this rank, the message, the peers.

    Raises:
        RuntimeError: with that sentence, from the error it stands for.
    """
    try:
        yield
    except RuntimeError as error:
        peers = dist.get_process_group_ranks(group or dist.group.WORLD)
        said = next(iter(reason(error).splitlines()), type(error).__name__)
        raise RuntimeError(
            f"rank {dist.get_rank()}: {what} with ranks {peers} did not finish: {said}. One of them has ended, "
            "hangs, or took another path through the program: look for the first error in their logs"
        ) from error


def reason(error: BaseException) -> str:
    """What an error says, without the addresses in gloo's source and its advice."""
    text = re.sub(r"\[/\S*gloo/\S*:\d+\] ", "", str(error))
    return re.sub(r"\.? This is typically caused by a remote worker.*?GLHF!( \S+)?", "", text, flags=re.DOTALL).strip()


def innermost(error: BaseException) -> BaseException:
    """What an error was first raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_lost(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, only says that another rank did not answer, or ended."""
    first = innermost(error)
    if isinstance(first, dist.DistError):  # NCCL's and the store's
        return True
    return isinstance(first, RuntimeError) and ("gloo/" in str(first) or "did not join" in str(first))


def is_late(error: BaseException) -> bool:
    """Whether it waited until its timeout; else it was cut off."""
    text = str(innermost(error)).lower()
    return "timed out" in text or "timeout" in text
