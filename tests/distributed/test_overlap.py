"""In a pair, what travels is begun before and awaited after a computation of the other chunk: the order shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from pipelinekit import batches, config

from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.transport import DelayedTransport
from dsv3_book.pipeline.executor import Pipeline, Watch
from dsv3_book.pipeline.schedule import make_schedule

pytestmark = pytest.mark.distributed

# Which part of the other chunk hides a message of this journey.
HIDDEN_BY = {
    "combine B": ("F", "attention"),
    "dispatch F": ("B", "mlp"),
    "dispatch B": ("F", "mlp"),
    "combine F": ("B", "attention"),
}


def watched() -> tuple[list[Any], list[Any]]:
    """(parts done, messages) of a step whose chunks have three MoE layers each, in DualPipeV's pairs on one rank."""
    cfg, ranks = config(6, 0, first_k_dense_replace=0), dist.get_world_size()
    transport = DelayedTransport(delay=0.002)
    each = cfg.n_routed_experts // ranks
    held = range(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    dispatch = AllToAll(None, cfg.n_routed_experts, transport=transport)
    pipeline = Pipeline(cfg, make_schedule("dualpipev", 1, 6), seed=5, dispatch=dispatch, experts=held)
    watch = Watch()
    pipeline.step(batches(cfg, 6), watch=watch)
    return watch.events, transport.events


def test_every_journey_of_a_pair_has_a_computation_of_the_other_chunk_under_it(pool) -> None:
    for parts, messages in pool(2).run(watched):
        paired = [part for part in parts if part.paired]
        seen = dict.fromkeys(HIDDEN_BY, 0)
        for message in messages:
            inside = any(part.start <= message.issued <= part.end for part in paired)
            if not inside or message.label.part == "counts":
                continue
            under = [p for p in parts if message.issued <= p.start and p.end <= message.wait_began]
            assert HIDDEN_BY[message.label.journey] in {(p.kind, p.part) for p in under}, message
            seen[message.label.journey] += 1
        pairs = len({(p.stage, p.microbatch) for p in paired if p.kind == "B"})
        assert pairs == 9  # of 12 backward chunks
        assert seen == {
            "combine B": 3 * pairs,
            "dispatch F": 6 * pairs,
            "dispatch B": 6 * pairs,
            "combine F": 3 * pairs,
        }


def test_alone_a_chunk_hides_nothing_of_its_combine(pool) -> None:
    for parts, messages in pool(2).run(watched):
        alone = [p for p in parts if not p.paired and p.part == "combine" and p.kind == "F"]
        found = [m for m in messages if any(p.start <= m.issued <= p.end for p in alone)]
        assert len(found) == len(alone) == 9
        for message in found:
            computed = [p for p in parts if message.issued <= p.start and p.end <= message.wait_began]
            assert not computed
