"""A chunk run in parts, alone or as one of a pair, is the model's own forward and backward."""

import itertools
import weakref
from typing import Any

import pytest
import torch

from dsv3_book.config import ModelConfig
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.model import Transformer
from dsv3_book.pipeline.cut import Cut, Ledger
from dsv3_book.pipeline.overlap import ORDER, Run, overlapped
from dsv3_book.pipeline.stage import Chunk, LossWeights, MoELayer

M, LAMBDA = 3, 0.3


def made(depths: int, recompute: bool, dtype: torch.dtype, fp8: bool) -> Transformer:
    model = Transformer(ModelConfig.preset("tiny").replace(num_nextn_predict_layers=depths), 3, compute_dtype=dtype)
    model.set_recompute(recompute)
    if fp8:
        use_fp8(model)
    return model


def batch(depths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(depths)
    return [torch.randint(0, 512, (2, 17 + depths), generator=generator) for _ in range(M)]


def plain(model: Transformer, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    losses = []
    for tokens in batches:
        loss = model.losses(tokens)
        ((loss.main + LAMBDA * loss.mtp + loss.balance) / M).backward()
        losses.append(torch.stack(loss[:3]).detach())
    return losses


def in_parts(model: Transformer, batches: list[torch.Tensor], ledger: Ledger) -> tuple[list[Chunk], list[str]]:
    """Micro-batch 0 backward beside 1 forward as a pair; 1 and 2 with their weight gradients put off."""
    weights = LossWeights.of(M, LAMBDA, model.cfg.num_nextn_predict_layers, torch.device("cpu"))
    chunks = [Chunk(model, tokens, model.dispatch, ledger.entry(i)) for i, tokens in enumerate(batches)]
    done: list[str] = []

    def forward(i: int, **how: Any) -> Run:
        return Run(chunks[i].forward(None), lambda part, *_: done.append(f"F {part}"))

    def backward(i: int, now: bool) -> Run:
        return Run(chunks[i].backward(None, weights, now), lambda part, *_: done.append(f"B {part}"))

    forward(0).finish()
    assert ledger.live == 1
    done.clear()
    overlapped(forward(1), backward(0, now=True))
    order = list(done)
    assert (ledger.live, ledger.peak) == (1, 2)  # a pair holds both, and what is backward is forgotten
    backward(1, now=False).finish()
    assert ledger.live == 0  # I frees the activations, though W is still to come
    forward(2).finish()
    chunks[1].weight_gradients()
    backward(2, now=False).finish()
    assert len(chunks[2].store) > 0
    chunks[2].weight_gradients()
    assert (ledger.live, ledger.bytes, ledger.peak) == (0, 0, 2)
    return chunks, order


@pytest.mark.parametrize(
    ("depths", "recompute", "dtype", "fp8"),
    [
        *itertools.product((0, 1, 2), (False, True), (torch.float32,), (False,)),
        (1, False, torch.bfloat16, False),
        (1, True, torch.bfloat16, False),
        (1, False, torch.bfloat16, True),
        (1, True, torch.float32, True),
    ],
)
def test_the_parts_make_the_whole_bit_for_bit(depths: int, recompute: bool, dtype: torch.dtype, fp8: bool) -> None:
    """All gradients have the same bits but those of weights that a micro-batch uses twice (embedding and head, with
    MTP): one process adds up the two uses before it adds them to the earlier micro-batches', a pipeline does not."""
    one, other = (made(depths, recompute, dtype, fp8) for _ in range(2))
    batches = batch(depths)
    expected = plain(one, batches)
    chunks, _ = in_parts(other, batches, Ledger({p.untyped_storage().data_ptr() for p in other.parameters()}))
    for losses, chunk in zip(expected, chunks, strict=True):
        assert torch.equal(chunk.losses(), losses)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        if depths and name in ("embed_tokens.weight", "lm_head.weight"):
            assert (p.grad - q.grad).norm() <= 2e-7 * p.grad.norm(), name
        else:
            assert torch.equal(p.grad, q.grad), name


def test_a_pair_follows_the_order_layer_by_layer() -> None:
    """Where both chunks have a MoE layer, the ten parts come in the released order of either stream."""
    _, order = in_parts(model := made(1, False, torch.float32, False), batch(1), Ledger())
    assert len(model.layers) == 5
    cycle = [f"{side} {part}" for side, part in ORDER]
    named = [part for part in order if part in cycle]
    # Forward has layer 0 dense, backward begins with MTP's: from the second round on both are MoE layers, three times.
    begin = named.index("B combine", named.index("B attention W"))
    assert named[begin : begin + 30] == cycle * 3
    computed = [part for part in cycle if part.split(" ", 1)[1] not in ("dispatch", "combine")]
    assert computed == ["F attention", "B mlp", "B mlp W", "F mlp", "B attention", "B attention W"]
    assert [part for part in cycle if part not in computed] == ["B combine", "F dispatch", "B dispatch", "F combine"]


def test_a_cut_frees_what_it_kept_and_can_be_used_once() -> None:
    ledger = Ledger()
    weight = torch.nn.Parameter(torch.ones(3))
    cut = Cut(lambda x: (x * weight, None, x.sum()), ledger.entry("a"))
    product, nothing, total = cut.forward(torch.arange(3.0))
    assert nothing is None
    assert product is not None and total is not None and not product.requires_grad
    assert ledger.live == 1
    (dx,) = cut.backward(torch.full((3,), 2.0), None, torch.tensor(1.0))
    assert dx is not None and dx.tolist() == [3.0] * 3
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 2.0, 4.0]
    assert ledger.live == 0
    with pytest.raises(AttributeError):
        cut.backward(None, None, None)


def test_gradients_of_several_inputs() -> None:
    """Used twice, once, not at all, and handed through; each as a leaf's would be, contiguous."""
    inputs = [torch.randn(4, 3) for _ in range(4)]

    def fn(a: torch.Tensor, b: torch.Tensor, _: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (a * a + a.sin()).sum() + b.sum(), d

    leaves = [t.clone().requires_grad_() for t in inputs]
    one, d = fn(*leaves)
    torch.autograd.backward([one, d], [torch.tensor(0.5), torch.ones(4, 3)])
    cut = Cut(fn)
    cut.forward(*inputs)
    found = cut.backward(torch.tensor(0.5), torch.ones(4, 3))
    assert found[2] is None
    for leaf, dx in zip(leaves, found, strict=True):
        assert (leaf.grad is None) == (dx is None)
        assert leaf.grad is None or (dx is not None and torch.equal(leaf.grad, dx) and dx.is_contiguous())
    assert not any(t.requires_grad for t in inputs)
    (cut := Cut(fn)).forward(*inputs)
    assert cut.backward(None, torch.ones(4, 3))[:3] == (None, None, None)


def test_a_cut_keeps_of_its_inputs_what_backward_needs() -> None:
    """And nothing is left of one that never runs backward."""
    weight = torch.nn.Parameter(torch.ones(3))
    needed, other = torch.randn(3), torch.randn(3)
    storages = [weakref.ref(t.untyped_storage()) for t in (needed, other)]
    cut = Cut(lambda a, b: (a * weight + b,))
    cut.forward(needed, other)
    del needed, other
    assert storages[0]() is not None and storages[1]() is None
    del cut
    assert storages[0]() is None


@pytest.mark.parametrize("recompute", [False, True])
def test_of_rows_that_arrived_only_their_codes_are_kept_in_fp8(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[weakref.ref[torch.UntypedStorage]] = []

    def mlp(self: MoELayer, tokens: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor]:
        arrived.append(weakref.ref(tokens.untyped_storage()))
        return experts(self, tokens, gates)

    experts = MoELayer._mlp
    monkeypatch.setattr(MoELayer, "_mlp", mlp)
    for fp8 in (True, False):
        model = made(1, recompute, torch.bfloat16, fp8)
        chunk = Chunk(model, batch(1)[0], model.dispatch, None)
        Run(chunk.forward(None)).finish()
        assert [storage() is None for storage in arrived] == [fp8] * 4
        arrived.clear()
