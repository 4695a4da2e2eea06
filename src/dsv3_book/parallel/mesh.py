"""Who stands where: ranks, nodes and groups."""

from __future__ import annotations

import os

import torch.distributed as dist


def node_size(ranks_per_node: int | None = None) -> int:
    """Ranks per node: as given, else as the launcher says (LOCAL_WORLD_SIZE), else all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    size = ranks_per_node if ranks_per_node is not None else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if size < 1:
        raise ValueError(f"{size} ranks per node: give at least 1")
    return size


def link(here: int, there: int, ranks_per_node: int) -> str:
    """How one rank reaches another: "self", "nvlink" (same node) or "ib"."""
    if here == there:
        return "self"
    return "nvlink" if here // ranks_per_node == there // ranks_per_node else "ib"
