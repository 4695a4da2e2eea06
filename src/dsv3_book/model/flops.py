"""FLOPs that a piece of training really executes: torch's counter, taught the products it overlooks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


class Executed(NamedTuple):
    """FLOPs by kind of matrix product."""

    weights: int  # an activation or its gradient with a weight, or two of them for a weight's gradient
    attention: int  # batched products over the heads: scores, weighted values and their gradients


def executed_flops(work: Callable[[], Any]) -> Executed:
    """Runs `work` (forward, or forward and backward; not `decode`) and counts every matrix product in it.

    `costs.training_flops` says what training needs; this says what was done. They differ where a fast path computes
    more than it needs (masked scores) or the same thing twice (recomputation).
    """
    with FlopCounterMode(display=False, custom_mapping=_overlooked()) as counter:
        work()
    kinds = counter.get_flop_counts().get("Global", {}).items()
    attention = sum(flops for op, flops in kinds if "bmm" in str(op))
    return Executed(sum(flops for _, flops in kinds) - attention, attention)


def _overlooked() -> dict[Any, Any]:
    """Products that torch's `FlopCounterMode` has no formula for (torch 2.13), with theirs."""
    aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
    found: dict[Any, Any] = {aten.addmm_: _added, aten.baddbmm_: _added}
    if hasattr(mkldnn, "_linear_pointwise"):  # not in every build of torch
        found[mkldnn._linear_pointwise] = _linear
    return found


def _added(total: Shape, a: Shape, b: Shape, **_: Any) -> int:
    """total += a @ b, from the shapes."""
    return 2 * prod(a) * b[-1]


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """x @ weightᵀ, from the shapes."""
    return 2 * prod(x) * weight[0]
