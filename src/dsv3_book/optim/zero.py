"""ZeRO-1 (report §3.1, §3.3): every rank keeps and updates its shard of the optimiser's state, and all share weights.

A step over the ranks that hold the same parameters (buckets and shards: see `parallel/buckets.py`):

    reduce     .grad of every rank  → reduce-scatter → the sum of the gradients, each rank its shard, fp32
    clip       one norm over all shards of all ranks: since every number lies in one shard only, each counts once,
               however many ranks hold a copy of the weight
    step       AdamW on the shard: fp32 master weights and moments are needed only there;
               weights → all-gather → every rank has all of them again

Plain data parallelism is the same without the saving: the all-gather comes before AdamW, brings gradients instead of
weights, and every rank then updates everything. Same buckets, same sums, same norm, the same arithmetic on every
number: the results are equal bit for bit. `zero=False` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.optim.adamw import adamw, optimizer_tensors
from dsv3_book.optim.clip import clip_by_global_norm
from dsv3_book.optim.shards import Kind, Shard, Shards
from dsv3_book.parallel.buckets import BUCKET

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KEYS = ("exp_avg", "exp_avg_sq")


class ZeRO1:
    """AdamW over parameters of several kinds, its state sharded over the ranks that hold them.

        optimizer = ZeRO1([Kind(others, dp), Kind(experts, edp)], world, lr=2.2e-4, moments="bf16")
        ...                            # backward passes, which add up in .grad
        optimizer.reduce()
        norm = optimizer.clip(1.0)
        optimizer.step()               # and every .grad is None again

    kinds: see `Kind`; the same on all ranks of a group, no parameter in two of them.
    world: all ranks of the run, over which the norm is taken. None: this process alone.
    weights: how they rest on every rank between steps. "fp32": the parameters' memory becomes one row for each kind,
        and a rank's shard of that row is its master copy. "bf16": parameters turn bf16, half the memory and half the
        bytes to gather; the shard's master copy is kept apart, and gradients still arrive and add up in fp32.
    lr, betas, eps, weight_decay, moments: see `adamw`.
    zero: False for plain data parallelism, with fp32 weights.
    bucket: numbers in a bucket.
    make: what makes the optimiser of the shards, called as `adamw` is. `tensors` and `load` know AdamW's state only.

    With ZeRO the parameters are views of their kind's row. To move them (`model.to`) or give them other memory is an
    error that the next step finds; filling them in place (`load_state_dict`) is fine, followed by `take_weights()`
    where weights are bf16.

    Raises:
        ValueError: the settings; parameters of another dtype than fp32 (or `weights`); a name or parameter listed
            twice; ranks of one group that list different parameters.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        world: dist.ProcessGroup | None,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: str = "fp32",
        weights: str = "fp32",
        zero: bool = True,
        bucket: int = BUCKET,
        make: Callable[..., Any] = adamw,
    ) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        if weights == "bf16" and not zero:
            raise ValueError("plain data parallelism keeps no master weights apart: weights must be fp32, or zero True")
        if weights == "bf16" and not hasattr(torch.Tensor, "grad_dtype"):
            raise ValueError("bf16 weights with fp32 gradients need a torch with Tensor.grad_dtype; keep weights fp32")
        if world is None and any(kind.group is not None for kind in kinds):
            raise ValueError("a kind has a group, so `world`, the ranks over which the norm is taken, is needed too")
        self.world, self.zero = world, zero
        self.shards = Shards(kinds, WEIGHTS[weights], rows=zero, bucket=bucket)
        self.reduced: list[list[Tensor]] | None = None
        pieces = self.shards.pieces()
        named, dims = self.shards.named(), None
        if zero:
            named = [(s.key, s.weight) for s in pieces] or [("nothing", nn.Parameter(torch.zeros(0)))]
            dims = {"nothing": 0} | {s.key: s.parameter.dim() for s in pieces}
        self.optimizer = make(named, lr, betas, eps, weight_decay, moments, dims)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's, in which the trainer sets the learning rate."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums the gradients over every kind's group, in the order of `kinds`; all ranks must call it. With ZeRO each
        `.grad` is dropped once it is sent.

        A parameter that got no gradient counts as zero, here and in AdamW; a kind without any is an error.

        Raises:
            RuntimeError: the last sums have not been used: the new ones would take their place.
        """
        if self.reduced is not None:
            raise RuntimeError(
                "the gradients are summed already: call step(), or zero_grad() to drop them, before reduce()"
            )
        self.reduced = self.shards.reduce(forget=self.zero)

    def clip(self, max_norm: float) -> Float[Tensor, ""]:
        """Scales the summed gradients so that their norm over all ranks is at most `max_norm`; returns the norm before,
        the same on all ranks. All ranks of `world` must call it, those without any shard too."""
        self._sums("clip")
        device = self.shards.kinds[0].device
        return clip_by_global_norm([([s.weight for s in self.shards.pieces()], self.world)], max_norm, device)

    @torch.no_grad()
    def step(self) -> None:
        """One update, for which all ranks must call it; afterwards those of a group hold the same weights again, and no
        gradient."""
        sums = self._sums("step")
        if not self.zero:
            for kind, total in zip(self.shards.kinds, sums, strict=True):
                kind.gather_gradients(total)
        self.optimizer.step()
        self.zero_grad()
        if self.zero:
            self.shards.gather_weights()

    def zero_grad(self) -> None:
        """Drops all gradients, those that were summed too (as after a step that is not to be taken)."""
        self.reduced = None
        for p in [p for _, p in self.shards.named()] + [s.weight for s in self.shards.pieces()]:
            p.grad = None

    def parts(self) -> list[Shard]:
        """What this rank updates: its pieces of the parameters; without ZeRO every parameter, whole."""
        if self.zero:
            return self.shards.pieces()
        return [Shard(name, 0, p.numel(), p, p, 0) for name, p in self.shards.named()]

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that this rank updates, by name and range."""
        return {s.key: s.weight for s in self.parts()}

    def gather_weights(self) -> None:
        """Makes the parameters of all ranks what the master weights are now (after a change of these)."""
        if self.zero:
            self.shards.gather_weights()

    def take_weights(self) -> None:
        """Makes the master weights what the parameters are now (after these were filled from a file)."""
        self.shards.take_weights()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The whole state by parameter name, as `optimizer_tensors` has it, whatever the number of ranks.

        With ZeRO these are copies (gathered: all ranks must call it) which `load` takes back; with bf16 weights
        "….master" is among them. Ranks with other experts, or another pipeline stage, have theirs. Where that is too
        much in one place, `shards.pieces()` and `optimizer.state_of(piece.weight)` are this rank's part of it.
        """
        if not self.zero:
            return optimizer_tensors(self.shards.named(), self.optimizer)
        pieces = self.shards.pieces()
        states = [self.optimizer.state_of(s.weight) for s in pieces]
        values = {key: ([state[key] for state in states], self.optimizer.moments) for key in _KEYS}
        if self.shards.dtype != torch.float32:
            values["master"] = [s.weight for s in pieces], torch.float32
        out: dict[str, Tensor] = {}
        for key, (parts, dtype) in values.items():
            out |= {f"{name}.{key}": value for name, value in self.shards.whole(parts, dtype).items()}
        for kind in self.shards.kinds:
            steps = torch.zeros(len(kind.names), device=kind.device)
            known = {s.name: state["step"] for s, state in zip(pieces, states, strict=True)}
            for index, name in enumerate(kind.names):
                steps[index] = known.get(name, 0)
            if kind.group is not None:
                dist.all_reduce(steps, dist.ReduceOp.MAX, group=kind.group)  # not every rank has a piece of each
            out |= {f"{name}.step": step.clone() for name, step in zip(kind.names, steps, strict=True)}
        return out

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes this rank's part of whole tensors by name, as `tensors` gives them on any number of ranks.

        With bf16 weights the parameters are set too, from "….master".

        Raises:
            ValueError: a name is missing or has another shape, naming it.
        """
        apart = self.shards.dtype != torch.float32
        for name, p in self.shards.named():
            for key in [*_KEYS, "step", *(["master"] if apart else [])]:
                found, shape = tensors.get(f"{name}.{key}"), torch.Size() if key == "step" else p.shape
                if found is None or found.shape != shape:
                    what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                    raise ValueError(f"the optimiser's {name}.{key} {what}; {tuple(shape)} is needed")
        if not self.zero:
            for name, value in self.tensors().items():
                value.copy_(tensors[name])
            return
        for s in self.shards.pieces():
            state = self.optimizer.state_of(s.weight)
            state["step"].copy_(tensors[f"{s.name}.step"])
            for key in _KEYS:
                state[key].copy_(tensors[f"{s.name}.{key}"].reshape(-1)[s.begin : s.end])
            if apart:
                s.weight.copy_(tensors[f"{s.name}.master"].reshape(-1)[s.begin : s.end])
        if apart:
            self.shards.gather_weights()

    def _sums(self, what: str) -> list[list[Tensor]]:
        if self.reduced is None:
            raise RuntimeError(f"{what} needs the sums of the gradients: call reduce() first")
        return self.reduced
