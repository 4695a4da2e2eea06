from collections.abc import Callable, Iterator

import pytest
from trainkit import corpus

from dsv3_book.parallel.workers import Pool

__all__ = ["corpus", "pool"]


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: n processes, started once and used by every test of the session."""
    pools: dict[int, Pool] = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for one in pools.values():
        one.stop()
