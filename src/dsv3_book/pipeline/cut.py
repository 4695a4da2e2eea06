"""A piece of the autograd graph with open ends: the one piece of machinery that running a backward in parts needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

Tensors = tuple[Tensor | None, ...]


class Cut:
    """`fn`, run on copies of its inputs that have no past; its outputs are
    given away without their graph.

    `forward(*inputs)` gives the outputs. `backward(*gradients)`, one for each
    output, runs this piece's backward alone: it adds to the gradients of the
    parameters inside, returns those of the inputs, and frees what was kept. Of
    inputs and outputs only their place in the graph is remembered: an input
    lives on if something inside saved it, an output is its user's business.
    """

    def __init__(self, fn: Callable[..., Tensors], ledger: Entry | None = None) -> None:
        self.fn, self.ledger = fn, ledger

    def forward(self, *inputs: Tensor) -> Tensors:
        self.caught: list[Tensor | None] = [None] * len(inputs)  # not the inputs, their gradients
        with torch.enable_grad(), self.ledger.watch() if self.ledger else nullcontext():
            outputs = self.fn(*_enter(self.caught, inputs))
        self.edges = [get_gradient_edge(t) if t is not None and t.requires_grad else None for t in outputs]
        return tuple(None if t is None else t.detach() for t in outputs)

    def backward(self, *gradients: Tensor | None) -> Tensors:
        ends = [(e, g) for e, g in zip(self.edges, gradients, strict=True) if e is not None and g is not None]
        torch.autograd.backward([e for e, _ in ends], [g for _, g in ends])
        answer = tuple(self.caught)
        self.caught.clear()  # what waits for a W may still hold the graph, and with it this list
        del self.edges, self.caught, self.fn
        return answer


def _enter(caught: list[Tensor | None], inputs: tuple[Tensor, ...]) -> Tensors:
    """The inputs with a graph that begins here; their gradients will be put into `caught`."""
    if not inputs:
        return ()
    handle = torch.empty(0, device=inputs[0].device, requires_grad=True)  # something must require a gradient
    return _Door.apply(caught, handle, *inputs)


class _Door(torch.autograd.Function):
    """Where a piece begins. Leaves with a `.grad` would do as well, but a graph keeps the memory of its leaves; this
    node keeps none. It knows the list and not the `Cut`, whose graph it is part of: that would be a circle."""

    @staticmethod
    def forward(ctx: Any, caught: list[Tensor | None], handle: Tensor, *inputs: Tensor) -> Tensors:
        ctx.caught = caught
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        # Contiguous as a leaf's gradient would be: that of a sum, for one, is a single number seen many times.
        ctx.caught[:] = [None if g is None else g.contiguous() for g in grads]
        return (None,) * (2 + len(grads))


class Ledger:
    """Counts what autograd keeps for backward, by owner (a chunk), through hooks on every tensor it saves.

    `live` is the number of owners for which something is kept now, `peak` the largest it ever was; `bytes` and
    `peak_bytes` are the memory kept, each storage counted once. Parameters are not activations: tell their storages by
    `ignore`. What `ops.recomputed` covers is seen where it is made again, not where it would have been kept.
    """

    def __init__(self, ignore: set[int] | None = None) -> None:
        self.ignore = ignore or set()
        self.owners: Counter[Hashable] = Counter()
        self.storages: Counter[int] = Counter()
        self.live = self.peak = self.bytes = self.peak_bytes = 0

    def entry(self, owner: Hashable) -> Entry:
        """The hooks that write down what is kept for this owner."""
        return Entry(self, owner)

    def add(self, owner: Hashable, storage: int, size: int) -> None:
        self.owners[owner] += 1
        self.storages[storage] += 1
        if self.storages[storage] == 1 and storage not in self.ignore:
            self.bytes += size
        self.live = len(self.owners)
        self.peak, self.peak_bytes = max(self.peak, self.live), max(self.peak_bytes, self.bytes)

    def remove(self, owner: Hashable, storage: int, size: int) -> None:
        _take_one(self.owners, owner)
        _take_one(self.storages, storage)
        if storage not in self.storages and storage not in self.ignore:
            self.bytes -= size
        self.live = len(self.owners)


def _take_one(counts: Counter[Any], key: Any) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


class Entry:
    """One owner's page of a ledger."""

    def __init__(self, ledger: Ledger, owner: Hashable) -> None:
        self.ledger, self.owner = ledger, owner

    def watch(self) -> Any:
        """Hooks to run a forward under."""
        return saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor)


class _Kept:
    """A saved tensor; leaves the ledger when autograd lets go of it."""

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.entry, self.tensor = entry, tensor
        storage = tensor.untyped_storage()
        self.line = entry.owner, storage.data_ptr(), storage.nbytes()
        entry.ledger.add(*self.line)

    def __del__(self) -> None:
        self.entry.ledger.remove(*self.line)
