"""A run's numbers before it is started: placement, memory, traffic, time and price, from its settings alone.

`plan_run` builds the job of every pipeline rank on the meta device, where modules have shapes and no memory, and takes
everything else from the schedule that would be executed and from closed forms. `dry_run` prints it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3_book.config import ModelConfig
from dsv3_book.costs import count
from dsv3_book.costs_activations import AVOIDABLE, Numbers
from dsv3_book.costs_memory import rank_params
from dsv3_book.parallel.mesh import Layout
from dsv3_book.pipeline.cluster import ALONE, GPUS_PER_NODE, PEAK, PROFILED, Setting
from dsv3_book.pipeline.place import place_layers
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.plan_links import Links, links
from dsv3_book.train.plan_memory import Memory, PlannedJob, Weight, count_weights, memory, unique, with_numbers
from dsv3_book.train.plan_time import Batches, Clock, Speed, Term, speed, terms

GPU_MEMORY = 80e9  # bytes of an H800, of which CUDA, NCCL and fragments want some GB that are not counted here
BLOCK = 128  # tokens: in steps of so many a shorter sequence that fits is looked for


@dataclass(frozen=True)
class Stage:
    """A stage's piece of the model; `ranks` are the pipeline ranks that hold it, two of them under DualPipe."""

    number: int
    layers: tuple[int, ...]
    dense: tuple[int, ...]  # those of them without experts
    mtp: tuple[int, ...]  # MTP modules, by the layer number they carry
    embedding: bool  # its own, or (with MTP, at the last stage) the copy that MTP reads
    head: bool
    ranks: tuple[int, ...]
    parameters: int  # on one GPU


@dataclass(frozen=True)
class Change:
    """Something that could be done otherwise, and what that alone would save."""

    what: str
    why: str
    saves: float  # bytes, on the pipeline rank where it is most
    rank: int


@dataclass(frozen=True)
class Plan:
    """What `plan_run` finds. Memory and links are by pipeline rank; a step is one of the full batch."""

    preset: str
    model: ModelConfig
    world: int
    ranks_per_node: int
    pp: int
    dp: int
    ep: int
    nodes: int  # that one set of experts is spread over
    schedule: str
    numbers: Numbers
    moments: str
    sequence_length: int
    batches: tuple[tuple[int, int, int], ...]  # sequences, micro-batches of a pipeline, steps
    parameters: int  # of the whole model, each once: counted on the modules
    expected: int  # the same by the closed forms of `costs`
    stages: tuple[Stage, ...]
    memory: tuple[Memory, ...]
    changes: tuple[Change, ...]
    changed: tuple[Memory, ...]  # with all of the changes
    longest: int  # tokens in a sequence, this run's or as many as fit (0: none)
    links: tuple[Links, ...]
    speeds: tuple[Speed, ...]
    terms: tuple[Term, ...]  # of the first speed
    problems: tuple[str, ...]  # what keeps the run from being started

    @property
    def micro_batches(self) -> int:
        return self.batches[-1][1]

    @property
    def sequences(self) -> int:
        return self.batches[-1][0]

    @property
    def steps(self) -> int:
        return sum(n for *_, n in self.batches)

    @property
    def tokens(self) -> int:
        return self.sequence_length * sum(sequences * n for sequences, _, n in self.batches)

    @property
    def worst(self) -> Memory:
        """The fullest rank."""
        return max(self.memory, key=lambda one: one.total)

    @property
    def fits(self) -> bool:
        return self.worst.total <= GPU_MEMORY

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values, with each rank's totals."""
        out = asdict(self) | {"fits": self.fits}
        for name in ("memory", "changed"):
            out[name] = [asdict(one) | {"total": one.total} for one in getattr(self, name)]
        return out


def plan_run(config: TrainConfig, world: int) -> Plan:
    """The plan of this run on `world` GPUs, `parallel.ranks_per_node` (else 8, or all) of them on a node.

    Raises:
        ValueError: the settings don't fit the number of processes, or each other. A batch that only *begins* too small
            for the schedule is among the plan's `problems` instead.
    """
    if swapped := [f"--swap.{name}" for name, path in asdict(config.swap).items() if path is not None]:
        raise ValueError(f"a dry run knows the package's own parts only: leave out {', '.join(swapped)}")
    per_node = min(GPUS_PER_NODE, world)
    full = replace(config, batch=replace(config.batch, start=config.batch.end))
    layout = full.layout(world, per_node)
    problems = []
    try:
        config.layout(world, per_node)
    except ValueError as error:
        problems.append(str(error))
    b, share = config.batch, config.batch.micro * layout.dp
    batches = Batches.of(config.recipe(), config.steps, share)
    job = make_job(config, layout, batches.levels[-1][1])
    held = count_weights(job)
    found = memory(job, held)
    traffic = links(job, layout, held)
    clocks = [Clock(job, machine, found, traffic) for machine in (PROFILED, ALONE, PEAK)]
    speeds = [speed(job, clock, batches, world, b.sequence_length) for clock in clocks]
    counts = count(config.model)
    changes, changed = _changes(job, held, found)
    return Plan(
        preset=config.preset,
        model=config.model,
        world=world,
        ranks_per_node=layout.ranks_per_node,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        nodes=job.nodes,
        schedule=job.schedule.name,
        numbers=job.numbers,
        moments=job.moments,
        sequence_length=b.sequence_length,
        batches=batches.levels,
        parameters=unique(held, layout.ep),
        expected=counts.main + counts.mtp,
        stages=tuple(_stages(job)),
        memory=tuple(found),
        changes=tuple(changes),
        changed=tuple(changed),
        longest=_longest(job, held, b.sequence_length),
        links=tuple(traffic),
        speeds=tuple(speeds),
        terms=tuple(terms(job, clocks[0], batches, speeds[0], world, b.sequence_length)),
        problems=tuple(problems),
    )


def make_job(config: TrainConfig, layout: Layout, micro_batches: int) -> PlannedJob:
    """What decides who holds what. Weights are as `ZeRO1` keeps them by default: fp32 on every rank."""
    inside = min(layout.ep, layout.ranks_per_node)
    schedule = make_schedule(config.schedule, layout.pp, micro_batches)
    return PlannedJob(
        cfg=config.model,
        schedule=schedule,
        placed=place_layers(config.model, schedule.num_stages),
        dp=layout.dp,
        ep=layout.ep,
        nodes=layout.ep // inside,
        setting=Setting(
            sequences=config.batch.micro,
            per_node=inside,
            direct=config.parallel.dispatch == "direct",
            fp8=config.fp8,
            recompute=config.recompute,
        ),
        numbers=Numbers("fp32" if config.dtype == "fp32" else "bf16", config.fp8, config.recompute),
        moments=config.moments,
        zero=config.parallel.zero,
        ema=config.optim.ema > 0,
        tokens=config.batch.micro * config.batch.sequence_length,
    )


def _longest(job: PlannedJob, held: Sequence[Mapping[str, Weight]], length: int) -> int:
    """The most tokens in a sequence with which all ranks fit: `length`, or less, in multiples of BLOCK."""

    def too_long(tokens: int) -> bool:
        found = memory(replace(job, tokens=job.setting.sequences * tokens), held)
        return max(one.total for one in found) > GPU_MEMORY

    if not too_long(length):
        return length
    return BLOCK * (bisect_left(range(1, -(-length // BLOCK)), True, key=lambda n: too_long(n * BLOCK)))


def _stages(job: PlannedJob) -> list[Stage]:
    cfg, last = job.cfg, len(job.placed) - 1
    found = []
    for number, layers in enumerate(job.placed):
        mtp = tuple(i for i in job.indices(number) if i >= cfg.num_hidden_layers)
        embedding = number == 0 or bool(mtp)
        ranks = tuple(r for r in range(job.schedule.num_ranks) if number in job.schedule.stages(r))
        dense = tuple(i for i in layers if not cfg.is_moe_layer(i))
        parameters = sum(rank_params(cfg, layers, job.ep, embedding, number == last))
        found.append(Stage(number, tuple(layers), dense, mtp, embedding, number == last, ranks, parameters))
    return found


def _changes(
    job: PlannedJob, held: Sequence[Mapping[str, Weight]], found: Sequence[Memory]
) -> tuple[list[Change], list[Memory]]:
    """What would need less memory, each alone; and what all ranks hold with all of it."""
    changes = []

    def add(what: str, why: str, after: Sequence[Memory]) -> None:
        saves, rank = max((before.total - now.total, -now.rank) for before, now in zip(found, after, strict=True))
        if saves > 1e-3 * found[-rank].total:
            changes.append(Change(what, why, saves, -rank))

    options: list[tuple[str, dict[str, Any], str]] = []
    if not job.numbers.recompute:
        options.append(("recomputation", {"recompute": True}, "--recompute: norms and MLA's up-projections again"))
    if job.numbers.dtype == "bf16" and not job.numbers.fp8:
        options.append(("FP8", {"fp8": True}, "--fp8: what products keep takes half"))
    if job.numbers.dtype == "bf16" and job.zero:
        options.append(("weights in bf16", {"weights": "bf16"}, "as the report's; fp32 ones in ZeRO-1's shards only"))
    best = job
    for what, numbers, why in options:
        add(what, why, memory(with_numbers(job, **numbers), held))
        best = with_numbers(best, **numbers)
    for name in job.numbers.avoidable:
        add(name, AVOIDABLE[name], memory(job, held, [name]))
    return changes, memory(best, held, best.numbers.avoidable)
