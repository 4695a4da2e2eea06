"""What the processes of the trainer's benchmark run. (A module, so that what a worker holds outlives a job.)"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_book.model import Transformer
from dsv3_book.model.balance import update_bias
from dsv3_book.optim import adamw, clip_by_global_norm
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import Every, Parallel, Text, TrainConfig
from dsv3_book.train.presets import preset
from dsv3_book.train.trainer import Trainer

STEPS = 4  # of a side in a round
SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "bare": (1, {}),
    "trainer": (1, {}),
    "dp 2": (2, {}),
    "1f1b": (2, {"pp": 2, "schedule": "1f1b"}),
    "dualpipe": (2, {"pp": 2, "schedule": "dualpipe"}),
}
_held: dict[str, Any] = {}  # in a worker: what it trains


def settings(name: str, folder: Path) -> TrainConfig:
    _, layout = SIDES[name]
    every = Every(checkpoint=10**6, validation=10**6)
    parallel, text = Parallel(**layout), Text(style="code", max_bytes=2_000_000)
    return preset("laptop", folder / name, steps=10**5, dtype="fp32", every=every, parallel=parallel, text=text)


def alone() -> None:
    """Makes this worker what `python -m dsv3_book.train` without torchrun is: a process that knows of no others."""
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


def begin(name: str, folder: Path) -> None:
    trainer = Trainer(settings(name, folder), DataParallel.from_environment(), quiet=True)
    trainer.metrics.after(0).__enter__()
    _held[name] = Bare(trainer) if name == "bare" else trainer


class Bare:
    """A training step without a trainer. Its tokens are those of the trainer's first steps."""

    def __init__(self, trainer: Trainer) -> None:
        c = trainer.config
        self.model, self.count = Transformer(c.model, c.seed), c.batch.start // c.batch.micro
        self.tokens = [trainer.micro_batch(number) for number in range(self.count)]
        o = c.optim
        self.optimizer = adamw(self.model.named_parameters(), o.lr, o.betas, o.eps, o.weight_decay, c.moments)
        self.parameters = list(self.model.parameters())

    def train_step(self) -> None:
        load: Any = 0
        for tokens in self.tokens:
            losses = self.model.losses(tokens)
            ((losses.main + 0.3 * losses.mtp + losses.balance) / self.count).backward()
            load = load + losses.load
        clip_by_global_norm([(self.parameters, None)], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for (_, router), own in zip(self.model.routers(), load, strict=True):
            update_bias(router.e_score_correction_bias, own, 1e-3)


def advance(name: str, steps: int = STEPS) -> list[float]:
    """Seconds of each step."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        _held[name].train_step()
        times.append(time.perf_counter() - began)
    return times


def saving(name: str, saves: int) -> list[dict[str, float]]:
    """Saves as the trainer does, and goes on training until each is on disk."""
    trainer, found = _held[name], []
    for _ in range(saves):
        plain = statistics.median(advance(name, 6))
        began = time.perf_counter()
        trainer.save()
        call, steps = time.perf_counter() - began, 0
        while trainer.saver.thread.is_alive():
            trainer.train_step()
            steps += 1
        longer = time.perf_counter() - began - steps * plain
        found.append({"call": call / plain, "all": longer / plain, "steps": steps})
        trainer.saver.wait()
    return found
