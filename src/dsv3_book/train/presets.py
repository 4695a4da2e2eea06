"""Presets of training runs, and the command line that changes them.

All knobs of all presets are in this file. A run's settings are its preset's, changed by what the command line names
(`--optim.lr 1e-3`, `--parallel.pp 2`); `python -m dsv3_book.train --help` lists them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from dsv3_book.config import PRESETS as MODELS
from dsv3_book.train.config import Balance, Batch, Every, Optim, Parallel, Text, TrainConfig
from dsv3_book.train.recipe import REPORT_TOKENS, tokens_in


def _v3(model: str) -> dict[str, Any]:
    """The report's schedule (§4.2) for 14.8T tokens, whatever the model."""
    cfg = MODELS[model].replace(max_position_embeddings=4096, rope_scaling=None)  # pre-training is at length 4096
    b = Batch()
    steps = round(100_000 * REPORT_TOKENS / tokens_in(100_000, b.sequence_length, b.start, b.end, b.multiple))
    every, optim = Every(100, 2, 1000, 4096), Optim(moments="bf16")  # moments: report §3.3
    return {"model": cfg, "steps": steps, "dtype": "bf16", "every": every, "optim": optim, "recompute": True}


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
    # Our choice: about ten minutes on two cores, and nearly one pass over the text.
    "laptop": {
        "model": MODELS["laptop"],
        "steps": 1500,
        "batch": Batch(sequence_length=256, start=8, end=8, multiple=8, micro=2),
        "optim": Optim(lr=2e-3, warmup_steps=50),
        "balance": Balance(gamma=4e-3),
        "text": Text(style="code"),
        "every": Every(checkpoint=200, validation=100, validation_windows=64),
    },
    "v3-16b": _v3("v3-16b"),
    "v3-671b": _v3("v3-671b") | {"fp8": True, "parallel": Parallel(pp=16, ep=64, ranks_per_node=8)},  # report §3.1
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
