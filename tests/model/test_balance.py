"""The bias rule, MaxVio and the sequence-wise loss."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelkit import SMALL

from dsv3_book.model.balance import max_violation, sequence_balance_loss, update_bias

loads = st.lists(st.integers(0, 50), min_size=2, max_size=9)


@given(loads, st.sampled_from([0.0, 0.001, 0.5]))
def test_each_bias_moves_one_step_towards_balance(load, gamma):
    bias, n = torch.zeros(len(load)), torch.tensor(load, dtype=torch.float32)
    update_bias(bias, n, gamma)
    mean = sum(load) / len(load)
    for b, x in zip(bias.tolist(), load):
        wanted = gamma if x < mean - 1e-4 else -gamma if x > mean + 1e-4 else 0.0
        assert b == pytest.approx(wanted) or abs(x - mean) < 1e-4


def test_stacked_layers_are_updated_each_by_its_own_mean():
    load = torch.tensor([[4.0, 0.0], [10.0, 30.0]])
    stacked, one = torch.zeros(2, 2), torch.zeros(2)
    update_bias(stacked, load, 0.1)
    update_bias(one, load[1], 0.1)
    assert torch.equal(stacked[1], one) and stacked.tolist()[0] == pytest.approx([-0.1, 0.1])


def test_micro_batches_one_by_one_are_another_rule():
    """Why the load must be the whole step's: two halves can pull a bias twice where the step would not move it."""
    halves = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    whole, parts = torch.zeros(2), torch.zeros(2)
    update_bias(whole, halves.sum(0), 0.1)
    update_bias(parts, halves[0], 0.1)
    assert whole.tolist() == [0.0, 0.0] and parts.tolist() == pytest.approx([-0.1, 0.1])


def test_max_violation_from_perfect_to_worst():
    assert float(max_violation(torch.full((8,), 5.0))) == 0.0
    collapsed = torch.tensor([10.0, 10.0] + [0.0] * 6)  # every token on the same K = 2 of E = 8
    assert float(max_violation(collapsed)) == pytest.approx(8 / 2 - 1)
    assert max_violation(torch.stack([collapsed, collapsed + 1])).shape == (2,)


def test_the_bias_rule_brings_a_lopsided_router_to_balance():
    generator = torch.Generator().manual_seed(0)
    lean = torch.linspace(-1, 1, 8)
    bias, before = torch.zeros(8), None
    for _ in range(400):
        scores = torch.sigmoid(torch.randn(256, 8, generator=generator) + lean)
        load = torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=8).float()
        before = before if before is not None else float(max_violation(load))
        update_bias(bias, load, 0.005)
    assert before > 0.9 and float(max_violation(load)) < 0.3


@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 6), st.integers(0, 999), st.data())
def test_sequence_loss_is_the_formula(B, T, E, seed, data):
    k = data.draw(st.integers(1, E))
    scores = torch.rand(B, T, E, generator=torch.Generator().manual_seed(seed)) + 0.01
    cfg = SMALL.replace(n_group=1, topk_group=1, n_routed_experts=E, num_experts_per_tok=k, aux_loss_alpha=0.3)
    slow = sum(reference.balance(cfg, row.double()) for row in scores) / B
    assert float(sequence_balance_loss(scores, k, 0.3)) == pytest.approx(float(slow), rel=1e-5)


def test_uniform_use_costs_alpha_and_collapse_costs_more():
    E, T = 4, 8
    uniform = torch.full((1, T, E), 0.1)
    for t in range(T):
        uniform[0, t, t % E] = 0.9
    collapsed = torch.full((1, T, E), 0.1)
    collapsed[..., 0] = 0.9
    assert float(sequence_balance_loss(uniform, 1, 1.0)) == pytest.approx(1.0)
    assert float(sequence_balance_loss(collapsed, 1, 1.0)) == pytest.approx(4 * 0.9 / 1.2)


def test_gradient_pushes_the_overused_expert_down():
    logits = torch.zeros(1, 6, 4)
    logits[..., 0] = 1.0
    logits.requires_grad_()
    sequence_balance_loss(torch.sigmoid(logits), 1, 1.0).backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1:] <= 0).all()
