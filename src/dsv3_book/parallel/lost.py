"""One sentence for every message that could not be finished: who waited, for what, with whom."""

from __future__ import annotations

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
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"rank {dist.get_rank()}: {what} with ranks {peers} did not finish: {reason}. One of them has ended, "
            "hangs, or took another path through the program: look for the first error in their logs"
        ) from error
