"""What a step can't be made of, and what the ranks of a pipeline must have in common: asked before anything is done."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.pipeline.schedule import Schedule


class PipelineError(RuntimeError):
    """A step that could not be finished; says on which rank, at which action and micro-batch, and why."""


def agree(
    cfg: ModelConfig,
    schedule: Schedule,
    group: dist.ProcessGroup | None,
    micro_batches: Sequence[Tensor],
    of: int | None,
    terms: dict[str, Any],
) -> None:
    """Refuses, on all ranks and before anything is computed, what would end in a hang or in nonsense.

    terms: what else must be the same on all ranks.

    Raises:
        ValueError: micro-batches, or `of`, that no step can be made of.
        PipelineError: another rank has such, or the ranks have different ones, or one did not answer.
    """
    wrong = unfit(cfg, schedule.num_microbatches, micro_batches, of)
    others = ""
    if schedule.num_ranks > 1:
        if not wrong:
            tokens = torch.stack(list(micro_batches))
            terms = terms | {
                "micro-batch shape": list(tokens.shape[1:]),
                "checksum of tokens": checksum(tokens),
                "of": of,
            }
        try:
            others = disagreement(wrong, terms, group)
        except RuntimeError as error:
            others = f"a rank did not answer: {error}"
    if wrong:
        raise ValueError(wrong)
    if others:
        raise PipelineError(f"rank {dist.get_rank(group)}, before its first action: {others}")


def unfit(cfg: ModelConfig, count: int, micro_batches: Sequence[Tensor], of: int | None) -> str:
    """What is wrong with these micro-batches for a schedule of `count`, and the remedy; "" if nothing is."""
    if of is not None and of < 1:
        return f"of = {of}: give the number of micro-batches of all pipelines together, or None for this one's"
    shapes = {tuple(t.shape) for t in micro_batches}
    if len(micro_batches) != count or len(shapes) != 1:
        return (
            f"the schedule wants {count} micro-batches of one shape, got {len(micro_batches)} of the shapes "
            f"{sorted(shapes)}"
        )
    shape, least = shapes.pop(), 2 + cfg.num_nextn_predict_layers
    if len(shape) != 2 or shape[0] < 1 or shape[1] < least:
        return (
            f"micro-batches are of shape {shape}, but must be [B, width] with B at least 1 and a width of at least "
            f"{least}: an input, its target and one token more for each MTP depth"
        )
    tokens = torch.stack(list(micro_batches))
    if tokens.dtype not in (torch.int64, torch.int32):
        return f"micro-batches are {tokens.dtype}, but tokens are int64"
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= cfg.vocab_size:
        return f"a token is {low if low < 0 else high}, but the model's vocabulary goes from 0 to {cfg.vocab_size - 1}"
    return ""


def disagreement(wrong: str, terms: dict[str, Any], group: dist.ProcessGroup | None) -> str:
    """What keeps the ranks from beginning together, the same on all of them; "" if nothing does.

    wrong: why this rank can't begin, or "".
    """
    heard: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(heard, (wrong, terms), group=group)
    if refused := {rank: theirs for rank, (theirs, _) in enumerate(heard) if theirs}:
        return "; ".join(f"rank {rank} can't begin: {why}" for rank, why in refused.items())
    told = {name: [theirs[name] for _, theirs in heard] for name in terms}
    differ = [f"{name} ({', '.join(map(str, each))})" for name, each in told.items() if each != each[:1] * len(each)]
    return f"the ranks disagree about {' and '.join(differ)}" if differ else ""


def checksum(of: Any) -> int:
    """Equal for what is equal: a tensor's content, or what anything else is written as."""
    return zlib.crc32(of.cpu().numpy().tobytes() if isinstance(of, Tensor) else repr(of).encode())
