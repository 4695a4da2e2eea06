"""Who is chosen, and with what weight, against the released gate written as a loop over tokens."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelkit import SMALL

from dsv3_book.config import ModelConfig
from dsv3_book.model.router import Router, gate_weights, select


@st.composite
def cases(draw):
    """(config, scores, bias): sizes, groups and biases of every sign."""
    n_group = draw(st.sampled_from([1, 2, 3, 4]))
    per_group = draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    k = draw(st.integers(1, topk_group * per_group))
    cfg = SMALL.replace(
        n_group=n_group, n_routed_experts=n_group * per_group, topk_group=topk_group, num_experts_per_tok=k
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.rand(draw(st.integers(1, 8)), cfg.n_routed_experts, generator=generator)
    bias = draw(st.sampled_from([0.0, 0.3, 3.0])) * torch.randn(cfg.n_routed_experts, generator=generator)
    return cfg, scores, bias + draw(st.sampled_from([0.0, -5.0, 5.0]))


def args(cfg: ModelConfig):
    return cfg.n_group, cfg.topk_group, cfg.num_experts_per_tok


@given(cases())
def test_the_choice_is_the_released_gates(case):
    cfg, scores, bias = case
    chosen = select(scores, bias, *args(cfg))
    biased = scores + bias  # rounded as the gate rounds it, so that a tie here is a tie there
    zero = [0.0] * cfg.n_routed_experts
    for n in range(len(scores)):
        assert sorted(chosen[n].tolist()) == reference.choose(cfg, biased[n].tolist(), zero)


@given(cases())
def test_distinct_experts_of_few_enough_groups(case):
    cfg, scores, bias = case
    chosen = select(scores, bias, *args(cfg))
    per_group = cfg.n_routed_experts // cfg.n_group
    assert all(len(set(row)) == cfg.num_experts_per_tok for row in chosen.tolist())
    assert all(len({e // per_group for e in row}) <= cfg.topk_group for row in chosen.tolist())


@given(cases(), st.sampled_from([1.0, 2.5]))
def test_gates_come_from_the_scores_alone(case, scale):
    cfg, scores, bias = case
    chosen = select(scores, bias, *args(cfg))
    normal, raw = (gate_weights(scores, chosen, flag, scale) for flag in (True, False))
    torch.testing.assert_close(normal.sum(-1), torch.full((len(scores),), scale))
    torch.testing.assert_close(raw, scores.gather(1, chosen) * scale)
    torch.testing.assert_close(normal / normal.sum(-1, keepdim=True), raw / raw.sum(-1, keepdim=True))


def test_a_bias_moves_the_choice_and_not_the_scores():
    router = Router(SMALL)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(30, SMALL.hidden_size)
    before = router(x)
    router.e_score_correction_bias[5] += 10.0
    after = router(x)
    assert torch.equal(before.scores, after.scores) and (after.experts == 5).any(-1).all()
    assert int(after.load[5]) == 30 and int(after.load.sum()) == 30 * SMALL.num_experts_per_tok
    assert after.load.dtype == torch.float32 and not after.load.requires_grad


def test_the_gradient_reaches_the_weight_through_the_gates_and_the_scores():
    router = Router(SMALL)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(6, SMALL.hidden_size))
    (routing.gates.square().sum() + routing.scores.sum()).backward()
    assert router.weight.grad.abs().sum() > 0 and not router.e_score_correction_bias.requires_grad


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_casting_the_model_leaves_the_bias_alone(cast):
    router = Router(SMALL)
    router.e_score_correction_bias.fill_(0.1234567)
    before = router.e_score_correction_bias.clone()
    router.to(cast)
    assert router.weight.dtype == cast and router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_router_keeps_its_input_as_it_came_and_has_autograds_bits(dtype, weights):
    router = Router(SMALL.replace(norm_topk_prob=False, routed_scaling_factor=1.0))
    torch.nn.init.normal_(router.weight)
    router.to(weights)
    x = torch.randn(30, SMALL.hidden_size).to(dtype).requires_grad_()
    dy = torch.randn(30, SMALL.n_routed_experts)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scores = router(x).scores
    assert not any(t.shape == x.shape and t.data_ptr() != x.data_ptr() for t in kept)
    scores.backward(dy)
    leaves = [t.detach().clone().requires_grad_() for t in (x, router.weight)]
    expected = torch.sigmoid(leaves[0].float() @ leaves[1].float().t())
    expected.backward(dy)
    assert torch.equal(scores, expected) and scores.dtype == torch.float32
    for found, leaf in zip((x, router.weight), leaves, strict=True):
        assert found.grad.dtype == leaf.dtype and torch.equal(found.grad, leaf.grad)
