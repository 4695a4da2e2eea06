"""A run goes on at any other layout, and at its own as if it had never been cut."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layoutkit import compare, settings, train
from trainkit import lines

from dsv3_book.train.config import Every, Parallel, TrainConfig

pytestmark = pytest.mark.distributed

STEPS, CUT = 12, 6
SAVED = 4, {"pp": 2, "ep": 2, "schedule": "dualpipe"}
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"pp": 2, "schedule": "zb1p"}),
    (2, {"ep": 2, "zero": False}),
    (4, {"ep": 4, "ranks_per_node": 2}),
    (8, {"pp": 4, "ep": 2, "schedule": "1f1b"}),
]


def of_run(corpus: Path, out: Path, layout: dict[str, Any], **changes: Any) -> TrainConfig:
    every = Every(checkpoint=CUT, validation=4, validation_windows=8)
    return settings(corpus, out=out, steps=STEPS, every=every, parallel=Parallel(**layout), **changes)


@pytest.fixture(scope="module")
def whole(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Never cut, at the layout that the others' checkpoint is of."""
    out = tmp_path_factory.mktemp("whole")
    return out, pool(SAVED[0]).run(train, of_run(corpus, out, SAVED[1]))


@pytest.fixture(scope="module")
def saved(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped half-way."""
    out = tmp_path_factory.mktemp("saved")
    pool(SAVED[0]).run(train, of_run(corpus, out, SAVED[1], pause_at=CUT), save=True)
    return out


def test_cut_is_uncut_bit_for_bit(pool, corpus: Path, tmp_path: Path, whole: Any, saved: Path) -> None:
    uncut, ranks = whole
    shutil.copytree(saved, tmp_path / "run")
    again = pool(SAVED[0]).run(train, of_run(corpus, tmp_path / "run", SAVED[1]))
    assert lines(tmp_path / "run") == lines(uncut)
    for (_, _, held), (_, _, theirs) in zip(ranks, again, strict=True):
        assert held.keys() == theirs.keys()
        assert all(torch.equal(held[name], theirs[name]) for name in held)


@pytest.mark.parametrize(("world", "layout"), OTHERS, ids=[f"{world}-{layout}" for world, layout in OTHERS])
def test_saved_at_one_layout_and_gone_on_at_another(
    pool, corpus: Path, tmp_path: Path, whole: Any, saved: Path, world: int, layout: dict[str, Any]
) -> None:
    """The curve goes on as the uncut one, to 1e-5."""
    uncut, ((loads, close, _), *_) = whole
    shutil.copytree(saved, tmp_path / "run")
    config = of_run(corpus, tmp_path / "run", layout)
    theirs = pool(world).run(train, config)[0][0]
    assert len(theirs) == STEPS - CUT
    compare(uncut, config.out, config, loads, theirs, close)


def test_there_are_five_others() -> None:
    assert len(OTHERS) >= 5
    assert len({dataclasses.astuple(Parallel(**layout)) for _, layout in [*OTHERS, SAVED]}) == len(OTHERS) + 1
