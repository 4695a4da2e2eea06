"""How long a run takes: steps simulated at a machine's rates, the end of a step estimated, the batch growing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_book.costs import REPORT_DOLLARS_PER_HOUR, Bill
from dsv3_book.pipeline.cluster import (
    PEAK,
    Machine,
    hop_ms,
    stage_costs,
    stage_layers,
)
from dsv3_book.pipeline.pair import Layer, is_communication
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate
from dsv3_book.train.plan_links import Links
from dsv3_book.train.plan_memory import Memory, PlannedJob
from dsv3_book.train.recipe import Recipe

UNEVEN, END = "stages that are not equally long", "gradients, weights and optimiser"  # terms
HBM = 3.35e12  # bytes/s of an H800's memory (NVIDIA's figure for H100 SXM, the same chip)


@dataclass(frozen=True)
class Speed:
    """A run at one machine's rates. Steps are those of the full batch, unless said otherwise."""

    machine: str
    pipeline_seconds: float  # of a step: forward and backward, simulated
    end_seconds: float  # of a step: gradients, weights and optimiser with nothing beside them, estimated
    idle_share: float  # of the simulated part, in which the average rank has nothing to do
    tokens_per_second_per_gpu: float
    hours_per_trillion: float  # GPU-hours, the mean over the whole run, its first small batches too
    days: float  # of the whole run
    gpu_hours: float
    dollars: float

    @property
    def step_seconds(self) -> float:
        return self.pipeline_seconds + self.end_seconds


@dataclass(frozen=True)
class Term:
    """What comes to the time when one more thing is taken into account, in GPU-hours per trillion tokens."""

    name: str
    hours: float


@dataclass(frozen=True)
class Batches:
    """How the batch grows: (sequences, micro-batches of each pipeline, steps). The last is the full one."""

    levels: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(recipe: Recipe, steps: int, share: int) -> Batches:
        """share: sequences that make a micro-batch of every pipeline, micro · dp."""
        levels: dict[int, int] = {}
        seen = done = 0
        while done < steps and (size := recipe.batch(seen)) < recipe.batch_end:
            levels[size] = levels.get(size, 0) + 1
            seen, done = seen + size * recipe.sequence_length, done + 1
        levels[recipe.batch_end] = levels.get(recipe.batch_end, 0) + steps - done
        return Batches(tuple((size, size // share, n) for size, n in levels.items()))


def possible(name: str, ranks: int, micro_batches: int) -> int:
    """The least number of micro-batches, from this one on, that the schedule can do.

    Raises:
        ValueError: what the schedule says of the first, where none of the next hundred will do.
    """
    refused: ValueError | None = None
    for M in range(micro_batches, micro_batches + 100):
        try:
            make_schedule(name, ranks, M)
            return M
        except ValueError as error:
            refused = refused or error
    raise refused or ValueError("no number of micro-batches")


class Clock:
    """Durations of a job's steps on one machine."""

    def __init__(self, job: PlannedJob, machine: Machine, memory: Sequence[Memory], links: Sequence[Links]) -> None:
        self.job, self.machine = job, machine
        per_sequence = job.tokens // job.setting.sequences
        self.stages = stage_layers(job.cfg, len(job.placed), machine, per_sequence, job.nodes, job.setting)
        self.hop = hop_ms(job.cfg, machine, job.tokens)
        self.costs = stage_costs(self.stages, self.hop)
        self.end = max(_end(job, machine, *both) for both in zip(memory, links, strict=True))

    def pipeline(self, micro_batches: int, costs: Costs | None = None) -> tuple[float, float]:
        """Seconds of forward and backward, and the share in which the average rank idles."""
        schedule = make_schedule(self.job.schedule.name, self.job.schedule.num_ranks, micro_batches)
        timeline = simulate(schedule, costs or self.costs)
        return timeline.makespan / 1e3, sum(timeline.bubble) / (timeline.makespan * timeline.num_ranks)


def _end(job: PlannedJob, machine: Machine, memory: Memory, links: Links) -> float:
    """Seconds: the state's bytes over one link after the other; then AdamW reads and writes its shard, and weights are
    quantised again."""
    on_the_way = links.ib.state / machine.ib + links.nvlink.state / machine.nvlink
    shard = memory.master or memory.moments * (2 if job.moments == "bf16" else 1) // 2
    adamw = 3 * shard + 2 * memory.moments  # weights and moments there and back, gradients
    again = memory.weights + memory.fp8_copies if memory.fp8_copies else 0
    return on_the_way + (adamw + again) / HBM


def speed(job: PlannedJob, clock: Clock, batches: Batches, world: int, tokens_per_sequence: int) -> Speed:
    """The run, with every batch size's steps. Between the smallest and the full batch a step's length is taken as a
    straight line in the number of micro-batches, which a pipeline's is; a batch too small for the schedule takes as
    long as the least one that isn't."""
    name, ranks = job.schedule.name, job.schedule.num_ranks
    size, full, _ = batches.levels[-1]
    least = possible(name, ranks, batches.levels[0][1])
    seconds, idle = clock.pipeline(full)
    short = clock.pipeline(least)[0] if least < full else seconds
    slope = (seconds - short) / (full - least) if least < full else 0.0
    total = sum(n * (seconds - slope * (full - max(M, least)) + clock.end) for _, M, n in batches.levels)
    tokens = sum(sequences * n for sequences, _, n in batches.levels) * tokens_per_sequence
    bill = Bill(total * world / 3600, world, REPORT_DOLLARS_PER_HOUR)
    return Speed(
        machine=clock.machine.name,
        pipeline_seconds=seconds,
        end_seconds=clock.end,
        idle_share=idle,
        tokens_per_second_per_gpu=size * tokens_per_sequence / (seconds + clock.end) / world,
        hours_per_trillion=bill.gpu_hours / (tokens / 1e12),
        days=bill.days,
        gpu_hours=bill.gpu_hours,
        dollars=bill.dollars,
    )


def terms(
    job: PlannedJob, clock: Clock, batches: Batches, whole: Speed, world: int, tokens_per_sequence: int
) -> list[Term]:
    """Where the time goes, at the clock's rates: each term is what is added by looking at one thing more. All stages
    are taken to be equally long until their term comes."""
    size, M, _ = batches.levels[-1]
    ranks = job.schedule.num_ranks

    def hours(seconds: float) -> float:
        return seconds * world / 3600 / (size * tokens_per_sequence / 1e12)

    def work(machine: Machine) -> float:
        per_sequence = job.tokens // job.setting.sequences
        stages = stage_layers(job.cfg, len(job.placed), machine, per_sequence, job.nodes, job.setting)
        return sum(sum(layer.values()) for stage in silent(stages) for layer in stage) * M / ranks / 1e3

    alike = even(clock.stages)
    times = [
        ("products alone, at the hardware's peak rates", work(PEAK)),
        ("products at the kernels' rates, other kernels", work(clock.machine)),
        ("filling and draining the pipeline", clock.pipeline(M, stage_costs(silent(alike)))[0]),
        ("transfers that nothing hides", clock.pipeline(M, stage_costs(alike, clock.hop))[0]),
        (UNEVEN, whole.pipeline_seconds),
        (END, whole.pipeline_seconds + whole.end_seconds),
    ]
    marks = [hours(seconds) for _, seconds in times] + [whole.hours_per_trillion]
    names = [name for name, _ in times] + ["small batches at the beginning"]
    return [Term(name, now - before) for name, now, before in zip(names, marks, [0.0, *marks], strict=False)]


def silent(stages: Sequence[Sequence[Layer]]) -> list[list[Layer]]:
    """The stages with nothing that travels between experts."""
    return [
        [{name: time for name, time in layer.items() if not is_communication(name)} for layer in stage]
        for stage in stages
    ]


def even(stages: Sequence[Sequence[Layer]]) -> list[list[Layer]]:
    """As many stages, all alike, with as much to do in all: of whole layers, as many in each as comes nearest to the
    mean, all of them with the mean of every part."""
    layers = [layer for stage in stages for layer in stage]
    each = max(1, round(sum("attention(F)" in layer for layer in layers) / len(stages)))
    names = dict.fromkeys(name for layer in layers for name in layer)
    mean = {name: sum(layer.get(name, 0.0) for layer in layers) / (each * len(stages)) for name in names}
    return [[mean] * each for _ in stages]
