"""The grouped path and its one-expert-at-a-time twin, from even use to every token on one expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelkit import SMALL

from dsv3_book.model.dispatch import LocalDispatch
from dsv3_book.model.experts import Experts, MoE, one_expert_at_a_time
from dsv3_book.model.grouped import grouped_linear, grouped_swiglu
from dsv3_book.model.ops import swiglu


def made(E: int, F: int, D: int, seed: int) -> Experts:
    cfg = SMALL.replace(
        n_group=1, topk_group=1, n_routed_experts=E, num_experts_per_tok=1, moe_intermediate_size=F, hidden_size=D
    )
    experts = Experts(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return experts


def fast(experts: Experts, x, chosen, gates):
    handle = LocalDispatch(experts.gate_proj.shape[0]).start(x, chosen, gates)
    return handle.combine(experts(handle.wait())).wait()


def results(path, experts, x, chosen, gates):
    """Output and every gradient."""
    experts.zero_grad()
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = path(experts, x, chosen, gates)
    y.square().sum().backward()
    return [y.detach(), x.grad, gates.grad, *(p.grad for p in experts.parameters())]


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(3, 7), st.integers(1, 33), st.integers(1, 17), st.data())
def test_fast_is_slow(N, K, E, D, F, data):
    seed = data.draw(st.integers(0, 10**6))
    crowd = data.draw(st.sampled_from(["spread", "all on the same", "two experts unused"]))
    generator = torch.Generator().manual_seed(seed)
    pool = {"spread": E, "all on the same": K, "two experts unused": max(K, E - 2)}[crowd]
    chosen = torch.stack([torch.randperm(pool, generator=generator)[:K] for _ in range(N)])
    x, gates = torch.randn(N, D, generator=generator), torch.rand(N, K, generator=generator)
    experts = made(E, F, D, seed)
    for a, b in zip(results(fast, experts, x, chosen, gates), results(one_expert_at_a_time, experts, x, chosen, gates)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_all_tokens_on_one_expert_are_all_computed():
    experts = made(8, 7, 15, 0)
    x = torch.randn(500, 15)
    chosen, gates = torch.full((500, 1), 6), torch.ones(500, 1)
    y = fast(experts, x, chosen, gates)
    g, u, d = (getattr(experts, f"{m}_proj")[6] for m in ("gate", "up", "down"))
    expected = (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    y.sum().backward()
    unused = [e for e in range(8) if e != 6]
    assert not experts.gate_proj.grad[unused].any() and experts.gate_proj.grad[6].any()


def test_twice_the_same_is_the_same_bits():
    experts = made(5, 7, 15, 1)
    x, chosen = torch.randn(64, 15), torch.randint(0, 5, (64, 1))
    gates = torch.rand(64, 1)
    once, twice = (results(fast, experts, x, chosen, gates) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


def test_bf16_stays_close_to_fp32_with_fp32_gradients():
    experts = made(5, 32, 64, 2)
    x, chosen = torch.randn(64, 64), torch.stack([torch.randperm(5)[:2] for _ in range(64)])
    gates = torch.rand(64, 2)
    exact = results(fast, experts, x, chosen, gates)
    experts.zero_grad()
    rough = results(fast, experts, x.bfloat16(), chosen, gates)
    assert rough[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in rough[2:])
    for a, b in zip(exact, rough):
        assert float((a - b.float()).norm()) < 0.03 * float(a.norm())


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_moe_adds_the_shared_experts(shared):
    cfg = SMALL.replace(n_shared_experts=shared)
    moe = MoE(cfg)
    torch.manual_seed(0)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, cfg.hidden_size)
    flat = x.flatten(0, 1)
    routing = moe.gate(flat)
    expected = one_expert_at_a_time(moe.experts, flat, routing.experts, routing.gates)
    if shared:
        s = moe.shared_experts
        assert s.gate_proj.weight.shape == (shared * cfg.moe_intermediate_size, cfg.hidden_size)
        a = flat @ s.gate_proj.weight.T
        expected = expected + (a * torch.sigmoid(a) * (flat @ s.up_proj.weight.T)) @ s.down_proj.weight.T
    torch.testing.assert_close(moe(x, LocalDispatch(8)).flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_one_pass_per_expert_is_three_grouped_products(counts, D, F, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    S, E, rows = sum(counts), len(counts), torch.tensor(counts)
    inputs, answers = [draw(S, D), draw(S), draw(E, F, D), draw(E, F, D), draw(E, D, F)], []
    slow = lambda x, s, gate, up, down: grouped_linear(
        swiglu(grouped_linear(x, gate, rows), grouped_linear(x, up, rows)) * s[:, None], down, rows
    )
    for fn in (lambda x, s, *w: grouped_swiglu(x, s, rows, *w), slow):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = fn(*leaves)
        y.square().sum().backward()
        answers.append([y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*answers):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
