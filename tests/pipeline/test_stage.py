"""A chunk run in parts, alone or as one of a pair, is the model's own forward and backward."""

import itertools
from typing import Any

import pytest
import torch

from dsv3_book.config import ModelConfig
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.model import Transformer
from dsv3_book.pipeline.cut import Cut, Ledger
from dsv3_book.pipeline.overlap import ORDER, Run, overlapped
from dsv3_book.pipeline.stage import Chunk, Weights

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
    weights = Weights.of(M, LAMBDA, model.cfg.num_nextn_predict_layers, torch.device("cpu"))
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
