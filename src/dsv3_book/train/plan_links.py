"""What each GPU of a run sends in a step, over InfiniBand and over NVLink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv3_book.costs import combine_bytes, dispatch_bytes
from dsv3_book.parallel.mesh import Layout, link
from dsv3_book.pipeline.cluster import copies_crossed
from dsv3_book.train.plan_memory import PlannedJob, Weight, kinds


@dataclass(frozen=True)
class Link:
    """Bytes over one kind of link, from one GPU, in one step."""

    dispatch: float = 0.0  # dispatches and combines, forward and backward; rows, without the numbers that go with them
    stages: float = 0.0  # hidden states and their gradients, to the next stage and the one before
    state: float = 0.0  # gradients summed, weights gathered

    @property
    def total(self) -> float:
        return self.dispatch + self.stages + self.state


@dataclass(frozen=True)
class Links:
    """Of one pipeline rank."""

    rank: int
    ib: Link
    nvlink: Link


def links(job: PlannedJob, layout: Layout, held: Sequence[Mapping[str, Weight]]) -> list[Links]:
    """What a GPU of every pipeline rank sends."""
    found = []
    for rank in range(layout.pp):
        dispatched = _dispatched(job, rank)
        passed = _passed_on(job, layout, rank)
        state = _state(job, layout, held, rank)
        ib, nvlink = (Link(dispatched[k], passed[k], state[k]) for k in ("ib", "nvlink"))
        found.append(Links(rank, ib, nvlink))
    return found


def layer_bytes(job: PlannedJob) -> dict[str, float]:
    """Bytes a GPU sends for one MoE layer and micro-batch: tokens out, results back, and the gradients of both."""
    if job.ep == 1:
        return {"ib": 0.0, "nvlink": 0.0}
    out, back = "fp8" if job.numbers.fp8 else job.numbers.dtype, job.numbers.dtype
    copies = copies_crossed(job.cfg, job.nodes, True, job.setting)
    return {
        name: 2 * job.tokens * (dispatch_bytes(job.cfg, n, out) + combine_bytes(job.cfg, n, back))
        for name, n in zip(("ib", "nvlink"), copies, strict=True)
    }


def _dispatched(job: PlannedJob, rank: int) -> dict[str, float]:
    layers = sum(
        sum(job.cfg.is_moe_layer(i) for i in job.indices(part.stage))
        for action in job.schedule.actions[rank]
        for part in action.parts
        if part.kind == "F"
    )
    return {name: layers * size for name, size in layer_bytes(job).items()}


def _passed_on(job: PlannedJob, layout: Layout, rank: int) -> dict[str, float]:
    sent = {"ib": 0.0, "nvlink": 0.0}
    for transfer in job.schedule.sends(rank):
        way = link(rank * layout.dp, transfer.target * layout.dp, layout.ranks_per_node)
        sent[way] += job.tokens * job.cfg.hidden_size * job.numbers.size
    return sent


def _state(job: PlannedJob, layout: Layout, held: Sequence[Mapping[str, Weight]], rank: int) -> dict[str, float]:
    """A reduce-scatter of fp32 gradients and a gathering, of weights (ZeRO-1) or of the gradients' sums (without).

    Counted as done inside every node first, then between nodes on what each GPU has then, which is also what rings
    through all GPUs of a node in turn come to. Gloo's send more over slow links.
    """
    gathered = 2 if job.numbers.weights == "bf16" else 4
    sent = {"ib": 0.0, "nvlink": 0.0}
    for (ranks, expert), n in kinds(held, rank).items():
        plain = layout.ranks("edp" if expert else "dp", 0)
        group = [r + other * layout.dp for r in plain for other in ranks]
        nodes = len({layout.node(r) for r in group})
        inside = len(group) / nodes
        sent["nvlink"] += n * (4 + gathered) * (1 - 1 / inside)
        sent["ib"] += n * (4 + gathered) / inside * (1 - 1 / nodes)
    return sent
