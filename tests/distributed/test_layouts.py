"""The trainer's central promise: one loss curve, whatever the layout."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainkit import lines

from dsv3_book.model.router import Routing
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import Batch, Balance, Every, Optim, Parallel, Text, TrainConfig
from dsv3_book.train.presets import preset
from dsv3_book.train.trainer import Trainer

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
COMPARED = ("loss", "loss_mtp", "balance_loss", "grad_norm", "max_violation", "val_loss", "val_loss_ema")


def settings(corpus: Path, **changes: Any) -> TrainConfig:
    """The tiny preset, 20 steps, every step clipped, the batch doubling on the way, all that V3 does switched on."""
    tiny = preset("tiny")
    base: dict[str, Any] = {
        "data": (str(corpus),),
        "text": Text(held_out=0.2),
        "batch": Batch(sequence_length=24, start=16, end=32, multiple=16, micro=1),
        "model": tiny.model.replace(num_hidden_layers=3, hidden_size=32, intermediate_size=64, aux_loss_alpha=1e-3),
        "optim": Optim(lr=1e-3, warmup_steps=3, clip=0.5, ema=0.9),
        "balance": Balance(gamma=1e-3),
        "every": Every(checkpoint=1000, validation=10, validation_windows=10),
        "recompute": True,
    }
    return preset("tiny", **base | changes)


def train(config: TrainConfig) -> tuple[torch.Tensor, list[float]]:
    """Trains here; the whole step's load of every step [steps, routers, E], and the closest call of every step."""
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    loads, gaps = [], [math.inf] * config.steps
    trainer.save = lambda: None  # type: ignore[method-assign, assignment, return-value]
    update = trainer.update

    def remember(now: Any, totals: Any) -> None:
        loads.append(totals.load.clone())
        update(now, totals)

    def watch(router: nn.Module, inputs: Any, routing: Routing) -> None:
        if torch.is_grad_enabled():
            gaps[trainer.step] = min(gaps[trainer.step], closest_call(router, routing))

    trainer.update = remember  # type: ignore[method-assign]
    for _, router in trainer.job.routers():
        router.register_forward_hook(watch)
    trainer.run()
    trainer.close()
    return torch.stack(loads), gaps


@torch.no_grad()
def closest_call(router: Any, routing: Routing) -> float:
    """The smallest difference, over all tokens, between the last that was chosen and the first that was not, among
    groups and among the experts of the chosen groups."""
    cfg = router.cfg
    grouped = (routing.scores + router.e_score_correction_bias).unflatten(-1, (cfg.n_group, -1))
    worth = grouped.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    kept = grouped.gather(1, worth.indices[:, : cfg.topk_group, None].expand(-1, -1, grouped.shape[-1])).flatten(1)
    experts = kept.sort(dim=-1, descending=True).values
    edges = [(worth.values, cfg.topk_group), (experts, cfg.num_experts_per_tok)]
    return min(float((v[:, k - 1] - v[:, k]).min()) for v, k in edges if k < v.shape[1])


def assert_same_curve(one: Path, other: Path, steps: int, rel: float = 1e-5) -> None:
    """Both runs agree in every number that is computed, up to step `steps`."""
    a, b = ([line for line in lines(out) if line["step"] <= steps] for out in (one, other))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in set(COMPARED) & x.keys():
            # The clip norm, a root of sums over all gradients, gathers more rounding than a loss does.
            assert y[name] == pytest.approx(x[name], rel=10 * rel if name == "grad_norm" else rel), (name, x["step"])


@pytest.fixture(scope="module")
def alone(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, list[float]]:
    """One process over the same micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    ((loads, gaps),) = pool(1).run(train, settings(corpus, out=out))
    return out, loads, gaps


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=NAMES)
def test_one_curve(pool, corpus: Path, tmp_path: Path, alone: Any, world: int, layout: dict[str, Any]) -> None:
    """20 steps in fp32, to 1e-5.

    Rounding in another order may flip a choice between experts whose scores agree to the last bits; the curves then
    differ for a reason that is not an error. Such a run agrees up to there, and ends as an XFAIL whose reason gives the
    gap, so that it is seen and not counted as agreement.
    """
    reference, loads, gaps = alone
    config = settings(corpus, out=tmp_path, parallel=Parallel(**layout))
    theirs, _ = pool(world).run(train, config, timeout=300)[0]
    flipped = (loads != theirs).flatten(1).any(1).nonzero()
    if not len(flipped):
        return assert_same_curve(reference, tmp_path, config.steps)
    step = int(flipped[0])
    assert_same_curve(reference, tmp_path, step)
    assert gaps[step] < 2e-6, "a choice flipped that was not close"
    pytest.xfail(f"a choice between experts flipped at step {step + 1}, where the closest call was {gaps[step]:.1e}")


def test_every_kind_of_layout_is_there() -> None:
    """At least ten, on 1, 2, 4 and 8 processes, with every schedule."""
    assert len(LAYOUTS) >= 10
    assert {world for world, _ in LAYOUTS} == {1, 2, 4, 8}
    config = dataclasses.replace(preset("tiny"), batch=Batch(32, 16, 32, 16, 1))
    named = {dataclasses.replace(config, parallel=Parallel(**layout)).schedule for _, layout in LAYOUTS}
    assert named == {"1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"}
