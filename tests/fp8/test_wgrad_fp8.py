"""Weight gradients in FP8, put off: the same bits, kept as codes."""

import pytest
import torch
from modelkit import SMALL, awake, tokens_for

from dsv3_book.fp8.experts import Fp8Experts
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU
from dsv3_book.model import Transformer
from dsv3_book.model.wgrad import WeightGradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["I0 W0 I1 W1", "I0 I1 W0 W1"])
def test_two_micro_batches_give_the_same_bits_as_plain_backward(dtype, recompute, order):
    models = [awake(Transformer(SMALL, compute_dtype=dtype)) for _ in range(2)]
    for model in models:
        model.set_recompute(recompute)
        names = use_fp8(model)
    plain, split = models
    batches = [tokens_for(SMALL, 2, 6, seed) for seed in range(2)]
    for tokens in batches:
        losses = plain.losses(tokens)
        (losses.main + losses.mtp + losses.balance).backward()
    stores = [WeightGradients(), WeightGradients()]
    other = dict(split.named_parameters())
    for kind, number in order.split():
        if kind == "I":
            with stores[int(number)]:
                losses = split.losses(batches[int(number)])
                (losses.main + losses.mtp + losses.balance).backward()
            assert number == "1" or all(other[name].grad is None for name in names)
        else:
            stores[int(number)].run()
    for name, p in plain.named_parameters():
        assert p.grad.any(), name
        assert torch.equal(other[name].grad, p.grad), name


def codes(rows, columns, tiles):
    """Bytes of e4m3 codes and their fp32 scales."""
    return rows * columns + 4 * tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_kept_whatever_the_dtype(dtype):
    N, D, F = 128, 256, 384
    x, dy, dz = torch.randn(N, D, dtype=dtype), torch.randn(N, F, dtype=dtype), torch.randn(N, D, dtype=dtype)
    w, *three = (torch.nn.Parameter(torch.randn(s)) for s in ((F, D), (F, D), (F, D), (D, F)))
    by_rows, by_columns = codes(N, D, N * D // 128), codes(N, F, F)  # 1×128 tiles; 128×1 tiles, one for all 128 rows
    store = WeightGradients()
    with store:
        Fp8Linear()(x, w).backward(dy)
    assert store.bytes() == by_rows + by_columns
    store.run()
    with store:
        Fp8SwiGLU()(x, *three).backward(dz)
    assert store.bytes() == by_rows + 3 * by_columns + codes(N, D, D)  # x; h, dgate, dup; dy
    store.run()
    stacked = [torch.nn.Parameter(p.detach()[None].clone()) for p in three]
    with store:
        Fp8Experts()(x, torch.rand(N), torch.tensor([N]), *stacked).backward(dz)
    counts = 8
    assert store.bytes() == 2 * by_rows + 3 * by_columns + counts  # here dy too is kept as it travelled
