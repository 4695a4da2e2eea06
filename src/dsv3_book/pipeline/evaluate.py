"""Forwards alone, in a pipeline: nothing is kept for a backward. Held-out loss is computed so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.model import Transformer
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import Transfer, forwards
from dsv3_book.pipeline.transfers import Transfers

# What a stage does for a micro-batch: (its number, its piece of the model, which micro-batch, what the stage before
# gave) → what goes to the next stage. None comes to the first stage; what the last one gives is dropped.
Work = Callable[[int, Transformer, int, Tensor | None], Tensor]


@torch.no_grad()
def run_forwards(pipeline: Pipeline, count: int, B: int, T: int, work: Work) -> None:
    """Does `work` for `count` micro-batches [B, T] at every stage, each where the pipeline's schedule has it.

    Where experts are spread over ranks, all of these must do equally many.

    Raises:
        RuntimeError: another rank did not answer; says which message was waited for.
    """
    plan, rank = forwards(pipeline.schedule, count), pipeline.rank
    stages: dict[int, Transformer] = {int(key): stage for key, stage in pipeline.stages.items()}  # type: ignore[misc]
    device = next(iter(stages.values())).device
    like = torch.empty(B, T, pipeline.cfg.hidden_size, dtype=pipeline.compute_dtype, device=device)
    transfers = Transfers(plan, pipeline.group, pipeline.opposite, like, pipeline.timeout)
    handed: dict[int, Tensor] = {}  # by micro-batch: the output of the stage before, where that is this rank's too
    for action in (part for mine in plan.actions[rank] for part in mine.parts):
        stage, m = action.stage, action.microbatch
        x = None
        if stage > 0:
            source, _ = plan.where("F", stage - 1, m)
            x = handed.pop(m) if source == rank else transfers.receive(Transfer("F", stage - 1, m, source, rank))
        y = work(stage, stages[stage], m, x)
        if going := plan.transfer(action, rank):
            transfers.send(going, y)
        elif stage < plan.num_stages - 1:
            handed[m] = y
    transfers.finish()


def evaluate(pipeline: Pipeline, micro_batches: Sequence[Int[Tensor, "B width"]]) -> Float[Tensor, " M"]:
    """The main model's loss, nats per token, of each micro-batch; the same on all ranks of the pipeline.

    micro_batches: M of one shape [B, T + 1], the same on all ranks of the pipeline.

    Raises:
        ValueError: none, or of different shapes.
        RuntimeError: see `run_forwards`.
    """
    shapes = {tuple(tokens.shape) for tokens in micro_batches}
    if len(shapes) != 1:
        raise ValueError(f"evaluate takes micro-batches of one shape, got {len(micro_batches)} of {sorted(shapes)}")
    B, width = shapes.pop()
    losses = torch.zeros(len(micro_batches), device=micro_batches[0].device)

    def work(stage: int, model: Transformer, m: int, x: Tensor | None) -> Tensor:
        x, _ = model.run_blocks(model.embed(micro_batches[m][:, :-1]) if x is None else x)
        if stage == pipeline.schedule.num_stages - 1:
            losses[m] = model.token_loss(model.norm(x), micro_batches[m][:, 1:])
        return x

    run_forwards(pipeline, len(micro_batches), B, width - 1, work)
    if pipeline.schedule.num_ranks > 1:
        dist.all_reduce(losses, group=pipeline.group)
    return losses
