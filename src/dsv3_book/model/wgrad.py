"""Putting weight gradients off: a backward pass that gives input gradients now, and the weights' later (I and W apart).

A linear layer's backward makes two products that don't need each other. The input gradient dx = dy·W is awaited by
the layers before it; the weight gradient dW = dyᵀ·x by nobody but the optimiser. A pipeline's schedule uses this: it
runs I as soon as it can and fills its idle moments with W (Qi et al., zero bubble; report §3.2.1).

    with WeightGradients() as store:
        loss.backward()         # I: dx everywhere; what dW needs is kept, not computed
    store.run()                 # W: dW, accumulated into the weights' `.grad` as autograd would have, to the last bit

Deferred are the products of `Linear`, of the experts, and of both in FP8: nearly all the arithmetic of W. Embedding,
norms, the router (a small fp32 product) and the head (whose gradient is made in the forward pass, chunk by chunk,
because its logits are gone afterwards) get their gradient in I.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

Compute = partial[tuple[Tensor, ...]]


class WeightGradients:
    """Collects the weight gradients of every backward inside the `with` block, until `run`.

    Until then it keeps alive what they are computed from: of a linear layer x and dy, of experts also SwiGLU's output
    and its inputs' gradients, in FP8 their codes. An x that `ops.recomputed` had forgotten was computed again in I and
    is kept from there on. A gradient handed to `backward`, or received for it, must not be overwritten before `run`.

    Gradients go to `.grad` without autograd. Hooks on the parameters fire in backward, before there is a gradient, and
    not in `run`: sum over processes after the last W. A weight used several times in one backward gets its gradients
    one by one; autograd would add them up first.
    """

    active: ClassVar[
        list[WeightGradients]
    ] = []  # the `with` blocks we are in, innermost last; autograd has own threads

    def __init__(self) -> None:
        self.put_off: deque[tuple[Compute, tuple[Tensor, ...]]] = deque()

    def __enter__(self) -> WeightGradients:
        self.active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self.active.remove(self)

    def __len__(self) -> int:
        """Products' groups still to be computed."""
        return len(self.put_off)

    def bytes(self) -> int:
        """Bytes of what is kept until `run`, each storage once."""
        tensors = _tensors(compute.args for compute, _ in self.put_off)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    @torch.no_grad()
    def run(self) -> None:
        """Computes them in the order in which backward met them, adds them to the weights' `.grad`, forgets them."""
        while self.put_off:
            compute, weights = self.put_off.popleft()
            for weight, dw in zip(weights, compute(), strict=True):
                _accumulate(weight, dw)


def deferrable(*weights: Tensor) -> tuple[Tensor, ...]:
    """The weights, if all have a `.grad` to wait for; else none: a weight that was itself computed, a slice of another
    one for instance, must hand its gradient on at once. What a Function keeps in forward for `weight_gradients`."""
    return weights if all(w.is_leaf and w.requires_grad for w in weights) else ()


def will_be_put_off(*weights: Tensor) -> bool:
    """Whether `weight_gradients` of these weights would be put off here and now."""
    return bool(WeightGradients.active and weights)


def weight_gradients(compute: Compute, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """In a Function's backward: the gradients of its weights, or a None for each if they are put off.

    `compute` is a `partial` of all the tensors that it needs, and gives one gradient for each weight. Without weights
    (see `deferrable`) nothing is put off.
    """
    if not will_be_put_off(*weights):
        return compute()
    WeightGradients.active[-1].put_off.append((compute, weights))
    return (None,) * len(weights)


def _accumulate(weight: Tensor, dw: Tensor) -> None:
    """What autograd does at a leaf: the gradient gets the leaf's dtype, or the one asked for in `grad_dtype`."""
    dw = dw.to(getattr(weight, "grad_dtype", weight.dtype))  # torch 2.11 and later have it; None leaves dw as it is
    if weight.grad is None:
        weight.grad = dw
    else:
        weight.grad += dw


def _tensors(held: Iterable[Any]) -> Iterable[Tensor]:
    for item in held:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)
