"""`--dry-run`: what a run would need and how fast it would go, printed in seconds and without its GPUs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dsv3_book.config import PRESETS
from dsv3_book.costs import (
    REPORT_GPUS,
    REPORT_HOURS_PER_TRILLION,
    REPORT_PRETRAIN_TOKENS,
    REPORT_SEQUENCE_LENGTH,
    pretraining_bill,
    tokens_per_second_per_gpu,
)
from dsv3_book.pipeline.cluster import ALONE, PROFILED
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.plan import GPU_MEMORY, Plan, Stage, plan_run
from dsv3_book.train.plan_links import Link, Links
from dsv3_book.train.plan_memory import Memory
from dsv3_book.train.plan_time import END, UNEVEN

Item = TypeVar("Item")
UNITS = (("GB", 1e9), ("MB", 1e6))
WIDTH = 100  # columns that lines of words fill; tables have the width of their cells


def dry_run(config: TrainConfig, world: int | None) -> Plan:
    """Prints the plan of a run on `world` GPUs, and returns it.

    Raises:
        ValueError: no `world`, or settings that don't fit it or each other.
    """
    if world is None or world < 1:
        raise ValueError(f"--dry-run needs --world, the number of processes (1 or more), got {world}")
    plan = plan_run(config, world)
    print(text(plan))
    return plan


def text(plan: Plan) -> str:
    """The plan in at most 100 columns."""
    parts = [job(plan), placement(plan), memory(plan), traffic(plan), time(plan)]
    if is_reports(plan):
        parts.append(beside_the_report(plan))
    return "\n\n".join("\n".join(lines) for lines in parts)


def job(plan: Plan) -> list[str]:
    """What is planned, and what keeps it from being started."""
    n, first = plan.numbers, plan.batches[0][0]
    precision = f"{'fp8 products, ' if n.fp8 else ''}{n.dtype} activations, {n.weights} weights, {plan.moments} moments"
    lines = [
        f"{plan.preset} on {plan.world:,} GPUs, {plan.ranks_per_node} on a node",
        f"  pipeline: pp {plan.pp}, {plan.schedule}, {plan.micro_batches} micro-batches a step",
        f"  data parallel: dp {plan.dp}; experts over ep {plan.ep} of these, on {plan.nodes} node(s)",
        f"  a step: {plan.sequences:,} sequences of {plan.sequence_length:,} tokens, in the beginning {first:,}",
        f"  the run: {plan.steps:,} steps, {_tokens(plan.tokens)} tokens",
        f"  {precision}{', norms and up-projections recomputed' if n.recompute else ''}",
        f"  parameters, MTP's included: {plan.parameters:,} counted on the meta device, {plan.expected:,} expected",
    ]
    return lines + [line for problem in plan.problems for line in _wrapped(f"  CAN'T START: {problem}", 4)]


def placement(plan: Plan) -> list[str]:
    """Which layers, and what besides them, each stage has, and the pipeline ranks that hold it."""
    rows = [
        (", ".join(map(str, s.ranks)), str(s.number), _pieces(s), f"{s.parameters / 1e6:,.1f}") for s in plan.stages
    ]
    return ["Placement (millions of parameters on one GPU)"] + _table(
        ("pipeline ranks", "stage", "holds", "parameters"), rows, "<><>"
    )


def memory(plan: Plan) -> list[str]:
    """By pipeline rank, fullest first; whether it fits; what could be done otherwise."""
    ordered = sorted(plan.memory, key=lambda m: (-m.total, m.rank))
    columns: dict[str, Callable[[Memory], float]] = {
        "weights": lambda m: m.weights + m.master,
        "grads": lambda m: m.gradients,
        "moments": lambda m: m.moments,
        "fp8 copies": lambda m: m.fp8_copies,
        "activations": lambda m: m.activations,
        "buffers": lambda m: m.buffers,
        "workspace": lambda m: m.workspace,
        "total": lambda m: m.total,
        "CPU": lambda m: m.cpu,
    }
    worst, most = plan.worst, max(m.micro_batches for m in plan.memory)
    unit, size = _unit(worst.total)
    rows = [(_ranks(m.rank for m in alike), *key) for key, alike in _alike(ordered, list(columns.values()), size)]
    lines = [f"Memory of one GPU, {unit}, by pipeline rank, fullest first (there are {GPU_MEMORY / 1e9:.0f} GB)"]
    lines += _table(("ranks", *columns), rows, "<" + ">" * len(columns))
    lines += _wrapped(
        f"  activations: of {most} micro-batch(es) at most; buffers: between stages, gradients on their way, and "
        "(estimated) all-to-alls; workspace: of the largest piece of a backward (estimated); CPU: the weights' "
        "average. Not counted: CUDA, NCCL and fragments, some GB.",
        2,
    )
    over = worst.total - GPU_MEMORY
    verdict = f"fits, with {-over / 1e9:.1f} GB to spare" if plan.fits else f"does NOT fit, by {over / 1e9:.1f} GB,"
    lines.append(f"  {verdict} on pipeline rank {worst.rank}, the fullest")
    if 0 < plan.longest < plan.sequence_length:
        lines.append(f"  Sequences of at most {plan.longest:,} tokens would fit")
    if plan.changes:
        lines.append(f"  Could be done otherwise ({unit} that each alone saves, and on which pipeline rank most):")
        for change in plan.changes:
            lines += _wrapped(f"    {change.saves / size:6.1f} ({change.rank:>2})  {change.what}: {change.why}", 17)
        left = max(plan.changed, key=lambda m: m.total)
        lines.append(f"  With all of it: {left.total / size:.1f} {unit} on the fullest rank, {left.rank}")
    return lines


def traffic(plan: Plan) -> list[str]:
    """Bytes that a GPU sends in a step, by pipeline rank."""
    columns: dict[str, Callable[[Link], float]] = {
        "all-to-all": lambda link: link.dispatch,
        "stages": lambda link: link.stages,
        "state": lambda link: link.state,
        "total": lambda link: link.total,
    }
    unit, size = _unit(max(link.total for one in plan.links for link in (one.ib, one.nvlink)))
    ways: list[Callable[[Links], float]] = [
        lambda one, way=way, f=f: f(getattr(one, way))  # type: ignore[misc]
        for way in ("ib", "nvlink")
        for f in columns.values()
    ]
    rows = [(_ranks(one.rank for one in alike), *key) for key, alike in _alike(plan.links, ways, size)]
    header = ("ranks", *(f"{where} {name}" if name == "total" else name for where in ("IB", "NVL") for name in columns))
    busy = max(one.ib.total for one in plan.links) / PROFILED.ib / plan.speeds[0].step_seconds
    return [
        f"Sent by one GPU in a step, {unit}: first over InfiniBand, then over NVLink",
        *_table(header, rows, "<" + ">" * 8),
        f"  InfiniBand at {PROFILED.ib / 1e9:.0f} GB/s would be busy for {busy:.0%} of a step ({PROFILED.name})",
    ]


def time(plan: Plan) -> list[str]:
    """Steps, speed and price at the rates of each machine; and where the first one's time goes."""
    rows = [
        (
            s.machine,
            _seconds(s.pipeline_seconds),
            _seconds(s.end_seconds),
            f"{s.idle_share:.1%}",
            f"{s.tokens_per_second_per_gpu:,.0f}",
            f"{s.hours_per_trillion / 1e3:.1f}",
            f"{s.days:.3g}",
            f"{s.dollars:,.0f}",
        )
        for s in plan.speeds
    ]
    header = ("H800s at the rates of", "step", "+ end", "idle", "tokens/s/GPU", "K h/T", "days", "$")
    lines = ["Time and price", *_table(header, rows, "<" + ">" * 7)]
    lines += _wrapped(
        "  step: forward and backward, simulated; + end: gradients, weights and optimiser, estimated, with nothing "
        "beside them; idle: share of the simulated part in which the average GPU waits; K h/T: thousand GPU-hours per "
        "trillion tokens, the run's mean; days, and $ at 2 an hour: of the run. Not counted: data, checkpoints, "
        "validation, slow and failing machines.",
        2,
    )
    lines += ["", f"Where the time goes ({plan.speeds[0].machine}), thousand GPU-hours per trillion tokens"]
    lines += [f"  {term.name:<50}{term.hours / 1e3:>9.1f}" for term in plan.terms]
    return lines + [f"  {'together':<50}{plan.speeds[0].hours_per_trillion / 1e3:>9.1f}"]


def is_reports(plan: Plan) -> bool:
    """Whether this is the run that the report tells of, by its model, cluster and sequences."""
    v3 = PRESETS["v3-671b"]
    like = v3.replace(max_position_embeddings=plan.model.max_position_embeddings, rope_scaling=plan.model.rope_scaling)
    return (plan.model, plan.world, plan.sequence_length) == (like, REPORT_GPUS, REPORT_SEQUENCE_LENGTH)


def beside_the_report(plan: Plan) -> list[str]:
    """The report's figures, and what lies between them and ours."""
    slow, quick = (next(s for s in plan.speeds if s.machine == m.name) for m in (PROFILED, ALONE))
    one, whole = pretraining_bill(1e12), pretraining_bill()
    named = {term.name: term.hours / 1e3 for term in plan.terms}
    even = slow.hours_per_trillion / 1e3 - named[UNEVEN]
    days = slow.days / plan.tokens * 1e12
    away, left = (1e3 * hours / REPORT_HOURS_PER_TRILLION - 1 for hours in (even + named[UNEVEN], even))
    found = [
        f"The report: {one.gpu_hours / 1e3:.0f} K GPU-hours and {one.days:.1f} days per trillion tokens "
        f"({tokens_per_second_per_gpu():,.0f} tokens/s per GPU), {whole.days:.1f} days and ${whole.dollars:,.0f} for "
        f"{_tokens(REPORT_PRETRAIN_TOKENS)}.",
        f"Here: {slow.hours_per_trillion / 1e3:.0f} K and {days:.1f} days ({away:+.0%}) at the rates of the released "
        f"profile; {quick.hours_per_trillion / 1e3:.0f} K at those that the released kernels reach by themselves.",
        f"Stages cost {named[UNEVEN]:.0f} K of it: head and MTP make the last one the longest, though it has but one "
        f"layer. Were all equally long, it would be {even:.0f} K ({left:+.0%}). The report doesn't say how many "
        "layers a stage has.",
        f"The end of a step costs {named[END]:.1f} K, taken as if nothing ran beside it; the first, smaller batches "
        f"{list(named.values())[-1]:.1f} K.",
        "Not counted here, but in the report's hours: data, checkpoints, slow and failing machines.",
    ]
    return ["Beside the report", *(line for one in found for line in _wrapped(f"  {one}", 2))]


# Lines ---------------------------------------------------------------------------------------------------------------
def _pieces(stage: Stage) -> str:
    pieces = ["embedding"] if stage.number == 0 else []
    moe = [i for i in stage.layers if i not in stage.dense]
    if stage.dense:
        pieces.append(f"dense layer{'s' * (len(stage.dense) > 1)} {_ranks(stage.dense)}")
    if moe:
        pieces.append(f"layer{'s' * (len(moe) > 1)} {_ranks(moe)}")
    pieces += ["head"] if stage.head else []
    if stage.mtp:
        reads = "" if stage.number == 0 else "; reads the embedding"
        pieces.append(f"MTP ({_ranks(stage.mtp)}{reads})")
    return ", ".join(pieces) or "nothing"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return [
        "  " + "  ".join(f"{cell:{way}{width}}" for cell, way, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    ]


def _ranks(numbers: Iterable[int]) -> str:
    """Ascending numbers, runs of them as "1–14"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _alike(
    items: Iterable[Item], columns: Sequence[Callable[[Item], float]], size: float
) -> list[tuple[tuple[str, ...], list[Item]]]:
    """Items that show the same numbers together, in the order of their first."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(tuple(f"{f(item) / size:.1f}" for f in columns), []).append(item)
    return list(groups.items())


def _unit(most: float) -> tuple[str, float]:
    return next(((name, size) for name, size in UNITS if most >= size), UNITS[-1])


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _tokens(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,.0f}"


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
