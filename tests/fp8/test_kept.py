"""What FP8 layers keep: fewer bytes for backward, and a weight's codes until the weight changes."""

import copy

import pytest
import torch
from layerkit import noise, size

from dsv3_book.fp8.experts import Fp8Experts
from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU, QuantisedWeight
from dsv3_book.model import ops
from dsv3_book.optim.adamw import adamw


def kept(fn, *inputs):
    """The tensors a call keeps for backward, without its inputs."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn(*inputs)
    return saved


def test_bytes_kept_by_a_linear():
    """One byte and 4/128 a number; after attention one and a half; beside 4 and 2."""
    x, w = noise(0, 32, 256).requires_grad_(), noise(1, 64, 256).requires_grad_()
    scales = 32 * 2 * 4
    assert size(kept(Fp8Linear(), x, w)) == 32 * 256 + scales
    assert size(kept(Fp8Linear(after_attention=True), x, w)) == 32 * 256 * 3 // 2 + scales
    assert size([t for t in kept(ops.linear, x, w) if t.shape == x.shape]) == 32 * 256 * 4
    half = x.bfloat16()
    assert size([t for t in kept(ops.linear, half, w) if t.shape == x.shape]) == 32 * 256 * 2
    assert all(t.dtype != torch.bfloat16 for t in kept(Fp8Linear(), half, w))


def test_bytes_kept_by_swiglu_and_experts():
    """x, gate(x) and up(x) as codes: a row of D + 2F bytes and its scales; beside 4·(D + 3F) or so."""
    D, F, N = 256, 128, 48
    x = noise(0, N, D).requires_grad_()
    weights = [noise(i, *s).requires_grad_() for i, s in enumerate(((F, D), (F, D), (D, F)))]
    a_row = D + 2 * F + 4 * (D // 128 + 2 * F // 128)
    assert size(kept(Fp8SwiGLU(), x, *weights)) == N * a_row
    stacked = [w.detach()[None].requires_grad_() for w in weights]
    gates, counts = torch.rand(N), torch.tensor([N])
    assert size(kept(Fp8Experts(), x, gates, counts, *stacked)) == N * a_row + N * 4 + 8  # and gates and counts


# Weights in FP8 are kept too, until they change ----------------------------------------------------------------------
def sgd(p):
    return torch.optim.SGD([p], lr=0.1)


def fused(p):
    return torch.optim.AdamW([p], lr=0.1, fused=True)


def ours(p):
    return adamw([("w", p)], lr=0.1)


def bf16_moments(p):
    return adamw([("w", p)], lr=0.1, moments="bf16")


def by_load_state_dict(p):
    holder = torch.nn.Module()
    holder.w = p
    holder.load_state_dict({"w": torch.randn_like(p)})


def by_copy(p):
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def by_data(p):
    p.data = torch.randn_like(p)


def by_fewer_rows(p):
    """At the same address."""
    p.data, p.grad = p.data[: len(p) // 2], None


CHANGES = [sgd, fused, ours, bf16_moments, by_load_state_dict, by_copy, by_data, by_fewer_rows]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_quantised_again(change):
    product, x, w = Fp8Linear(), noise(0, 8, 32), torch.nn.Parameter(noise(1, 16, 32))
    for _ in range(3):
        product(x, w).sum().backward()
        optimizer = change(w)
        if optimizer is not None:
            optimizer.step()
        assert torch.equal(product(x, w), Fp8Linear()(x, w))


def test_an_unchanged_weight_is_quantised_once(monkeypatch):
    made = []
    init = QuantisedWeight.__init__
    monkeypatch.setattr(QuantisedWeight, "__init__", lambda self, w: made.append(1) or init(self, w))
    product, w = Fp8Linear(), torch.nn.Parameter(noise(1, 16, 32))
    for seed in range(3):
        product(noise(seed, 8, 32), w).sum().backward()
    assert len(made) == 1
    copied = copy.deepcopy(product)
    other = torch.nn.Parameter(w.detach().clone())
    assert torch.equal(copied(noise(0, 8, 32), other), product(noise(0, 8, 32), w)) and len(made) == 2
    with torch.inference_mode():
        inside = noise(5, 16, 32).clone()
        assert torch.equal(product(noise(0, 8, 32), inside), Fp8Linear()(noise(0, 8, 32), inside))


def test_a_bf16_weight_works_and_float64_is_refused():
    w = noise(1, 16, 32, dtype=torch.bfloat16).requires_grad_()
    Fp8Linear()(noise(0, 8, 32, dtype=torch.bfloat16), w).sum().backward()
    assert w.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float64"):
        Fp8Linear()(noise(0, 8, 32).double(), w)
