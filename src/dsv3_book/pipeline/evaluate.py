"""Held-out loss in a pipeline: forwards only, nothing kept for a backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.model import Transformer
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import Transfer, forwards
from dsv3_book.pipeline.transfers import Transfers


@torch.no_grad()
def evaluate(pipeline: Pipeline, micro_batches: Sequence[Int[Tensor, "B width"]]) -> Float[Tensor, " M"]:
    """The main model's loss, nats per token, of each micro-batch; the same on all ranks of the pipeline.

    micro_batches: M of one shape [B, T + 1], the same on all ranks of the pipeline. Where experts are spread over
    ranks, all of these must evaluate equally many.

    Raises:
        ValueError: none, or of different shapes.
        RuntimeError: another rank did not answer; says which message was waited for.
    """
    shapes = {tuple(tokens.shape) for tokens in micro_batches}
    if len(shapes) != 1:
        raise ValueError(f"evaluate takes micro-batches of one shape, got {len(micro_batches)} of {sorted(shapes)}")
    B, width = shapes.pop()
    plan, rank = forwards(pipeline.schedule, len(micro_batches)), pipeline.rank
    stages: dict[int, Transformer] = {int(key): stage for key, stage in pipeline.stages.items()}  # type: ignore[misc]
    device = next(iter(stages.values())).device
    like = torch.empty(B, width - 1, pipeline.cfg.hidden_size, dtype=pipeline.compute_dtype, device=device)
    transfers = Transfers(plan, pipeline.group, pipeline.opposite, like, pipeline.timeout)
    losses = torch.zeros(len(micro_batches), device=device)
    handed: dict[int, Tensor] = {}  # by micro-batch: the output of the stage before, where that is this rank's too
    for action in (part for mine in plan.actions[rank] for part in mine.parts):
        model, m = stages[action.stage], action.microbatch
        if action.stage == 0:
            x = model.embed(micro_batches[m][:, :-1])
        else:
            source, _ = plan.where("F", action.stage - 1, m)
            came = Transfer("F", action.stage - 1, m, source, rank)
            x = handed.pop(m) if source == rank else transfers.receive(came)
        x, _ = model.run_blocks(x)
        if action.stage == plan.num_stages - 1:
            losses[m] = model.token_loss(model.norm(x), micro_batches[m][:, 1:])
        elif going := plan.transfer(action, rank):
            transfers.send(going, x)
        else:
            handed[m] = x
    transfers.finish()
    if plan.num_ranks > 1:
        dist.all_reduce(losses, group=pipeline.group)
    return losses
