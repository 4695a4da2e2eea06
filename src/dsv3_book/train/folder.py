"""The folder of a run: what lies in it, and the questions that are settled before a run begins or goes on.

    RUN/run.json         the settings, complete           RUN/metrics.jsonl   one object a step
    RUN/tokenizer.json   the run's tokenizer              RUN/tensorboard/    the same, and MaxVio of every layer
    RUN/checkpoints/     see `dsv3_book.checkpoint`       RUN/load.jsonl      loads of all experts, now and then
    RUN/logs/            of every rank, and its error     RUN/nonfinite/      see `nonfinite.py`
    RUN/.lock, .holder   held while a process trains      RUN/report.html     at the end

One process writes, process 0; the others are told what it found.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dsv3_book import checkpoint
from dsv3_book.data import Dataset, prepare
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.mesh import node_size
from dsv3_book.train.config import Dtype, TrainConfig, moments_for

SETTINGS, CHECKPOINTS = "run.json", "checkpoints"
# Settings that change nothing that is computed, or only how it is shared out.
FREE = ("out", "pause_at", "prompt", "every", "profile", "dry_run", "world", "init", "on_nonfinite", "swap")

Found = tuple[Path, dict[str, Any]]  # a checkpoint and its state


class RunFolder:
    """A run's folder, held by a lock while this object lives. Errors are raised before anything in it is changed."""

    def __init__(self, config: TrainConfig, parallel: DataParallel, quiet: bool = False) -> None:
        self.quiet = quiet
        self.config, self.parallel, self.path = config, parallel, config.out
        self.checkpoints = self.path / CHECKPOINTS
        self.lock: FileLock | None = None
        parallel.first(lambda: config.layout(parallel.size, node_size()))
        parallel.first(self._take)

    def say(self, message: str) -> None:
        """A line for people, once."""
        if self.parallel.rank == 0:
            print(message, file=sys.stderr, flush=True)

    def _take(self) -> None:
        """The lock is the system's, on an open file: when its process ends, however it does, it is free."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock, holder = FileLock(self.path / ".lock"), self.path / ".holder"
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "of unknown number"
            raise ValueError(
                f"another process is training in {self.path} (process {who}): stop it, or name another --out"
            ) from None
        holder.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def release(self) -> None:
        """Lets others have the folder."""
        if self.lock is not None:
            self.lock.release()

    def find(self) -> Found | None:
        """The checkpoint to go on from, or None for a new run.

        Raises:
            ValueError: it is of another model, listing what differs, or with other moments, or with --fp8 where this
                run is without, or the reverse; or it is further than this run is to go.
            CheckpointError: there are checkpoints, and none is usable.
        """
        found = checkpoint.latest(self.checkpoints, self.say, self.parallel)
        if found is not None:
            self.parallel.first(lambda: self._require_fit(found[1]))
        return found

    def _require_fit(self, state: dict[str, Any]) -> None:
        before, now = (_with_moments(c) for c in (state["config"], self.config.to_dict()))
        if different := checkpoint.differences(before["model"], now["model"]):
            raise ValueError(
                f"{self.path} holds a run of another model ({'; '.join(different)}): give it the same model, or name "
                "another --out"
            )
        if before["fp8"] != now["fp8"]:
            with_it, remedy = ("with", "go on with it") if before["fp8"] else ("without", "go on without it")
            raise ValueError(f"{self.path} was trained {with_it} --fp8: {remedy}, or name another --out")
        moments, wanted = before["optim"]["moments"], now["optim"]["moments"]
        if moments != wanted:
            raise ValueError(
                f"{self.path} holds AdamW's moments in {moments}, and this run wants {wanted}: go on with "
                f"--optim.moments {moments}, or name another --out"
            )
        if now["optim"]["ema"] and not before["optim"]["ema"]:
            raise ValueError(
                f"{self.path} was trained without an average of the weights: go on with --optim.ema 0, or name another "
                "--out"
            )
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{self.path} has already done {state['step']} steps, more than --steps {self.config.steps}: raise "
                "--steps, or name another --out"
            )
        before, now = ({k: v for k, v in c.items() if k not in FREE} for c in (before, now))
        if changed := checkpoint.differences(before, now):
            self.say(f"note: settings changed since the checkpoint: {'; '.join(changed)}")

    def prepare(self, found: Found | None) -> Dataset:
        """The text as tokens: process 0 makes the cache and all checks, then the others open it.

        Raises:
            ValueError: too little text, or a tokenizer larger than the model's vocabulary, or not what the run began
                with.
            FileNotFoundError: a path that is not there.
        """
        data: list[Dataset] = []

        def build() -> None:
            c = self.config
            dataset = prepare(
                list(c.data) or None,
                c.model.vocab_size,
                tokenizer=c.text.tokenizer,
                style=c.text.style,
                seed=c.seed,
                fim_rate=c.text.fim_rate,
                held_out=c.text.held_out,
                max_bytes=c.text.max_bytes,
                progress=self.parallel.rank == 0 and not self.quiet,
            )
            data.append(dataset)
            if dataset.tokenizer.vocab_size > c.model.vocab_size:
                raise ValueError(
                    f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, the model a vocabulary of "
                    f"{c.model.vocab_size}: set --model.vocab-size {dataset.tokenizer.vocab_size}"
                )
            if found and found[1]["data"] != dataset.fingerprint:
                raise ValueError(
                    f"{self.path} was trained on other text or with another tokenizer: give the --data and --text.* it "
                    "began with, or name another --out"
                )
            T = c.batch.sequence_length
            dataset.train.windows(T + 1 + c.model.num_nextn_predict_layers, T)

        self.parallel.first(build)
        if not data:
            build()
        if not self.quiet:
            self.say(f"text: {data[0].corpus.summary()}; {len(data[0].train):,} tokens to train on")
        return data[0]

    def write(self, data: Dataset) -> None:
        """Settings and tokenizer into the folder, now that nothing can be wrong with them."""

        def work() -> None:
            temporary = self.path / f".{SETTINGS}"
            temporary.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.path / SETTINGS)
            data.tokenizer.save(self.path)

        self.parallel.first(work)

    def state(self, data: Dataset, **more: Any) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {"data": data.fingerprint, "config": self.config.to_dict() | {"pause_at": None}, **more}


def _with_moments(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with "auto" moments resolved, and those of a run of before there were FP8 and BF16 moments."""
    fp8, optim = settings.get("fp8", False), {"moments": "fp32", **settings["optim"]}
    return {**settings, "fp8": fp8, "optim": {**optim, "moments": moments_for(optim["moments"], fp8)}}


def choose_dtype(asked: Dtype, device: torch.device) -> Dtype:
    """What to compute in, "fp32" or "bf16". For "auto": bf16 where the device multiplies it in hardware.

    On CPUs that is AVX512-BF16 or AMX; elsewhere bf16 is emulated and slower than fp32.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(flag is not None and flag() for flag in flags) else "fp32"
