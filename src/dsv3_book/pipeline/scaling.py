"""From 2048 GPUs to ten times that: does communication stay hidden? (claim C18)

The report's sentence has a condition: *at a constant ratio of computation to communication*. `scale_out` keeps it, by
the node limit: however many nodes the experts fill, a token crosses InfiniBand at most four times. Without the limit,
or with links that fall behind (`slower_links`), the ratio is lost, and the rows show what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import ModelConfig
from ..costs import REPORT_GPUS, REPORT_SEQUENCE_LENGTH
from .cluster import GPUS_PER_NODE, PROFILED, Machine, layer_times, nodes_crossed
from .pair import Streams, pair

REPORT_EXPERT_GPUS = 64  # expert parallelism (report §3.2)


@dataclass(frozen=True)
class Scaled:
    """One size of cluster: what one overlapped pair of MoE layers does there."""

    gpus: int
    nodes: int  # that the experts are spread over
    cfg: ModelConfig  # with as many experts as its GPUs hold: `simulate_step(row.cfg, nodes=row.nodes)` is its step
    crossed: float  # copies of a token over InfiniBand
    streams: Streams

    @property
    def ratio(self) -> float:
        """Computation to communication."""
        return self.streams.compute / self.streams.communication

    @property
    def overhead(self) -> float:
        """Share of the pair's time in which nothing is computed: communication that is not hidden."""
        return 1 - self.streams.compute / self.streams.span


def scale_out(
    cfg: ModelConfig,
    gpus: Sequence[int],
    machine: Machine = PROFILED,
    limited: bool = True,
    layers: int = 4,
    tokens: int = REPORT_SEQUENCE_LENGTH,
) -> list[Scaled]:
    """The same model with more experts on more GPUs (claim C18): experts per GPU, experts per token and the node limit
    stay, and the expert-parallel group grows with the cluster as 64 of 2048 do in the report.

    Raises:
        ValueError: a number of GPUs that leaves no whole number of nodes in a group.
    """
    per_gpu = cfg.n_routed_experts // REPORT_EXPERT_GPUS
    share = REPORT_GPUS // REPORT_EXPERT_GPUS
    rows = []
    for count in gpus:
        nodes, rest = divmod(count, share * GPUS_PER_NODE)
        if rest or not nodes:
            raise ValueError(
                f"{count} GPUs: take a multiple of {share * GPUS_PER_NODE}, so that experts fill whole nodes"
            )
        bigger = cfg.replace(
            n_routed_experts=per_gpu * nodes * GPUS_PER_NODE, n_group=nodes, topk_group=min(cfg.topk_group, nodes)
        )
        layer = layer_times(bigger, cfg.first_k_dense_replace, machine, tokens, nodes, limited)
        crossed = nodes_crossed(bigger, nodes, limited)
        rows.append(Scaled(count, nodes, bigger, crossed, pair([layer] * layers, [layer] * layers)))
    return rows


def slower_links(
    cfg: ModelConfig, factors: Sequence[float], machine: Machine = PROFILED, layers: int = 4
) -> list[Streams]:
    """The same pair when the ratio is *not* kept: links slower by each factor (below 1: faster)."""
    rows = []
    for factor in factors:
        slow = replace(machine, ib=machine.ib / factor, nvlink=machine.nvlink / factor, wait=machine.wait * factor)
        layer = layer_times(cfg, cfg.first_k_dense_replace, slow)
        rows.append(pair([layer] * layers, [layer] * layers))
    return rows
