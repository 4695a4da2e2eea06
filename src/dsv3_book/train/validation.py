"""Held-out loss, with the windows shared out among the pipelines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TypeVar

import torch

from dsv3_book.data import EvalBatch
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.mesh import Mesh
from dsv3_book.pipeline.evaluate import evaluate
from dsv3_book.pipeline.executor import Pipeline

AT_ONCE = 32  # micro-batches for a pipeline at a time: many against its bubble, few enough to be kept
T = TypeVar("T")


def held_out_loss(
    pipeline: Pipeline, mesh: Mesh, batches: Iterable[EvalBatch], parallel: DataParallel
) -> tuple[float, float, int]:
    """(nats per token, bits per byte, tokens) of the main model over all batches; the same on every process.

    Every pipeline takes as many micro-batches of a shape as the others, for experts may be spread over them; where that
    doesn't come out even, some are computed once more and not counted.
    """
    dp, place = mesh.layout.dp, mesh.index("dp")
    sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)  # nats, tokens, bytes
    for _, alike in groupby(batches, key=lambda batch: batch.tokens.shape):
        for turn in chunks(alike, AT_ONCE * dp):
            each = -(-len(turn) // dp)
            mine = turn[place * each : (place + 1) * each]
            filled = mine + turn[: each - len(mine)]
            losses = evaluate(pipeline, [batch.tokens.to(parallel.device) for batch in filled]).double()
            for loss, batch in zip(losses, mine, strict=False):
                sums += torch.stack([loss * batch.predicted, *loss.new_tensor([batch.predicted, batch.bytes])])
    nats, tokens, size = (parallel.sum(sums) / mesh.layout.pp).tolist()  # every rank of a pipeline brings them
    return nats / tokens, nats / math.log(2) / size, round(tokens)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
