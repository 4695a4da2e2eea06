"""The trainer's central promise: one loss curve, whatever the layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from layoutkit import compare, settings, train

from dsv3_book.train.config import Batch, Parallel
from dsv3_book.train.presets import preset

pytestmark = pytest.mark.distributed

# processes, and how they share the work. dp is what pp leaves.
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"schedule": "dualpipev"}),
    (2, {"pp": 2, "schedule": "dualpipe"}),
    (2, {"ep": 2}),
    (2, {"ep": 2, "schedule": "dualpipev", "zero": False}),
    (4, {"pp": 4, "schedule": "zb1p"}),
    (4, {"pp": 2, "ep": 2, "schedule": "dualpipe"}),
    (4, {"pp": 4, "schedule": "chimera", "zero": False}),
    (4, {"ep": 4, "ranks_per_node": 2}),
    (8, {"pp": 4, "ep": 2, "schedule": "dualpipe"}),
    (8, {"pp": 2, "ep": 4, "schedule": "dualpipev", "ranks_per_node": 2}),
    (8, {"pp": 2, "ep": 4, "schedule": "1f1b", "ranks_per_node": 2, "dispatch": "direct"}),
    (8, {"pp": 8, "schedule": "dualpipe"}),
]
NAMES = [f"{world}-" + "-".join(f"{k}={v}" for k, v in layout.items()) for world, layout in LAYOUTS]


@pytest.fixture(scope="module")
def alone(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One process over the same micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    return out, pool(1).run(train, settings(corpus, out=out))[0]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=NAMES)
def test_one_curve(pool, corpus: Path, tmp_path: Path, alone: Any, world: int, layout: dict[str, Any]) -> None:
    """20 steps in fp32: losses, validation and MaxVio to 1e-5, routing biases and copies of a weight to the bit."""
    reference, (loads, close, held) = alone
    config = settings(corpus, out=tmp_path, parallel=Parallel(**layout))
    ranks = pool(world).run(train, config, timeout=300)
    copies: dict[tuple[str, int], torch.Tensor] = {}
    for rank, (_, _, theirs) in enumerate(ranks):
        expert = rank % layout.get("ep", 1)
        for name in (name for name in theirs if name.startswith("model.")):
            first = copies.setdefault((name, expert if ".experts." in name else 0), theirs[name])
            assert torch.equal(first, theirs[name]), f"two copies of {name} differ"
    assert {name for name, _ in copies} == {name for name in held if name.startswith("model.")}
    compare(reference, tmp_path, config, loads, ranks[0][0], close)
    for name in (name for name in held if name.endswith("e_score_correction_bias")):
        assert held[name].abs().max() > 0
        assert torch.equal(copies[name, 0], held[name]), name


def test_every_kind_of_layout_is_there() -> None:
    """At least ten, on 1, 2, 4 and 8 processes, with every schedule."""
    assert len(LAYOUTS) >= 10
    assert {world for world, _ in LAYOUTS} == {1, 2, 4, 8}
    config = dataclasses.replace(preset("tiny"), batch=Batch(32, 16, 32, 16, 1))
    named = {dataclasses.replace(config, parallel=Parallel(**layout)).schedule for _, layout in LAYOUTS}
    assert named == {"1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"}
