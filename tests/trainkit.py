"""Small runs for tests: a corpus of made-up code, and the tiny preset made smaller still."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_book.slab import slabs
from dsv3_book.train.config import Batch, Every, Optim, Text, TrainConfig
from dsv3_book.train.presets import preset
from dsv3_book.train.trainer import Trainer

TIMING = ("tokens_per_second", "bubble", "memory", "mfu")


def write_corpus(folder: Path, files: int = 24) -> Path:
    """Text with structure that a small model can begin to learn, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "load", "expert", "token", "bias", "route", "gate"]
    for number in range(files):
        lines = []
        for _ in range(60):
            a, b, c = draw.choices(names, k=3)
            lines.append(f"def {a}_{b}({c}):\n    return {c} + {draw.randrange(100)}\n")
        (folder / f"{number:02}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a cache of its own for what is made from it."""
    root = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV3_BOOK_CACHE", str(root / "cache"))
        yield write_corpus(root / "corpus")


def small(out: Path, corpus: Path, **changes: Any) -> TrainConfig:
    """The tiny preset with two layers and short sequences; four steps."""
    base: dict[str, Any] = {
        "steps": 4,
        "data": (str(corpus),),
        "model": preset("tiny", out).model.replace(num_hidden_layers=2),
        "batch": Batch(sequence_length=16, start=4, end=8, multiple=4, micro=4),
        "optim": Optim(lr=3e-3, warmup_steps=2),
        "text": Text(held_out=0.2),
        "every": Every(checkpoint=100, validation=100, validation_windows=4),
    }
    return preset("tiny", out, **{**base, **changes})


def lines(out: Path, timing: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl, without what depends on the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if timing or k not in TIMING} for line in found]


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that this process would save, each as one tensor (the pieces of a shard after one another)."""
    return {
        name: torch.cat([slab.tensor.flatten() for slab in slabs(value)]).clone()
        for name, value in trainer.tensors().items()
    }
