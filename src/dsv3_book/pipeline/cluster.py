"""DeepSeek-V3's sizes and the H800's rates, made into durations: of a layer's parts, of a chunk, of a whole step.

Work and bytes are counted by `costs.py`. What turns them into time is a `Machine`: rates that are *assumed*, and that
every result here hangs on. Three are given, from the limit of the hardware to what the released profile shows.

One micro-batch is one sequence of 4096 tokens on each GPU (report §4.2, released profile). Left out: the optimiser, the
sums over data-parallel ranks, reading data and saving; the embedding's look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import comb

from ..config import ModelConfig
from ..costs import (
    PEAK_FLOPS,
    REPORT_GPUS,
    REPORT_SEQUENCE_LENGTH,
    attention_params,
    causal_context,
    combine_bytes,
    dispatch_bytes,
    head_flops,
    layer_flops,
)
from .pair import Layer, alone, is_communication, pair
from .place import place_layers
from .schedule import make_schedule
from .simulate import Costs, Timeline, simulate

REPORT_BATCH = 15360  # sequences in a step, after the first 469B tokens (report §4.2)
REPORT_RANKS = 16  # pipeline ranks (report §3.2)
GPUS_PER_NODE = 8
COMPUTING_SMS = 112 / 132  # the other 20 run the all-to-alls (report §3.2.2, released profile)
UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")  # recomputed in the backward (report §3.2.3)
CORE_BACKWARD = 2.5  # the attention kernel's backward has five products where its forward has two


@dataclass(frozen=True)
class Machine:
    """One GPU's rates while both of its streams run, FLOP/s and bytes/s."""

    name: str
    gemm: float  # FP8 products of the forward and of input gradients; BF16 ones run at half
    gemm_weight: float  # ... of weight gradients, which accumulate in FP32
    core: float  # attention scores and weighted values, BF16
    core_backward: float
    other: float  # share of the time of F and I in kernels that are no products: norms, casts, permutations
    ib: float  # InfiniBand per GPU, one direction
    nvlink: float
    wait: float = 0.0  # seconds each all-to-all waits for its peers before anything moves


# Everything at its peak: nothing can be faster than this.
PEAK = Machine(
    "hardware peak",
    gemm=PEAK_FLOPS["fp8"] * COMPUTING_SMS,
    gemm_weight=PEAK_FLOPS["fp8"] * COMPUTING_SMS,
    core=PEAK_FLOPS["bf16"] * COMPUTING_SMS,
    core_backward=PEAK_FLOPS["bf16"] * COMPUTING_SMS,
    other=0.0,
    ib=50e9,  # report §3.2.2
    nvlink=160e9,
)
# What the released profile's kernels reached, rounded: FLOPs counted here over their busy time on 112 SMs; bytes over
# the time of the transfer kernels. Its "other" kernels and waits are there too. It is fitted to the profile's totals,
# so agreement in total says little; how the time is split over the parts is still a prediction.
PROFILED = Machine(
    "released profile",
    gemm=950e12,
    gemm_weight=650e12,
    core=550e12,
    core_backward=450e12,
    other=0.34,
    ib=31e9,
    nvlink=160e9,
    wait=2.06e-3,
)
# In between: products as fast as DeepGEMM runs V3's shapes alone on an H800 (about 1280 TFLOP/s on 132 SMs), links at
# the report's rate, which DeepEP reaches; no waits. Attention and the rest as in the profile.
ALONE = replace(
    PROFILED, name="released kernels, each alone", gemm=1280e12 * COMPUTING_SMS, gemm_weight=1280e12 * COMPUTING_SMS,
    ib=50e9, wait=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How layers are run, where that isn't the report's way."""

    sequences: int = 1  # in a micro-batch
    per_node: int = GPUS_PER_NODE  # GPUs on each of the nodes that the experts are spread over
    direct: bool = False  # each copy of a token goes straight to its GPU, not by way of a node's one
    fp8: bool = True  # False: all products in BF16, and dispatches too
    recompute: bool = True


REPORT_SETTING = Setting()


# One layer -----------------------------------------------------------------------------------------------------------
def nodes_crossed(cfg: ModelConfig, nodes: int, limited: bool = True) -> float:
    """Copies of a token that cross InfiniBand on average: other nodes that hold one of its experts.

    With node-limited routing `topk_group` nodes at most, one of which is its own as often as chance has it; without,
    the nodes that `num_experts_per_tok` experts drawn at random fall on.
    """
    if nodes == 1:
        return 0.0
    if limited and cfg.topk_group < nodes:
        reached = float(cfg.topk_group)
    else:
        experts, k = cfg.n_routed_experts, cfg.num_experts_per_tok
        reached = nodes * (1 - comb(experts - experts // nodes, k) / comb(experts, k))
    return reached * (1 - 1 / nodes)


def gpus_crossed(cfg: ModelConfig, nodes: int, limited: bool = True, per_node: int = GPUS_PER_NODE) -> float:
    """Copies of a token that NVLink carries on average: inside each node reached, every other GPU with its experts."""
    reached = nodes_crossed(cfg, nodes, limited) / (1 - 1 / nodes) if nodes > 1 else 1.0
    here, k = cfg.n_routed_experts // nodes, round(cfg.num_experts_per_tok / reached)
    return reached * (per_node - 1) * (1 - comb(here - here // per_node, k) / comb(here, k))


def copies_crossed(
    cfg: ModelConfig, nodes: int, limited: bool = True, setting: Setting = REPORT_SETTING
) -> tuple[float, float]:
    """Copies of a token over InfiniBand and over NVLink: in two hops, or each straight to its GPU."""
    ib, nvlink = nodes_crossed(cfg, nodes, limited), gpus_crossed(cfg, nodes, limited, setting.per_node)
    if not setting.direct or nodes == 1:
        return ib, nvlink
    width = setting.per_node
    reached = nvlink * width / (width - 1) if width > 1 else ib / (1 - 1 / nodes)  # GPUs, one's own among them
    return reached * (1 - 1 / nodes), nvlink / nodes


def all_to_all_ms(
    cfg: ModelConfig,
    machine: Machine,
    kind: str,
    tokens: int,
    nodes: int,
    limited: bool = True,
    setting: Setting = REPORT_SETTING,
) -> float:
    """One all-to-all. `kind` "fp8": dispatch(F) and combine(B), one vector a copy; "bf16": combine(F) and dispatch(B).

    InfiniBand and NVLink work at once (report §3.2.2), so the slower one counts.
    """
    bytes_of = (lambda n: dispatch_bytes(cfg, n)) if kind == "fp8" else (lambda n: combine_bytes(cfg, n))
    ib, nvlink = copies_crossed(cfg, nodes, limited, setting)
    seconds = max(bytes_of(ib) / machine.ib, bytes_of(nvlink) / machine.nvlink)
    return 1e3 * (tokens * seconds + machine.wait)


def layer_times(
    cfg: ModelConfig,
    index: int,
    machine: Machine,
    tokens: int = REPORT_SEQUENCE_LENGTH,
    nodes: int = 8,
    limited: bool = True,
    setting: Setting = REPORT_SETTING,
) -> Layer:
    """Milliseconds of the parts of layer `index` for one micro-batch, of one sequence of `tokens`, on a GPU.

    As in the released profile, router and recomputation are in "attention", shared experts in "mlp". A dense layer has
    no dispatch and no combine, nor has any where one GPU holds all experts. `nodes`: how many the experts are spread
    over; `limited`: routing is node-limited.
    """
    number = tokens * setting.sequences
    flops = {part: number * n for part, n in layer_flops(cfg, index, causal_context(tokens)).items()}
    params = attention_params(cfg)
    again = 2.0 * number * setting.recompute * sum(params.get(name, 0) for name in UP_PROJECTIONS)
    gemm, gemm_weight = ((1 if setting.fp8 else 0.5) * rate for rate in (machine.gemm, machine.gemm_weight))
    core = flops.pop("attention_core")
    attention = flops.pop("attention_proj") + flops.pop("router", 0.0)
    mlp = sum(flops.values())
    busy = 1e3 / (1 - machine.other)
    times = {
        "attention(F)": busy * (attention / gemm + core / machine.core),
        "attention(B)": busy * ((attention + again) / gemm + CORE_BACKWARD * core / machine.core_backward),
        "attention(W)": 1e3 * attention / gemm_weight,
        "mlp(F)": busy * mlp / gemm,
        "mlp(B)": busy * mlp / gemm,
        "mlp(W)": 1e3 * mlp / gemm_weight,
    }
    if cfg.is_moe_layer(index) and nodes * setting.per_node > 1:
        kinds = ("fp8" if setting.fp8 else "bf16", "bf16")
        quick, slow = (all_to_all_ms(cfg, machine, kind, number, nodes, limited, setting) for kind in kinds)
        times |= {"dispatch(F)": quick, "combine(B)": quick, "combine(F)": slow, "dispatch(B)": slow}
    return times


def balance_of(layer: Layer) -> tuple[float, float]:
    """(computation, communication) of one layer's forward and backward, ms: their ratio is claim C15."""
    compute = sum(time for name, time in layer.items() if not is_communication(name))
    return compute, sum(layer.values()) - compute


# Stages, chunks ------------------------------------------------------------------------------------------------------
def _product(flops: float, machine: Machine) -> Layer:
    """A matrix on its own, in BF16, as a layer: output head, MTP's eh_proj."""
    gemm, weight = 2e3 * flops / machine.gemm, 2e3 * flops / machine.gemm_weight
    return {"mlp(F)": gemm, "mlp(B)": gemm, "mlp(W)": weight}


def stage_layers(
    cfg: ModelConfig,
    num_stages: int,
    machine: Machine,
    tokens: int = REPORT_SEQUENCE_LENGTH,
    nodes: int = 8,
    setting: Setting = REPORT_SETTING,
) -> list[list[Layer]]:
    """Every stage's layers in forward order, placed by `place_layers` as the executor's are. The last one ends with the
    output head, and with the MTP modules: each its eh_proj, its block, and the head once more."""
    layers = [
        layer_times(cfg, index, machine, tokens, nodes, setting=setting)
        for index in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
    ]
    stages = [layers[indices.start : indices.stop] for indices in place_layers(cfg, num_stages)]
    number = tokens * setting.sequences
    head = _product(number * head_flops(cfg), machine)
    stages[-1].append(head)
    for block in layers[cfg.num_hidden_layers :]:
        stages[-1] += [_product(number * 4.0 * cfg.hidden_size**2, machine), block, head]
    return stages


def stage_costs(stages: Sequence[Sequence[Layer]], hop: float = 0.0, overlap: bool = True) -> Costs:
    """Costs of chunks from the layers of every stage: F, I and W alone wait for each of their transfers; a pair is
    played on two streams (`overlap=False`: a pair gains nothing)."""
    layers = [tuple(stage) for stage in stages]

    @cache
    def one(kind: str, stage: int) -> float:
        return alone(kind, layers[stage] if kind == "F" else layers[stage][::-1]).span

    @cache
    def both(ahead: int, back: int) -> float:
        return pair(layers[ahead], layers[back][::-1]).span

    return Costs(
        forward=lambda stage: one("F", stage),
        input_grad=lambda stage: one("I", stage),
        weight_grad=lambda stage: one("W", stage),
        overlapped=both if overlap else None,
        hop=hop,
    )


def hop_ms(cfg: ModelConfig, machine: Machine, tokens: int = REPORT_SEQUENCE_LENGTH) -> float:
    """One micro-batch's hidden states, BF16, to the next stage over InfiniBand."""
    return 1e3 * tokens * cfg.hidden_size * 2 / machine.ib


# A step --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One simulated training step of a pipeline; times in ms."""

    schedule: str
    timeline: Timeline
    microbatches: int
    tokens: int  # in one micro-batch

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return 1e3 * self.microbatches * self.tokens / (self.timeline.makespan * self.timeline.num_ranks)

    @property
    def idle_share(self) -> float:
        """Share of the step in which the average rank has nothing to do."""
        return sum(self.timeline.bubble) / (self.timeline.makespan * self.timeline.num_ranks)


def simulate_step(
    cfg: ModelConfig,
    schedule: str = "dualpipe",
    machine: Machine = PROFILED,
    ranks: int = REPORT_RANKS,
    microbatches: int = REPORT_BATCH * REPORT_RANKS // REPORT_GPUS,
    tokens: int = REPORT_SEQUENCE_LENGTH,
    nodes: int = 8,
    overlap: bool = True,
    setting: Setting = REPORT_SETTING,
) -> Step:
    """A whole step of one pipeline. By default the report's: 16 ranks, 15360 sequences over 2048 / 16 pipelines."""
    plan = make_schedule(schedule, ranks, microbatches)
    stages = stage_layers(cfg, plan.num_stages, machine, tokens, nodes, setting)
    costs = stage_costs(stages, hop_ms(cfg, machine, tokens * setting.sequences), overlap)
    return Step(schedule, simulate(plan, costs), microbatches, tokens * setting.sequences)
