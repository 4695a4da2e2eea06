"""Weight gradients put off are the weight gradients, bit for bit; and until then there are none."""

import weakref

import pytest
import torch
from modelkit import SMALL, awake, tokens_for

from dsv3_book.model import Transformer, ops
from dsv3_book.model.dispatch import Arrived
from dsv3_book.model.experts import Experts, one_expert_at_a_time
from dsv3_book.model.grouped import grouped_linear, grouped_swiglu
from dsv3_book.model.wgrad import WeightGradients


def a_model(dtype, recompute):
    model = awake(Transformer(SMALL, compute_dtype=dtype))
    model.set_recompute(recompute)
    return model


def total(model, tokens):
    losses = model.losses(tokens)
    return losses.main + 0.3 * losses.mtp + losses.balance


def put_off_here(model):
    """The names of the weights whose gradients wait: every linear layer's but the head's, and the experts'."""
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, ops.Linear) and n != "lm_head"}
    return linear | {n for n, _ in model.named_parameters() if ".experts." in n}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["I0 W0 I1 W1", "I0 I1 W0 W1"])
def test_two_micro_batches_give_the_same_bits_as_plain_backward(dtype, recompute, order):
    plain, split = a_model(dtype, recompute), a_model(dtype, recompute)
    batches = [tokens_for(SMALL, 2, 6, seed) for seed in range(2)]
    for tokens in batches:
        total(plain, tokens).backward()
    stores = [WeightGradients(), WeightGradients()]
    late = put_off_here(split)
    assert len(late) == 3 * 5 + 3 + 2 * (3 + 3) + 1  # MLA, the dense layer, shared and routed experts, eh_proj
    for kind, number in order.split():
        store = stores[int(number)]
        if kind == "I":
            before = {n: p.grad.clone() for n, p in split.named_parameters() if n in late and p.grad is not None}
            with store:
                total(split, batches[int(number)]).backward()
            grads = {n: p.grad for n, p in split.named_parameters()}
            assert {n for n, g in grads.items() if g is None} == (late if not before else set())
            assert all(torch.equal(grads[n], g) for n, g in before.items())
            assert store.bytes() > 0
        else:
            assert len(store) > 0
            store.run()
            assert (len(store), store.bytes()) == (0, 0)
    other = dict(split.named_parameters())
    for name, p in plain.named_parameters():
        assert p.grad.any(), name
        assert other[name].grad.dtype == p.grad.dtype and torch.equal(other[name].grad, p.grad), name


def test_input_gradients_come_in_i_and_w_leaves_them_alone():
    model, x = a_model(torch.float32, True), torch.randn(2, 5, SMALL.hidden_size, generator=torch.manual_seed(0))
    answers = []
    for put_off in (False, True):
        leaf = x.clone().requires_grad_()
        store = WeightGradients()
        if put_off:
            with store:
                model.run_blocks(leaf)[0].square().sum().backward()
            first = leaf.grad.clone()
            store.run()
            assert torch.equal(leaf.grad, first)
        else:
            model.run_blocks(leaf)[0].square().sum().backward()
        answers.append(leaf.grad)
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_the_products_read_and_it_goes(dtype):
    size, N, D, F = dtype.itemsize, 64, 32, 16
    x = torch.randn(N, D, dtype=dtype)
    store, w = WeightGradients(), torch.nn.Parameter(torch.randn(F, D))
    dy = torch.randn(N, F, dtype=dtype)
    with store:
        ops.linear(x, w).backward(dy)
    assert (len(store), store.bytes()) == (1, size * N * (D + F))
    with store:  # a second layer that reads the same x keeps it once
        ops.linear(x, w).backward(dy.clone())
    assert (len(store), store.bytes()) == (2, size * N * (D + 2 * F))
    gone = weakref.ref(dy)
    del dy
    assert gone() is not None
    store.run()
    assert gone() is None

    counts = torch.tensor([32, 0, 32])  # multiples of 32: no rooms to fill, so x and dy are kept as they are
    weights = [torch.nn.Parameter(torch.randn(3, *shape)) for shape in ((F, D), (F, D), (D, F))]
    dy = torch.randn(N, D, dtype=dtype)
    with store:
        grouped_swiglu(x, torch.rand(N), counts, *weights).backward(dy)
    assert (len(store), store.bytes()) == (1, size * N * (2 * D + 3 * F))  # x, dy; h, dgate, dup


@pytest.mark.parametrize("loads", [[3, 0, 40], [0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_put_off(dtype, loads):
    counts, D, F = torch.tensor(loads), 8, 5
    S = sum(loads)
    x, scale = torch.randn(S, D, dtype=dtype), torch.rand(S)
    weights = [torch.randn(3, *shape) for shape in ((F, D), (F, D), (D, F))]
    for fn in (lambda x, *w: grouped_swiglu(x, scale, counts, *w), lambda x, *w: grouped_linear(x, w[0], counts)):
        grads = []
        for put_off in (False, True):
            leaves = [torch.nn.Parameter(w.clone()) for w in weights]
            y, store = fn(x, *leaves), WeightGradients()
            with store if put_off else WeightGradients() as used:
                y.backward(torch.ones_like(y))
            used.run()
            grads.append([p.grad for p in leaves])
        for a, b in zip(*grads, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_weights_that_are_no_leaves_hand_their_gradient_on_at_once():
    experts = Experts(SMALL)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_()
    x, chosen = torch.randn(6, SMALL.hidden_size), torch.randint(0, SMALL.n_routed_experts, (6, 2))
    with WeightGradients() as store:
        one_expert_at_a_time(experts, x, chosen, torch.rand(6, 2)).sum().backward()
    assert len(store) == 0
    assert all(p.grad.any() for p in experts.parameters())


def test_frozen_weights_get_nothing():
    experts, linear = Experts(SMALL).requires_grad_(False), ops.Linear(3, 4).requires_grad_(False)
    x = torch.randn(4, SMALL.hidden_size, requires_grad=True)
    counts = torch.zeros(SMALL.n_routed_experts, dtype=torch.int64)
    counts[1] = 4
    z = torch.randn(2, 3, requires_grad=True)
    with WeightGradients() as store:
        (experts(Arrived(x, torch.ones(4), counts)).sum() + linear(z).sum()).backward()
    store.run()
    assert len(store) == 0 and x.grad is not None and z.grad is not None
    assert all(p.grad is None for m in (experts, linear) for p in m.parameters())


def test_the_gradients_dtype_is_the_parameters_choice():
    """bf16 weights may accumulate in fp32: three gradients whose bf16 sum would stay at 256."""
    w = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    w.grad_dtype = torch.float32
    with WeightGradients() as store:
        for dy in (256.0, 1.0, 1.0):
            ops.linear(torch.ones(1, 1, dtype=torch.bfloat16), w).backward(torch.full((1, 1), dy).bfloat16())
    store.run()
    assert w.grad.dtype == torch.float32 and w.grad.item() == 258


def test_the_innermost_block_takes_and_an_error_closes_it():
    w = torch.nn.Parameter(torch.ones(1, 1))
    with WeightGradients() as outer:
        with WeightGradients() as inner:
            ops.linear(torch.ones(1, 1), w).sum().backward()
        assert (len(outer), len(inner)) == (0, 1)
        ops.linear(torch.ones(1, 1), w).sum().backward()
    assert (len(outer), w.grad) == (1, None)
    with pytest.raises(RuntimeError, match="on purpose"), WeightGradients():
        raise RuntimeError("on purpose")
    ops.linear(torch.ones(1, 1), w).sum().backward()
    assert w.grad.item() == 1
