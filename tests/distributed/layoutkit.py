"""Runs that differ in their layout only, and what must be equal about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainkit import lines, tensors_of

from dsv3_book.model.router import Routing
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import Balance, Batch, Every, Optim, Text, TrainConfig
from dsv3_book.train.presets import preset
from dsv3_book.train.trainer import Trainer

CLOSE = 2e-6  # scores that rounding may put in another order
FOLLOW = 4  # tokens, at most, that one flipped choice brings to flip others
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


def train(config: TrainConfig, save: bool = False) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Trains here: the whole step's load of every step [steps, routers, E], the close calls in every step, and all that
    this process holds in the end."""
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    loads, close = [], [0] * config.steps
    if not save:
        trainer.save = lambda: None  # type: ignore[method-assign]
    update = trainer.update

    def remember(now: Any, totals: Any) -> None:
        loads.append(totals.load.clone())
        update(now, totals)

    def watch(router: nn.Module, inputs: Any, routing: Routing) -> None:
        if torch.is_grad_enabled():
            close[trainer.step] += close_calls(router, routing)

    trainer.update = remember  # type: ignore[method-assign]
    for _, router in trainer.job.routers():
        router.register_forward_hook(watch)
    trainer.run()
    held = tensors_of(trainer)
    trainer.close()
    return torch.stack(loads), close, held


@torch.no_grad()
def close_calls(router: Any, routing: Routing) -> int:
    """Of how many tokens the last that was chosen and the first that was not, among groups or among the experts of the
    chosen groups, differ by less than CLOSE."""
    cfg = router.cfg
    grouped = (routing.scores + router.e_score_correction_bias).unflatten(-1, (cfg.n_group, -1))
    worth = grouped.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    kept = grouped.gather(1, worth.indices[:, : cfg.topk_group, None].expand(-1, -1, grouped.shape[-1])).flatten(1)
    experts = kept.sort(dim=-1, descending=True).values
    edges = [(worth.values, cfg.topk_group), (experts, cfg.num_experts_per_tok)]
    near = [v[:, k - 1] - v[:, k] < CLOSE for v, k in edges if k < v.shape[1]]
    return int(torch.stack(near).any(0).sum()) if near else 0


def assert_same_curve(one: Path, other: Path, steps: int, rel: float = 1e-5) -> None:
    """Both runs agree in every number that is computed, up to step `steps`."""
    a, b = ([line for line in lines(out) if line["step"] <= steps] for out in (one, other))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in set(COMPARED) & x.keys():
            # The clip norm, a root of sums over all gradients, gathers more rounding than a loss does.
            assert y[name] == pytest.approx(x[name], rel=10 * rel if name == "grad_norm" else rel), (name, x["step"])


def compare(one: Path, other: Path, config: TrainConfig, loads: Tensor, theirs: Tensor, close: list[int]) -> None:
    """The curves of two runs are one, unless rounding in another order flipped a choice between experts.

    Scores may agree to the last bits; where such a choice flips, the curves differ for a reason that is not an error. A
    run agrees up to there, and ends as an XFAIL, so that it is seen and not counted as agreement. Loads must be as near
    as so few choices leave them: a token that flips takes its experts along, and may pull itself and those that attend
    to it over the edge in later layers. loads, theirs: of the last steps of both runs, as many as both have.
    """
    first = config.steps - min(len(loads), len(theirs))
    flipped = (loads[-len(theirs) :] != theirs[-len(loads) :]).flatten(1).any(1).nonzero()
    step = first + int(flipped[0]) if len(flipped) else config.steps
    assert_same_curve(one, other, step)
    if step < config.steps:
        moved = int((loads[-len(theirs) :] - theirs[-len(loads) :])[step - first].abs().sum()) // 2
        most = FOLLOW * config.model.num_experts_per_tok * close[step]
        assert moved <= most, f"at step {step + 1} {moved} choices flipped, of {close[step]} close calls"
        pytest.xfail(f"{moved} choices between experts flipped at step {step + 1}, which had {close[step]} close calls")
