from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainkit import corpus

from dsv3_book.parallel.workers import Pool

__all__ = ["corpus", "pool"]

CROWDED = 60  # threads of a worker


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: n processes, started once and used by many tests.

    Every gloo group that a test leaves behind has threads, which wake all the time: hundreds of them take a machine's
    cores, idle as they are. So processes that have gathered many are ended, and new ones started when they are needed.
    """
    pools: dict[int, Pool] = {}

    def give(size: int) -> Pool:
        for one in pools.values():
            if any(threads(process.pid) > CROWDED for process in one.processes):
                one.stop()
        return pools.setdefault(size, Pool(size))

    yield give
    for one in pools.values():
        one.stop()


def threads(process: int) -> int:
    """How many a process has (0 where the system doesn't say so in /proc)."""
    tasks = Path(f"/proc/{process}/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0
