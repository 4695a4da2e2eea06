"""One process and several give the same numbers."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layoutkit import assert_same_curve
from torch import nn
from trainkit import lines, small, tensors_of

from dsv3_book import checkpoint
from dsv3_book.optim import clip_by_global_norm, global_norm
from dsv3_book.parallel import DataParallel, PeerError
from dsv3_book.train.config import Every
from dsv3_book.train.trainer import Trainer

pytestmark = pytest.mark.distributed


def train(config: Any, stop_on: int | None = None) -> dict[str, torch.Tensor]:
    """Trains here, and returns the weights, biases and moments."""
    trainer = Trainer(config, DataParallel.from_environment())
    if stop_on is not None and trainer.parallel.rank == stop_on:
        micro_batch = trainer.micro_batch

        def interrupted(number: int) -> torch.Tensor:
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return micro_batch(number)

        trainer.micro_batch = interrupted
    trainer.run()
    found = {"step": torch.tensor(trainer.step)} | tensors_of(trainer)
    trainer.close()
    return found


def alone(config: Any) -> dict[str, torch.Tensor]:
    trainer = Trainer(config)
    trainer.run()
    found = tensors_of(trainer)
    trainer.close()
    return found


def test_saved_by_two_and_gone_on_with_by_one(pool, tmp_path: Path, corpus: Path) -> None:
    every = Every(checkpoint=3, validation=100, validation_windows=4)
    batch = dataclasses.replace(small(tmp_path, corpus).batch, micro=2)
    config = small(tmp_path / "mixed", corpus, steps=6, every=every, batch=batch)
    pool(2).run(train, dataclasses.replace(config, pause_at=3))
    alone(config)
    alone(dataclasses.replace(config, out=tmp_path / "one"))
    assert_same_curve(tmp_path / "one", tmp_path / "mixed", steps=6)


def test_a_cut_run_of_two_processes_equals_an_uncut_one_bit_for_bit(pool, tmp_path: Path, corpus: Path) -> None:
    batch = dataclasses.replace(small(tmp_path, corpus).batch, micro=2)
    whole = small(tmp_path / "whole", corpus, batch=batch)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    expected = pool(2).run(train, whole)
    pool(2).run(train, dataclasses.replace(cut, pause_at=2))
    found = pool(2).run(train, cut)
    for rank in range(2):
        assert all(torch.equal(expected[rank][name], found[rank][name]) for name in expected[rank])
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_signal_to_one_process_stops_all_after_the_same_step(pool, tmp_path: Path, corpus: Path) -> None:
    batch = dataclasses.replace(small(tmp_path, corpus).batch, micro=2)
    results = pool(2).run(train, small(tmp_path, corpus, steps=50, batch=batch), stop_on=1)
    assert [result["step"].item() for result in results] == [3, 3]
    assert checkpoint.latest(tmp_path / "checkpoints")[1]["step"] == 3


def refused(config: Any) -> str:
    try:
        Trainer(config, DataParallel.from_environment())
    except (ValueError, OSError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_bad_input_is_one_processs_error(pool, tmp_path: Path, corpus: Path) -> None:
    config = small(tmp_path, corpus)
    one, other = pool(2).run(refused, config)  # four sequences are one micro-batch
    assert "does not divide among 2 data parallel processes" in one
    assert other.startswith("PeerError")
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro=2), data=("no/such/file",))
    one, other = pool(2).run(refused, config)
    assert "no/such/file" in one
    assert other.startswith("PeerError")


def norms() -> tuple[float, float, list[float]]:
    """Rank r holds [3] alike with the others, and a [4·r] of its own."""
    rank = dist.get_rank()
    shared, own = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    shared.grad, own.grad = torch.tensor([3.0]), torch.tensor([4.0 * rank])
    parts = [([shared], None), ([own, shared], dist.group.WORLD)]
    before = global_norm(parts).item()
    clipped = clip_by_global_norm(parts, 1.0).item()
    return before, clipped, [shared.grad.item(), own.grad.item()]


def test_the_norm_spans_processes_and_counts_shared_parameters_once(pool) -> None:
    answers = pool(2).run(norms)
    assert [a[:2] for a in answers] == [(5.0, 5.0)] * 2
    assert answers[0][2] == pytest.approx([0.6, 0.0])
    assert answers[1][2] == pytest.approx([0.6, 0.8])


def sums() -> list[Any]:
    parallel = DataParallel.from_environment()
    a, b, c = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))
    a.grad = torch.full((2, 3), 1.0 + parallel.rank)
    if parallel.rank:
        b.grad = torch.arange(4.0)
    parallel.sum_gradients([a, b, c])
    return [a.grad.tolist(), b.grad.tolist(), c.grad.tolist(), list(parallel.share(6))]


def test_gradients_are_summed_and_a_missing_one_is_zero(pool) -> None:
    first, second = pool(2).run(sums)
    assert first[:3] == second[:3] == [[[3.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], [0.0]]
    assert (first[3], second[3]) == ([0, 1, 2], [3, 4, 5])


def test_shares_are_equal_or_refused() -> None:
    assert [list(DataParallel(rank, 2).share(4)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="3 micro-batches don't divide among 2 processes"):
        DataParallel(0, 2).share(3)
