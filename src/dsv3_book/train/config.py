"""The settings of a training run: typed, in groups, checked. `train/presets.py` gives them their values."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.parallel.mesh import Layout
from dsv3_book.pipeline.schedule import check_numbers
from dsv3_book.train.recipe import Recipe, tokens_in
from dsv3_book.train.swaps import Swap

Dtype = Literal["auto", "fp32", "bf16"]
Moments = Literal["auto", "fp32", "bf16"]
ScheduleName = Literal["auto", "1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"]


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

    def sizes(self) -> range:
        """Sequences in a step, from the first to the last of the ramp."""
        return range(self.start, self.end + 1, self.multiple)


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
    ema: float = 0.999
    """Decay of the average of the weights that is kept in CPU memory; 0: keep none."""


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
class Parallel:
    """How the processes share the work. Those that pp leaves over, world / pp, work data parallel (dp)."""

    pp: int = 1
    """Pipeline ranks: each holds some of the layers."""
    ep: int = 1
    """Data parallel ranks that hold the experts together, each a part of them."""
    schedule: ScheduleName = "auto"
    """Of the pipeline; auto: dualpipe, and for one rank 1f1b."""
    dispatch: Literal["auto", "direct"] = "auto"
    """How tokens travel to experts; auto: in two hops where the experts are on several nodes, direct on one."""
    ranks_per_node: int | None = None
    """Processes on a node, as the launcher says if not given. Another number plays several nodes on one machine."""
    zero: bool = True
    """ZeRO-1: the optimiser's state is shared out among the ranks that hold the same weights."""
    timeout: float = 600.0
    """Seconds to wait for another process before giving up."""


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
    recompute: bool = False
    """Compute RMSNorm and MLA's up-projections again in backward instead of keeping them (report §3.2.3)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is infinite or NaN: stop, or leave that step out and go on."""
    init: Path | None = None
    """A folder in the released format, whose weights a new run begins with."""
    pause_at: int | None = None
    """Stop after this step as Ctrl-C would: save, and leave the rest for the next start."""
    profile: int | None = None
    """Write a trace of this step, for ui.perfetto.dev."""
    dry_run: bool = False
    """Train nothing: build the job of --world processes without memory, and say what it needs and how fast it goes."""
    world: int | None = None
    """With --dry-run: how many processes."""
    prompt: str = "def "
    """What the sample at the end begins with."""
    model: tyro.conf.FlagConversionOff[ModelConfig] = field(default_factory=ModelConfig)
    parallel: tyro.conf.FlagConversionOff[Parallel] = field(default_factory=Parallel)
    swap: Swap = field(default_factory=Swap)
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
        if not 0 <= self.optim.ema < 1:
            raise ValueError(f"optim.ema must be at least 0 (no average) and less than 1, got {self.optim.ema}")
        if not self.parallel.timeout > 0:
            raise ValueError(f"parallel.timeout must be positive, got {self.parallel.timeout} seconds")
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

    @property
    def schedule(self) -> str:
        """The pipeline's schedule, by name."""
        if self.parallel.schedule != "auto":
            return self.parallel.schedule
        return "dualpipe" if self.parallel.pp > 1 else "1f1b"

    def layout(self, world: int, ranks_per_node: int | None = None) -> Layout:
        """Where each of `world` processes stands.

        ranks_per_node: what the launcher says; `parallel.ranks_per_node` goes before it.

        Raises:
            ValueError: the processes, the experts or any step's micro-batches don't divide so, or the schedule can't do
                their number; with the numbers and the remedy.
        """
        p, b = self.parallel, self.batch
        if p.pp < 1 or world % p.pp:
            raise ValueError(f"{world} processes don't divide into pipelines of parallel.pp = {p.pp}: change either")
        layout = Layout(p.pp, world // p.pp, p.ep, p.ranks_per_node or ranks_per_node or world)
        if self.model.n_routed_experts % p.ep:
            raise ValueError(f"{self.model.n_routed_experts} experts don't divide among parallel.ep = {p.ep} ranks")
        if b.multiple % (b.micro * layout.dp):
            raise ValueError(
                f"batch.multiple ({b.multiple} sequences) does not divide among {layout.dp} data parallel processes in "
                f"micro-batches of batch.micro ({b.micro}): lower batch.micro or raise batch.multiple"
            )
        # A schedule of one's own says itself which numbers it can do, when it is loaded.
        for size in b.sizes() if self.swap.schedule is None else ():
            try:
                check_numbers(self.schedule, p.pp, size // (b.micro * layout.dp))
            except ValueError as error:
                raise ValueError(
                    f"a step of {size} sequences over dp = {layout.dp} in micro-batches of {b.micro}: {error} (lower "
                    "batch.micro, raise batch.start and batch.multiple, or choose another parallel.schedule)"
                ) from None
        return layout

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; `from_dict(c.to_dict()) == c`."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> TrainConfig:
        """The settings that `to_dict` wrote. Raises ValueError on keys that are none."""
        raw = dict(raw)
        groups = {"batch": Batch, "optim": Optim, "balance": Balance, "text": Text, "every": Every}
        groups |= {"parallel": Parallel, "swap": Swap}
        try:
            for name, group in groups.items():
                raw[name] = group(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw[name].items()})
            model = dict(raw["model"])
            if model["rope_scaling"]:
                model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
            raw["model"] = ModelConfig(**model)
            paths = {name: Path(raw[name]) if raw[name] is not None else None for name in ("out", "init")}
            return TrainConfig(**raw | paths | {"data": tuple(raw["data"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not the settings of a run of this version of dsv3_book: {error}") from None


def moments_for(asked: str, fp8: bool) -> str:
    """What `--optim.moments` means beside `--fp8` or without it."""
    if asked != "auto":
        return asked
    return "bf16" if fp8 else "fp32"
