"""Clipping by the global norm (report §4.2: 1.0): one norm over all gradients of the whole model, each counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

# Parameters, and the processes over which they are spread. None: every process holds them all, or there is only one.
Part = tuple[Sequence[nn.Parameter], dist.ProcessGroup | None]


@torch.no_grad()
def global_norm(parts: Iterable[Part], device: torch.device | str = "cpu") -> Float[Tensor, ""]:
    """The Euclidean norm of all gradients together, in fp32.

    A part names parameters and the group of processes among which *different* ones of that kind are spread (pipeline
    stages, experts, ZeRO's shards): their squares are summed over it. What all processes hold alike comes with None,
    and is not sent. A parameter listed twice counts once. All processes of the groups must call it.

    device: where a part without parameters counts as zero (NCCL sends nothing that lies on a CPU).
    """
    total: Tensor | None = None
    seen: set[int] = set()
    for parameters, group in parts:
        own = list({id(p): p for p in parameters if p.grad is not None and id(p) not in seen}.values())
        seen.update(map(id, own))
        square = torch.zeros((), dtype=torch.float32, device=parameters[0].device if len(parameters) else device)
        if own:
            norms = torch._foreach_norm([p.grad for p in own if p.grad is not None], 2, dtype=torch.float32)
            square = torch.linalg.vector_norm(torch.stack(norms)).square()
        if group is not None:
            dist.all_reduce(square, group=group)
        total = square if total is None else total + square
    return torch.zeros(()) if total is None else total.sqrt()


@torch.no_grad()
def clip_by_global_norm(
    parts: Iterable[Part], max_norm: float, device: torch.device | str = "cpu"
) -> Float[Tensor, ""]:
    """Scales all gradients so that their global norm is at most `max_norm`; returns the norm they had before.

    parts, device: as for `global_norm`, which is called.

    Infinite and NaN norms come back as they are, and the gradients are then left alone: it is the caller who stops.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    parts = list(parts)
    norm = global_norm(parts, device)
    if torch.isfinite(norm) and norm > max_norm:
        grads = {id(p): p.grad for parameters, _ in parts for p in parameters if p.grad is not None}
        torch._foreach_mul_(list(grads.values()), float(max_norm / norm))
    return norm
