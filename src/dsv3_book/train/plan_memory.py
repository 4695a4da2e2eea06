"""What each pipeline rank of a run holds: parameters counted on the modules themselves, all else from closed forms.

A stage's modules are built on the meta device, exactly as `pipeline.executor.Pipeline` builds them, so no number here
needs memory for itself. All GPUs of a pipeline rank hold as much as each other (if loads are balanced).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from dsv3_book.config import ModelConfig
from dsv3_book.costs import TrainingBytes
from dsv3_book.costs_activations import Numbers, codes, kept_by_ends, kept_by_layer, owed_by_layer
from dsv3_book.costs_memory import ema_bytes, zero1_bytes
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.model import Transformer
from dsv3_book.model.experts import Experts
from dsv3_book.model.transformer import Part
from dsv3_book.parallel.buckets import BUCKET, IN_FLIGHT
from dsv3_book.pipeline.cluster import Setting, copies_crossed
from dsv3_book.pipeline.schedule import Action, Pair, Schedule
from dsv3_book.pipeline.transfers import AHEAD

LOGITS = 2**21  # in a chunk of the head's rows (`ops.linear_cross_entropy`)


@dataclass(frozen=True)
class Weight:
    """One parameter as a GPU holds it."""

    name: str
    numbers: int
    expert: bool
    fp8: bool  # multiplied in FP8, where a run is in FP8


@dataclass(frozen=True)
class PlannedJob:
    """What of a run decides who holds what."""

    cfg: ModelConfig
    schedule: Schedule
    placed: Sequence[range]  # layers of each stage
    dp: int
    ep: int
    nodes: int  # that one set of experts is spread over
    setting: Setting
    numbers: Numbers
    moments: str
    zero: bool
    ema: bool
    tokens: int  # in a micro-batch

    def indices(self, stage: int) -> list[int]:
        """The stage's layers, MTP modules' blocks among them."""
        cfg, last = self.cfg, len(self.placed) - 1
        mtp = range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers * (stage == last))
        return [*self.placed[stage], *mtp]

    @cached_property
    def receivers(self) -> list[set[int]]:
        """Of each pipeline rank, those that it sends to."""
        return [{transfer.target for transfer in self.schedule.sends(r)} for r in range(self.schedule.num_ranks)]

    @property
    def hops(self) -> int:
        """Of an all-to-all."""
        return 0 if self.ep == 1 else 1 if self.nodes == 1 or self.setting.direct else 2


@dataclass(frozen=True)
class Memory:
    """Bytes on every GPU of one pipeline rank, at the fullest moment of a step."""

    rank: int
    parameters: int
    weights: int  # at rest; fp32 ones are their own master weights
    master: int
    gradients: int
    moments: int
    fp8_copies: int  # codes of the weights, and of their transposes, for the micro-batches of a step
    activations: float
    micro_batches: int  # how many (stage, micro-batch) pairs are live at once at most
    messages: float  # between stages: rooms made ahead, and what is leaving
    buckets: int  # of gradients on their way
    rooms: float  # estimate: rows of a forward's and a backward's all-to-all under way
    workspace: float  # estimate: what the largest piece of a backward makes and drops
    cpu: int  # CPU memory for the weights' average, per GPU

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.master + self.gradients + self.moments

    @property
    def total(self) -> float:
        return self.state + self.fp8_copies + self.activations + self.buffers + self.workspace

    @property
    def buffers(self) -> float:
        return self.messages + self.buckets + self.rooms


# Parameters ----------------------------------------------------------------------------------------------------------
def count_weights(job: PlannedJob) -> list[dict[str, Weight]]:
    """Of each pipeline rank, the parameters on one of its GPUs, by their names in the whole model."""
    last = len(job.placed) - 1
    experts = range(job.cfg.n_routed_experts // job.ep)
    stages = []
    for stage, layers in enumerate(job.placed):
        part = Part(layers, embed=stage == 0, head=stage == last, experts=experts)
        stages.append(_weights(Transformer(job.cfg, part=part, device="meta")))
    held = [job.schedule.stages(rank) for rank in range(job.schedule.num_ranks)]
    return [{name: weight for stage in mine for name, weight in stages[stage].items()} for mine in held]


def _weights(model: Transformer) -> dict[str, Weight]:
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    in_fp8 = set(use_fp8(model))
    return {n: Weight(n, p.numel(), id(p) in experts, n in in_fp8) for n, p in model.named_parameters()}


def kinds(held: Sequence[Mapping[str, Weight]], rank: int) -> dict[tuple[tuple[int, ...], bool], int]:
    """A pipeline rank's numbers by (pipeline ranks that hold them, whether they are experts'), as `kinds_of` sorts
    them: what ZeRO-1 shards over."""
    found: Counter[tuple[tuple[int, ...], bool]] = Counter()
    for name, weight in held[rank].items():
        found[tuple(r for r, other in enumerate(held) if name in other), weight.expert] += weight.numbers
    return dict(sorted(found.items()))


def unique(held: Sequence[Mapping[str, Weight]], ep: int) -> int:
    """Weights of the whole model: every name once, experts from all ep ranks."""
    every = {name: weight for mine in held for name, weight in mine.items()}
    return sum(weight.numbers * (ep if weight.expert else 1) for weight in every.values())


# Memory --------------------------------------------------------------------------------------------------------------
def memory(job: PlannedJob, held: Sequence[Mapping[str, Weight]], without: Collection[str] = ()) -> list[Memory]:
    """What every pipeline rank holds. `without`: kinds of activations (`costs_activations`) to leave out."""
    kept = [_kept(job, stage, without) for stage in range(len(job.placed))]
    owed = [
        sum(owed_by_layer(job.cfg, i, job.tokens, job.numbers) for i in job.indices(stage))
        for stage in range(len(job.placed))
    ]
    return [_one_rank(job, held, rank, kept, owed) for rank in range(job.schedule.num_ranks)]


def _one_rank(
    job: PlannedJob, held: Sequence[Mapping[str, Weight]], rank: int, kept: Sequence[float], owed: Sequence[float]
) -> Memory:
    state, cpu, alone = [], 0, True
    for (ranks, expert), n in kinds(held, rank).items():
        dp, edp = job.dp * len(ranks), job.dp // job.ep * len(ranks)
        split = (0, n) if expert else (n, 0)
        shares = (dp, edp) if job.zero else (1, 1)
        alone = alone and (edp if expert else dp) == 1
        state.append(zero1_bytes(*split, *shares, weights=job.numbers.weights, moments=job.moments))
        cpu += ema_bytes(*split, *shares) if job.ema else 0
    bytes_ = TrainingBytes(*(sum(column) for column in zip(*(asdict(one).values() for one in state), strict=True)))
    peak, chunks = peak_activations(job.schedule.actions[rank], kept, owed)
    return Memory(
        rank=rank,
        parameters=sum(weight.numbers for weight in held[rank].values()),
        **asdict(bytes_),
        fp8_copies=2 * job.numbers.fp8 * sum(weight.numbers for weight in held[rank].values() if weight.fp8),
        activations=peak,
        micro_batches=chunks,
        messages=_messages(job, rank),
        buckets=0 if alone else _buckets(held[rank].values()),
        rooms=_rooms(job, rank),
        workspace=_workspace(job, rank),
        cpu=cpu,
    )


def _kept(job: PlannedJob, stage: int, without: Collection[str]) -> float:
    last = len(job.placed) - 1
    found = kept_by_ends(job.cfg, job.tokens, job.numbers, embedding=stage == 0, head=stage == last)
    for index in job.indices(stage):
        found += kept_by_layer(job.cfg, index, job.tokens, job.numbers, job.hops, job.cfg.n_routed_experts // job.ep)
    return sum(size for name, size in found.items() if name not in without)


def peak_activations(
    actions: Sequence[Action | Pair], kept: Sequence[float], owed: Sequence[float]
) -> tuple[float, int]:
    """The most bytes, and the most (stage, micro-batch) pairs, that a rank holds at once as it goes through its list.

    kept[stage] live from the F to the I or B, as `simulate` counts them (a pair holds both of its chunks all the time);
    owed[stage] from an I to its W.
    """
    now = peak = 0.0
    live = most = 0
    for action in actions:
        began = [part.stage for part in action.parts if part.kind == "F"]
        now, live = now + sum(kept[stage] for stage in began), live + len(began)
        peak, most = max(peak, now), max(most, live)
        for part in action.parts:
            if part.kind in "IB":
                now, live = now - kept[part.stage], live - 1
            now += owed[part.stage] * ((part.kind == "I") - (part.kind == "W"))
        peak = max(peak, now)
    return peak, most


def _messages(job: PlannedJob, rank: int) -> float:
    """From each rank that sends, rooms for AHEAD messages and the one in use; one leaving to each that receives."""
    sources = sum(rank in targets for targets in job.receivers)
    return (sources * (AHEAD + 1) + len(job.receivers[rank])) * job.tokens * job.cfg.hidden_size * job.numbers.size


def _buckets(weights: Iterable[Weight]) -> int:
    """Of fp32 gradients: IN_FLIGHT at a time, each beside its sum or what has arrived for it."""
    return 2 * IN_FLIGHT * 4 * min(BUCKET, sum(weight.numbers for weight in weights))


def _rooms(job: PlannedJob, rank: int) -> float:
    """Of the fuller hop: rows sent and received, in either precision; rows unpacked; and the experts' own results."""
    cfg, size = job.cfg, job.numbers.size
    if job.ep == 1 or not any(cfg.is_moe_layer(i) for stage in job.schedule.stages(rank) for i in job.indices(stage)):
        return 0.0
    ib, nvlink = copies_crossed(cfg, job.nodes, True, job.setting)
    copies = max(ib, nvlink) * job.ep / (job.ep - 1)  # with those that stay
    row = cfg.hidden_size * size
    travels = codes(cfg.hidden_size) if job.numbers.fp8 else row
    return job.tokens * (copies * (2 * travels + 3 * row) + cfg.num_experts_per_tok * row)


def _workspace(job: PlannedJob, rank: int) -> float:
    """The largest of: attention's backward (q, k, v again, and all gradients), the experts' (five fp32 numbers for each
    of an expert's hidden ones with FP8, else in the activations' dtype; gradients of their inputs), a chunk of the
    head's logits with the head and its gradient in the activations' dtype."""
    cfg, n, T = job.cfg, job.numbers, job.tokens
    stages, last = job.schedule.stages(rank), len(job.placed) - 1
    heads = cfg.num_attention_heads
    sizes = [2.0 * T * heads * (2 * cfg.qk_head_dim + 2 * cfg.v_head_dim) * n.size]
    moe = any(cfg.is_moe_layer(i) for stage in stages for i in job.indices(stage))
    wide = 4 if n.fp8 else n.size
    if moe:
        slots = T * cfg.num_experts_per_tok
        sizes.append(slots * (5 * cfg.moe_intermediate_size * wide + 2 * cfg.hidden_size * n.size))
    if cfg.first_k_dense_replace and 0 in stages:
        sizes.append(T * (5 * cfg.intermediate_size * wide + 2 * cfg.hidden_size * n.size))
    if last in stages:
        rows = max(256, LOGITS // cfg.vocab_size)
        logits = rows * cfg.vocab_size * (4 + 2 * n.size)
        sizes.append(logits + (1 + n.casts) * cfg.vocab_size * cfg.hidden_size * n.size)
    return max(sizes)


def with_numbers(job: PlannedJob, **changes: object) -> PlannedJob:
    """The same job with other `Numbers`."""
    return replace(job, numbers=replace(job.numbers, **changes))  # type: ignore[arg-type]
