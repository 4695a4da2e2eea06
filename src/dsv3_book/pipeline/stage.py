"""One stage of the pipeline, and its work on one micro-batch (a chunk), cut into parts where tokens travel.

A MoE layer has four parts (report §3.2.1): attention, dispatch, mlp, combine. With `attention` goes all that needs
nothing that travels: norms, router, shared experts. Forward and backward of a chunk are generators that announce each
part before doing it, so that whoever runs them may do something else in between (`overlap`). Their plain composition is
`Transformer.losses`, and the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.model import Transformer, ops
from dsv3_book.model.balance import sequence_balance_loss
from dsv3_book.model.block import Block, merge
from dsv3_book.model.dispatch import Arrived, Dispatch
from dsv3_book.model.experts import MoE
from dsv3_book.model.rope import Angles
from dsv3_book.model.wgrad import WeightGradients
from dsv3_book.pipeline.cut import Cut, Entry

Parts: TypeAlias = Generator[str, None, Tensor | None]


class LossWeights(NamedTuple):
    """What the three losses of a micro-batch weigh in what is minimised: the gradients that backward starts from."""

    main: Float[Tensor, ""]
    mtp: Float[Tensor, ""]  # of each depth
    balance: Float[Tensor, ""]

    @staticmethod
    def of(micro_batches: int, mtp_weight: float, depths: int, device: torch.device) -> LossWeights:
        """Those of (main + λ · mean of the depths + balance) / M, rounded as autograd would."""
        one = torch.ones((), device=device) / micro_batches
        return LossWeights(one, one * mtp_weight / max(depths, 1), one)


@runtime_checkable
class Piece(Protocol):
    """A layer, or what comes before and after them."""

    def forward(self, x: Tensor) -> Parts: ...

    def backward(self, dy: Tensor, weights: LossWeights, store: WeightGradients, now: bool) -> Parts: ...


class Chunk:
    """A stage's forward, input gradient and weight gradient for one micro-batch, to be used once, in this order.

    `tokens` [B, T + 1 + J] are needed by the first and by the last stage. Afterwards the chunk holds the losses of this
    micro-batch that arise here, and the loads of the stage's routers.
    """

    def __init__(
        self, model: Transformer, tokens: Int[Tensor, "B width"], dispatch: Dispatch, entry: Entry | None
    ) -> None:
        depths = len(model.mtp_modules())
        at = model.angles(tokens.shape[1] - 1 - model.cfg.num_nextn_predict_layers)
        self.pieces: list[Piece] = [_layer(block, at, dispatch, entry) for block in model.blocks()]
        if model.part.embed:
            self.pieces.insert(0, Embed(model, tokens, entry))
        if model.part.head:
            self.pieces.append(Head(model, tokens, 0, entry))
            for depth, module in enumerate(model.mtp_modules(), start=1):
                self.pieces += [_layer(module, at, dispatch, entry), Head(model, tokens, depth, entry)]
        self.heads = [piece for piece in self.pieces if isinstance(piece, Head)]
        self.moe = [piece for piece in self.pieces if isinstance(piece, MoELayer)]
        self.depths, self.store, self.device = depths, WeightGradients(), model.device

    def forward(self, x: Float[Tensor, "B T D"] | None) -> Parts:
        """From the previous stage's output (None at the first) to the next one's input (None at the last)."""
        for piece in self.pieces:
            x = yield from piece.forward(x)  # type: ignore[arg-type]
        return x

    def backward(self, dy: Float[Tensor, "B T D"] | None, weights: LossWeights, now: bool) -> Parts:
        """From the gradient of the output to that of the input. With `now`, the weights' gradients are computed on the
        way; else they are put off until `weight_gradients()`."""
        while self.pieces:
            dy = yield from self.pieces.pop().backward(dy, weights, self.store, now)  # type: ignore[arg-type]
        return dy

    def weight_gradients(self) -> None:
        """Computes the weight gradients that were put off."""
        self.store.run()

    def losses(self) -> Float[Tensor, " 3"]:
        """Main loss, mean of the MTP depths' losses, balance loss: the shares of them that arise in this chunk."""
        zero = torch.zeros((), device=self.device)
        main = self.heads[0].loss if self.heads else zero
        mtp = torch.stack([head.loss for head in self.heads[1:]]).mean() if self.depths else zero
        balance = torch.stack([layer.balance for layer in self.moe]).sum() if self.moe else zero
        return torch.stack([main, mtp, balance])

    def loads(self) -> list[Float[Tensor, " E"]]:
        """Tokens per expert of every router of this stage, in the order of `Transformer.routers()`."""
        return [layer.load for layer in self.moe]


def _layer(block: Block, at: Angles, dispatch: Dispatch, entry: Entry | None) -> Piece:
    return (
        MoELayer(block, at, dispatch, entry) if isinstance(block.mlp, MoE) else DenseLayer(block, at, dispatch, entry)
    )


class MoELayer:
    """attention → dispatch → mlp → combine, and back."""

    def __init__(self, block: Block, at: Angles, dispatch: Dispatch, entry: Entry | None) -> None:
        self.block, self.at, self.dispatch = block, at, dispatch
        self.attention, self.mlp = Cut(self._attention, entry), Cut(self._mlp, entry)

    def _attention(self, x: Tensor) -> tuple[Tensor | None, ...]:
        block = self.block
        x = block.attention(x, self.at)
        with ops.recomputed(block.post_attention_layernorm, x, enabled=block.recompute) as h:
            routing = block.route(h)
            leaving = h.flatten(0, 1)  # made here, as in `Block.forward`: gradients are summed in the order of making
            self.exchange = self.dispatch.plan(routing.experts, leaving)
            shared = block.mlp.shared(h)  # type: ignore[operator]
        B, T = x.shape[:2]
        cfg = block.self_attn.cfg
        balance = sequence_balance_loss(routing.scores.view(B, T, -1), cfg.num_experts_per_tok, cfg.aux_loss_alpha)
        self.load, self.balance = routing.load, balance.detach()
        return x, leaving, routing.gates, shared, balance

    def _mlp(self, tokens: Tensor, gates: Tensor) -> tuple[Tensor]:
        return (self.block.experts(Arrived(tokens, gates, self.exchange.counts)),)

    def forward(self, x: Tensor) -> Parts:
        yield "attention"
        x, leaving, gates, shared, _ = self.attention.forward(x)  # type: ignore[assignment]
        yield "dispatch"
        travelling = self.exchange.scatter(leaving, gates)  # type: ignore[arg-type]
        del leaving, gates
        yield "mlp"
        (y,) = self.mlp.forward(*travelling.wait())
        yield "combine"
        travelling = self.exchange.gather(y, None)  # type: ignore[arg-type]
        del y
        yield "arrival"
        return merge(x, shared, travelling.wait()[0])

    def backward(self, dy: Tensor, weights: LossWeights, store: WeightGradients, now: bool) -> Parts:
        yield "combine"
        travelling = self.exchange.scatter(dy.flatten(0, 1), None)
        yield "mlp"
        with store:
            rows = self.mlp.backward(travelling.wait()[0])
        yield "dispatch"
        travelling = self.exchange.gather(*rows)  # type: ignore[arg-type]
        del rows
        if now:
            yield "mlp W"
            store.run()
        yield "attention"
        leaving, gates = travelling.wait()
        with store:
            (dx,) = self.attention.backward(dy, leaving, gates, dy, weights.balance)
        if now:
            yield "attention W"
            store.run()
        return dx


class DenseLayer:
    """A layer in which nothing travels: one part."""

    def __init__(self, block: Block, at: Angles, dispatch: Dispatch, entry: Entry | None) -> None:
        self.attention = Cut(lambda x: (block(x, at, dispatch)[0],), entry)

    def forward(self, x: Tensor) -> Parts:
        yield "attention"
        return self.attention.forward(x)[0]

    def backward(self, dy: Tensor, weights: LossWeights, store: WeightGradients, now: bool) -> Parts:
        yield "attention"
        with store:
            (dx,) = self.attention.backward(dy)
        if now:
            yield "attention W"
            store.run()
        return dx


class Embed:
    """Tokens to vectors, at the first stage. Its weight gradient is a by-product of backward and is never put off."""

    def __init__(self, model: Transformer, tokens: Int[Tensor, "B width"], entry: Entry | None) -> None:
        T = tokens.shape[1] - 1 - model.cfg.num_nextn_predict_layers
        self.cut = Cut(lambda: (model.embed(tokens[:, :T]),), entry)

    def forward(self, x: Tensor | None) -> Parts:
        yield "embed"
        return self.cut.forward()[0]

    def backward(self, dy: Tensor, weights: LossWeights, store: WeightGradients, now: bool) -> Parts:
        yield "embed"
        self.cut.backward(dy)
        return None


class Head:
    """Norm and loss of depth j (0: the main model's), and what the MTP module of the next depth starts from."""

    def __init__(self, model: Transformer, tokens: Int[Tensor, "B width"], depth: int, entry: Entry | None) -> None:
        self.model, self.tokens, self.depth = model, tokens, depth
        self.cut = Cut(self._head, entry)

    def _head(self, x: Tensor) -> tuple[Tensor | None, ...]:
        model, modules, j = self.model, self.model.mtp_modules(), self.depth
        hidden = modules[j - 1].shared_head.norm(x) if j else model.norm(x)
        ahead = self.tokens[:, j + 1 : x.shape[1] + j + 1]
        loss = model.token_loss(hidden, ahead)
        self.loss = loss.detach()
        return loss, modules[j].merge(hidden, model.embed(ahead)) if j < len(modules) else None

    def forward(self, x: Tensor) -> Parts:
        yield "head"
        return self.cut.forward(x)[1]

    def backward(self, dy: Tensor | None, weights: LossWeights, store: WeightGradients, now: bool) -> Parts:
        yield "head"
        with store:
            (dx,) = self.cut.backward(weights.mtp if self.depth else weights.main, dy)
        if now:
            store.run()
        return dx
