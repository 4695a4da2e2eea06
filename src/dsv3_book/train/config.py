"""The settings of a training run: typed, grouped, with presets, and a command line made from them.

All knobs of all presets are in this file. A run's settings are its preset's, changed by what the command line names
(`--optim.lr 1e-3`, `--model.num-hidden-layers 6`); `python -m dsv3_book.train --help` lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from dsv3_book.config import PRESETS as MODELS
from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.train.recipe import REPORT_TOKENS, Recipe, tokens_in

Dtype = Literal["auto", "fp32", "bf16"]
Moments = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Batch:
    """How many sequences make a step, and how they are cut into micro-batches."""

    sequence_length: int = 4096
    """T, tokens per sequence."""
    start: int = 3072
    """Sequences in the first step."""
    end: int = 15360
    """Sequences in a step once the ramp (the first 469B of 14.8T tokens) is over."""
    multiple: int = 768
    """The batch grows in steps of this many sequences; must hold whole micro-batches for every process."""
    micro: int = 1
    """B, sequences in a micro-batch."""


@dataclass(frozen=True)
class Optim:
    """AdamW and the learning rate."""

    lr: float = 2.2e-4
    """The peak, held constant to 10T of 14.8T tokens."""
    low_ratio: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    final_ratio: float = 7.3 / 220
    """The last 167B of 14.8T tokens, as a share of the peak."""
    warmup_steps: int = 2000
    """Linear warm-up, in steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's ε (our choice: the report names none)."""
    weight_decay: float = 0.1
    """Of matrices; vectors do not decay."""
    clip: float = 1.0
    """The gradient's largest global norm."""
    moments: Moments = "auto"
    """In what AdamW's two moments rest between steps; auto: bf16 with --fp8, else fp32."""


@dataclass(frozen=True)
class Balance:
    """Bias balancing and the MTP loss. (The sequence-wise loss's α is the model's `aux-loss-alpha`.)"""

    gamma: float = 1e-3
    """Bias update speed γ, 0 for the last 500B of 14.8T tokens."""
    mtp_weight: float = 0.3
    """λ for the first 10T of 14.8T tokens."""
    mtp_weight_late: float = 0.1
    """λ afterwards."""


@dataclass(frozen=True)
class Text:
    """What the run reads, besides --data."""

    tokenizer: str | None = None
    """A tokenizer.json to use; else one of the model's vocabulary is trained on the training documents."""
    style: Literal["v3", "code"] = "v3"
    """How a tokenizer trained here cuts text; "code" keeps a line's indentation in one piece."""
    max_bytes: int | None = None
    """Stop reading after this many bytes of text."""
    fim_rate: float = 0.1
    """Share of training documents turned into Fill-in-Middle."""
    held_out: float = 0.05
    """Share of documents kept for validation."""


@dataclass(frozen=True)
class Every:
    """What happens now and then, in steps."""

    checkpoint: int = 100
    """Save this often (and at the end)."""
    keep: int = 2
    """Checkpoints kept."""
    validation: int = 100
    """Validate this often (and, on all held-out text, at the end)."""
    validation_windows: int = 64
    """Sequences of a validation on the way."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a DeepSeek-V3-shaped model. Run again with the same --out, and it resumes."""

    out: Path = Path("runs/laptop")
    """The run's folder: settings, metrics, checkpoints, tokenizer. (Else runs/ and the preset's name.)"""
    preset: str = "laptop"
    """Model and settings to start from: tiny, laptop, v3-16b, v3-671b."""
    steps: int = 1000
    """Optimiser steps in the whole run; all schedules are stretched to it."""
    dtype: Dtype = "auto"
    """Of activations and matrix products (weights and gradients are FP32); auto: bf16 where the machine computes it."""
    fp8: bool = False
    """Products of linear layers and experts in FP8, outputs in --dtype (report §3.3). A CPU emulates it, slowly."""
    data: tuple[str, ...] = ()
    """Files, folders and globs of text; none: the Python standard library's source."""
    seed: int = 0
    """Of the initial weights and of the order of sequences."""
    pause_at: int | None = None
    """Stop after this step as Ctrl-C would: save, and leave the rest for the next start."""
    prompt: str = "def "
    """What the sample at the end begins with."""
    model: tyro.conf.FlagConversionOff[ModelConfig] = field(default_factory=ModelConfig)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    balance: Balance = field(default_factory=Balance)
    text: Text = field(default_factory=Text)
    every: Every = field(default_factory=Every)

    def __post_init__(self) -> None:
        b = self.batch
        for name, value in (("batch.micro", b.micro), ("batch.multiple", b.multiple), ("steps", self.steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in dataclasses.asdict(self.every).items():
            if value < 1:
                raise ValueError(f"every.{name} must be at least 1, got {value}")
        if b.multiple % b.micro:
            raise ValueError(
                f"batch.multiple ({b.multiple} sequences) does not hold whole micro-batches of batch.micro ({b.micro})"
            )
        if not 1 <= b.sequence_length <= self.model.max_position_embeddings:
            raise ValueError(
                f"batch.sequence_length {b.sequence_length} must lie between 1 and the model's max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        self.recipe()

    @property
    def moments(self) -> str:
        """In what AdamW's moments rest: "fp32" or "bf16"."""
        return moments_for(self.optim.moments, self.fp8)

    def recipe(self) -> Recipe:
        """The report's schedules, stretched to this run."""
        b, o = self.batch, self.optim
        return Recipe(
            total_tokens=tokens_in(self.steps, b.sequence_length, b.start, b.end, b.multiple),
            sequence_length=b.sequence_length,
            warmup_steps=o.warmup_steps,
            peak_lr=o.lr,
            low_lr=o.lr * o.low_ratio,
            final_lr=o.lr * o.final_ratio,
            batch_start=b.start,
            batch_end=b.end,
            batch_multiple=b.multiple,
            bias_update_speed=self.balance.gamma,
            mtp_weight=self.balance.mtp_weight,
            mtp_weight_late=self.balance.mtp_weight_late,
        )

    def check_processes(self, size: int) -> None:
        """Raises ValueError if the batch does not divide among `size` processes."""
        if self.batch.multiple % (self.batch.micro * size):
            raise ValueError(
                f"batch.multiple ({self.batch.multiple} sequences) does not divide among {size} processes in "
                f"micro-batches of batch.micro ({self.batch.micro}): lower batch.micro or raise batch.multiple"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; `from_dict(c.to_dict()) == c`."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> TrainConfig:
        """The settings that `to_dict` wrote. Raises ValueError on keys that are none."""
        raw = dict(raw)
        groups = {"batch": Batch, "optim": Optim, "balance": Balance, "text": Text, "every": Every}
        try:
            for name, group in groups.items():
                raw[name] = group(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw[name].items()})
            model = dict(raw["model"])
            if model["rope_scaling"]:
                model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
            raw["model"] = ModelConfig(**model)
            return TrainConfig(**raw | {"out": Path(raw["out"]), "data": tuple(raw["data"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not the settings of a run of this version of dsv3_book: {error}") from None


def moments_for(asked: str, fp8: bool) -> str:
    """What `--optim.moments` means beside `--fp8` or without it."""
    if asked != "auto":
        return asked
    return "bf16" if fp8 else "fp32"


def _v3(model: str) -> dict[str, Any]:
    """The report's schedule (§4.2) for 14.8T tokens, whatever the model."""
    cfg = MODELS[model].replace(max_position_embeddings=4096, rope_scaling=None)  # pre-training is at length 4096
    b = Batch()
    steps = round(100_000 * REPORT_TOKENS / tokens_in(100_000, b.sequence_length, b.start, b.end, b.multiple))
    every, optim = Every(1000, 2, 1000, 4096), Optim(moments="bf16")  # moments: report §3.3
    return {"model": cfg, "steps": steps, "dtype": "bf16", "every": every, "optim": optim}


PRESETS: dict[str, dict[str, Any]] = {
    # A gentle learning rate: layouts are compared with it, and what rounding makes of one step grows with the rate
    # (measured here over 20 steps: two processes stay within 2e-6 of one; at three times the rate up to 1e-1 apart).
    "tiny": {
        "model": MODELS["tiny"],
        "steps": 20,
        "dtype": "fp32",
        "batch": Batch(sequence_length=32, start=8, end=16, multiple=8, micro=2),
        "optim": Optim(lr=1e-3, warmup_steps=3),
        "text": Text(max_bytes=400_000, held_out=0.1),
        "every": Every(checkpoint=10, validation=10, validation_windows=8),
    },
    # Our choice, tuned for about ten minutes on two cores.
    "laptop": {
        "model": MODELS["laptop"],
        "steps": 900,
        "batch": Batch(sequence_length=256, start=8, end=8, multiple=8, micro=4),
        "optim": Optim(lr=2e-3, warmup_steps=50),
        "balance": Balance(gamma=4e-3),
        "text": Text(style="code"),
        "every": Every(checkpoint=200, validation=100, validation_windows=64),
    },
    "v3-16b": _v3("v3-16b"),
    "v3-671b": _v3("v3-671b"),
}


def preset(name: str, out: str | os.PathLike[str] | None = None, **changes: Any) -> TrainConfig:
    """The settings of preset `name` for a run in `out` (else in runs/`name`), some of them changed."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return TrainConfig(**{"out": Path(out or f"runs/{name}"), "preset": name, **PRESETS[name], **changes})


def from_command_line(argv: Sequence[str] | None = None, speak: bool = True) -> TrainConfig:
    """The settings that a command line asks for; `--help` and unknown or malformed options end the program (status 2).

    speak: whether to print help and errors (one process of several should).

    Raises:
        ValueError: an unknown preset, or values that don't fit together.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "laptop"
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--preset"):
            name = word.partition("=")[2] if "=" in word else following
    default = preset(name)
    with contextlib.ExitStack() as stack:
        if not speak:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return tyro.cli(
            TrainConfig,
            args=argv,
            prog="python -m dsv3_book.train",
            default=default,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        )
