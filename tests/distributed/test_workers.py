"""The pool itself: errors are told, and one failure does not spoil the next job."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from workers import WorkerError

pytestmark = pytest.mark.distributed


def add_up(value: float) -> float:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a mistake on purpose")
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    time.sleep(30)


def test_every_rank_answers(pool) -> None:
    assert pool(2).run(add_up, 10.0) == [30.0, 30.0]


def test_a_failure_is_told_and_the_pool_goes_on(pool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 failed:(.|\n)*a mistake on purpose"):
        pool(2).run(fail_on_one)
    with pytest.raises(WorkerError, match=r"rank 0 died \(exit code 3\)"):
        pool(2).run(die)
    assert pool(2).run(add_up, 1.0) == [3.0, 3.0]
