"""Local dispatch: every slot arrives, sorted by expert, and finds its way back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.model.dispatch import Dispatch, Handle, LocalDispatch, Pending


@st.composite
def routings(draw):
    """x [N, D], experts [N, K], gates [N, K], E: from spread out to all tokens on the same experts."""
    N, K, E, D = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(4, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)])
    else:
        experts = torch.arange(K).expand(N, K).clone()
    return torch.randn(N, D, generator=generator), experts, torch.rand(N, K, generator=generator), E


@given(routings())
def test_every_slot_arrives_at_its_expert_with_its_gate(case):
    x, experts, gates, E = case
    arrived = LocalDispatch(E).start(x, experts, gates).wait()
    assert int(arrived.counts.sum()) == experts.numel() == len(arrived.tokens)  # nothing is dropped
    assert arrived.counts.tolist() == torch.bincount(experts.flatten(), minlength=E).tolist()
    start = 0
    for e, n in enumerate(arrived.counts.tolist()):
        token, slot = torch.where(experts == e)
        assert torch.equal(arrived.tokens[start : start + n], x[token])
        assert torch.equal(arrived.gates[start : start + n], gates[token, slot])
        start += n


@given(routings())
def test_combine_sums_what_came_back_and_is_dispatch_turned_around(case):
    x, experts, gates, E = case
    x.requires_grad_()
    handle = LocalDispatch(E).start(x, experts, gates)
    K = experts.shape[1]
    torch.testing.assert_close(handle.combine(handle.wait().tokens).wait(), x * K)
    y = torch.randn(handle.wait().tokens.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    back = handle.combine(y).wait()
    # ⟨combine(y), z⟩ = ⟨y, dispatch(z)⟩ for every z: one is the transpose of the other, forward and backward
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    there = LocalDispatch(E).start(z, experts, gates).wait().tokens
    torch.testing.assert_close((back * z).sum(), (y * there).sum(), atol=1e-4, rtol=1e-4)
    (back * z).sum().backward()
    torch.testing.assert_close(y.grad, there)
    (handle.wait().tokens * y.detach()).sum().backward()
    torch.testing.assert_close(x.grad, back.detach())


def test_the_gates_gradient_finds_its_slot():
    gates = torch.rand(3, 2, requires_grad=True)
    experts = torch.tensor([[3, 0], [1, 2], [0, 3]])
    arrived = LocalDispatch(4).start(torch.ones(3, 1), experts, gates).wait()
    (arrived.gates * torch.arange(6.0)).sum().backward()
    assert gates.grad.tolist() == [[4.0, 0.0], [2.0, 3.0], [1.0, 5.0]]


def test_the_local_form_keeps_the_protocol():
    dispatch = LocalDispatch(4)
    handle = dispatch.start(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert isinstance(dispatch, Dispatch) and isinstance(handle, Handle)
    assert isinstance(handle.combine(handle.wait().tokens), Pending)
