"""Where a number that is not finite came from: the first output of all layers, the micro-batch, the gradients.

Nothing of this costs anything before it is needed: then the step's micro-batches run forward once more, all modules
watched; and if all outputs are finite, some steps are done again to find the micro-batch whose gradient is not. All
processes take part, each with its own stages, experts and shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_book.model import Transformer
from dsv3_book.model.balance import sequence_balance_loss
from dsv3_book.model.block import Block
from dsv3_book.model.experts import MoE
from dsv3_book.model.router import Routing
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.mesh import Mesh
from dsv3_book.pipeline.evaluate import run_forwards
from dsv3_book.pipeline.executor import Pipeline


@dataclass(frozen=True, order=True)
class Bad:
    """Which output was the first that is not finite, of one micro-batch: in forward order, the smallest."""

    stage: int
    order: int
    module: str


@dataclass
class Findings:
    """Of all processes: by micro-batch of the step its losses (main, MTP, balance) and its first bad output; and by
    parameter how many numbers of its gradient are not finite."""

    losses: list[list[float]]
    outputs: dict[int, Bad]
    gradients: dict[str, int]

    def first(self) -> tuple[int, Bad] | None:
        """The micro-batch and place where it began: in forward order, then by micro-batch."""
        return min(self.outputs.items(), key=lambda item: (item[1].stage, item[1].order, item[0]), default=None)

    def layers(self, count: int) -> dict[str, dict[str, int]]:
        """Parameters with a bad gradient by layer, in backward order.  count: of the main model's layers."""
        found: dict[str, dict[str, int]] = {}
        for name in sorted(self.gradients, key=lambda name: (-depth(name, count), name)):
            found.setdefault(layer_of(name), {})[name] = self.gradients[name]
        return found


def find(
    pipeline: Pipeline,
    optimizer: ZeRO1,
    mesh: Mesh,
    parallel: DataParallel,
    micro_batches: Sequence[Int[Tensor, "B width"]],
) -> Findings:
    """What is not finite, the same on all processes; all must call it, between `optimizer.reduce()` and `step()`.

    micro_batches: this pipeline's.  If it is only in the gradients, `optimizer` loses them.
    """
    losses, outputs = run_forward(pipeline, micro_batches)
    begin = mesh.index("dp") * len(micro_batches)
    mine = Findings(losses, {begin + m: bad for m, bad in outputs.items()}, bad_gradients(optimizer))
    heard: list[Any] = [(begin, mine)]
    if parallel.size > 1:
        heard = [None] * parallel.size
        dist.all_gather_object(heard, (begin, mine), group=parallel.group)
    together = Findings([[0.0] * 3 for _ in range(len(micro_batches) * mesh.layout.dp)], {}, {})
    for start, theirs in heard:
        for m, values in enumerate(theirs.losses):  # a loss arises on one rank of its pipeline, the others have 0
            together.losses[start + m] = [a + b for a, b in zip(together.losses[start + m], values, strict=True)]
        for m, bad in theirs.outputs.items():
            together.outputs[m] = min(bad, together.outputs.get(m, bad))
        for name, count in theirs.gradients.items():
            together.gradients[name] = together.gradients.get(name, 0) + count
    return together


# Forward once more ---------------------------------------------------------------------------------------------------
def run_forward(
    pipeline: Pipeline, micro_batches: Sequence[Int[Tensor, "B width"]]
) -> tuple[list[list[float]], dict[int, Bad]]:
    """Losses of every micro-batch as far as they arise here, and the first bad output here of those that have one."""
    B, width = micro_batches[0].shape
    T = width - 1 - pipeline.cfg.num_nextn_predict_layers
    losses = torch.zeros(len(micro_batches), 3, dtype=torch.float64, device=micro_batches[0].device)
    outputs: dict[int, Bad] = {}

    def work(stage: int, model: Transformer, m: int, x: Tensor | None) -> Tensor:
        watch = Watched(stage)
        y, found = stage_forward(model, x, micro_batches[m], T, watch)
        losses[m] += found
        if watch.bad is not None and (m not in outputs or watch.bad < outputs[m]):
            outputs[m] = watch.bad
        return y

    run_forwards(pipeline, len(micro_batches), B, T, work)
    return losses.tolist(), outputs


def stage_forward(
    model: Transformer, x: Tensor | None, tokens: Tensor, T: int, watch: Watched
) -> tuple[Tensor, Float[Tensor, " 3"]]:
    """A stage's forward, part by part: what goes to the next one, and the losses that arise here."""
    cfg, B, at = model.cfg, len(tokens), model.angles(T)
    routings: list[Routing] = []
    if x is None:
        x = watch.run("embed_tokens", model.embed_tokens, lambda: model.embed(tokens[:, :T]))
    for number, block in zip(model.part.layers, model.blocks(), strict=True):
        x, routing = watch.run(f"layers.{number}", block, functools.partial(block, x, at, model.dispatch))
        routings += [routing] if routing is not None else []
    losses: list[Tensor] = []
    if model.part.head:
        hidden = watch.run("norm", model.norm, lambda: model.norm(x))
        for j in range(cfg.num_nextn_predict_layers + 1):
            if j:
                module, ahead = model.mtp_modules()[j - 1], model.embed(tokens[:, j : T + j])
                predict = functools.partial(module.predict, hidden, ahead, at, model.dispatch)
                hidden, routing = watch.run(f"layers.{cfg.num_hidden_layers + j - 1}", module, predict)
                routings += [routing] if routing is not None else []
            targets = tokens[:, j + 1 : T + j + 1]
            losses.append(watch.run("lm_head", model.lm_head, functools.partial(model.token_loss, hidden, targets)))
    zero = torch.zeros((), device=x.device)
    balance = [
        sequence_balance_loss(r.scores.view(B, T, -1), cfg.num_experts_per_tok, cfg.aux_loss_alpha) for r in routings
    ]
    means = [losses[0] if losses else zero, torch.stack(losses[1:]).mean() if losses[1:] else zero]
    return x, torch.stack([*means, torch.stack(balance).sum() if balance else zero]).double()


class Watched:
    """One micro-batch's way through a stage. bad: the first part whose output is not finite, and inside of it the first
    module."""

    def __init__(self, stage: int) -> None:
        self.stage, self.order = stage, 0
        self.bad: Bad | None = None

    def run(self, name: str, module: nn.Module, work: Callable[[], Any]) -> Any:
        """What `work` returns, which computes the part called `name`."""
        self.order += 1
        if self.bad is not None:
            return work()
        seen: list[str] = []
        inside = [(inner, m) for inner, m in module.named_modules() if inner]
        hooks = [m.register_forward_hook(_remember(f"{name}.{inner}", seen)) for inner, m in inside]
        try:
            result = work()
        finally:
            for hook in hooks:
                hook.remove()
        if not finite(result):
            # None of its modules here? Then it came from experts on another rank. (Other ranks' tokens, of which the
            # experts here may make something bad, belong to other micro-batches.)
            elsewhere = f"{name}.mlp.experts" if isinstance(module, Block) and isinstance(module.mlp, MoE) else name
            self.bad = Bad(self.stage, self.order, seen[0] if seen else elsewhere)
        return result


def _remember(name: str, seen: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not seen and not finite(output):
            seen.append(name)

    return hook


def finite(value: Any) -> bool:
    """Whether all numbers in a tensor, or in a tuple of tensors, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return all(map(finite, value)) if isinstance(value, tuple | list) else True


# Gradients -----------------------------------------------------------------------------------------------------------
def bad_gradients(optimizer: ZeRO1) -> dict[str, int]:
    """How many numbers of the summed gradients in this rank's shards are not finite, by parameter."""
    counts: dict[str, int] = {}
    for shard in optimizer.shards.pieces():
        grad = shard.weight.grad
        if grad is not None and (count := int((~torch.isfinite(grad)).sum())):
            counts[shard.name] = counts.get(shard.name, 0) + count
    return counts


def search(
    pipeline: Pipeline,
    optimizer: ZeRO1,
    mesh: Mesh,
    parallel: DataParallel,
    micro_batches: Sequence[Int[Tensor, "B width"]],
    mtp_weight: float,
) -> list[int]:
    """The micro-batch of each pipeline, by its number in the step, whose gradient alone is not finite.

    The step is done again with half of the micro-batches in the place of all, then with half of those: log₂ M steps.
    All processes must call it. Gradients are lost.
    """
    M, world = len(micro_batches), parallel.size
    candidates = list(range(M))
    # An expert's gradient is of all pipelines' tokens that came to it: it accuses none of them.
    own = [p for name, p in pipeline.named_parameters() if mesh.layout.ep == 1 or ".mlp.experts." not in name]

    def bad(chosen: list[int]) -> bool:
        optimizer.zero_grad()
        again = [micro_batches[chosen[m % len(chosen)]] for m in range(M)]
        pipeline.step(again, mtp_weight, of=M * mesh.layout.dp, sum_copies=False)
        flags = torch.zeros(world, device=parallel.device)
        flags[parallel.rank] = not all(p.grad is None or finite(p.grad) for p in own)
        flags = parallel.sum(flags)
        return bool(flags[mesh.layout.ranks("pp", parallel.rank)].any())

    for _ in range((M - 1).bit_length()):  # equally often in all pipelines, for experts are spread over them
        half = candidates[: len(candidates) // 2] or candidates
        candidates = half if bad(half) else candidates[len(half) :] or candidates
    found = [candidates[0] + mesh.index("dp") * M] if bad(candidates) else []
    optimizer.zero_grad()
    heard: list[Any] = [found]
    if world > 1:
        heard = [None] * world
        dist.all_gather_object(heard, found, group=parallel.group)
    return sorted({number for theirs in heard for number in theirs})


def layer_of(name: str) -> str:
    """ "layers.3.mlp.gate.weight" → "layers.3"; what belongs to no layer, without ".weight"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def depth(name: str, layers: int) -> float:
    """How far from the tokens a parameter is: the embedding −1, layers by their number, the head before MTP's.

    layers: of the main model.
    """
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return -1 if parts[0] == "embed_tokens" else layers - 0.5
