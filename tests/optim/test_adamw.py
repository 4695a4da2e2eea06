"""AdamW: the update by its formula, what decays, and state that is there before the first step."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.optim import adamw, optimizer_tensors
from dsv3_book.optim.adamw import PIECE


def test_two_steps_by_the_formula() -> None:
    matrix, gain = nn.Parameter(torch.full((1, 1), 2.0)), nn.Parameter(torch.full((1,), 2.0))
    optimizer = adamw([("m", matrix), ("g", gain)], lr=0.1)
    expected, m, v = {"m": 2.0, "g": 2.0}, 0.0, 0.0
    for t, grad in enumerate((3.0, -1.0), start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        step = 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        expected = {"m": expected["m"] * (1 - 0.1 * 0.1) - step, "g": expected["g"] - step}
        matrix.grad, gain.grad = torch.full((1, 1), grad), torch.full((1,), grad)
        optimizer.step()
    torch.testing.assert_close(matrix.item(), expected["m"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gain.item(), expected["g"], rtol=1e-6, atol=0)


def test_matrices_decay_and_gains_do_not_and_the_bias_is_not_there() -> None:
    model = Transformer(ModelConfig.preset("tiny"))
    optimizer = adamw(model.named_parameters(), lr=1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(model.named_parameters()).keys()
    assert {name for name, rate in decay.items() if rate == 0} == {name for name in decay if "norm" in name}
    assert decay["embed_tokens.weight"] == decay["layers.1.mlp.experts.gate_proj"] == 0.1
    assert not any("bias" in name for name in decay)


def test_state_made_early_changes_nothing() -> None:
    results = []
    for early in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        optimizer = adamw([("w", weight)], lr=0.1)
        if early:
            tensors = optimizer_tensors([("w", weight)], optimizer)
            assert set(tensors) == {"w.step", "w.exp_avg", "w.exp_avg_sq"}
        weight.grad = torch.arange(6.0).view(2, 3)
        optimizer.step()
        results.append((weight, optimizer_tensors([("w", weight)], optimizer)))
    (a, x), (b, y) = results
    assert torch.equal(a, b) and all(torch.equal(x[name], y[name]) for name in x)
    assert x["w.step"].item() == 1


def test_state_filled_in_place_goes_on_as_if_never_stopped() -> None:
    def stepped(weight: nn.Parameter, optimizer: torch.optim.AdamW, grad: float) -> None:
        weight.grad = torch.arange(6.0).view(2, 3) + grad
        optimizer.step()

    weight = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    optimizer = adamw([("w", weight)], lr=0.1)
    stepped(weight, optimizer, 1.0)
    copy = nn.Parameter(weight.detach().clone())
    fresh = adamw([("w", copy)], lr=0.1)
    saved = optimizer_tensors([("w", weight)], optimizer)
    for name, empty in optimizer_tensors([("w", copy)], fresh).items():
        empty.copy_(saved[name])
    for w, o in ((weight, optimizer), (copy, fresh)):
        stepped(w, o, -2.0)
    assert torch.equal(weight, copy)


# Moments in BF16 ------------------------------------------------------------------------------------------------------
def nearest_bf16(x: np.ndarray) -> np.ndarray:
    """fp64 → the nearest bf16 value (8 significant bits, ties to even), by arithmetic alone."""
    _, exponent = np.frexp(x)
    spacing = np.exp2(np.maximum(exponent - 8.0, -133.0))
    return np.rint(x / spacing) * spacing


def test_bf16_moments_follow_an_fp64_definition() -> None:
    """Each step from our own state of before, so that nothing adds up: the new parameter agrees to fp32's rounding, the
    new moments in every bit, except where fp64 lies within fp32's rounding of the middle between two bf16 values."""
    torch.manual_seed(0)
    shapes = {"w": (300, 211), "g": (77,), "small": (3, 1)}  # 63,380 numbers
    named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    optimizer = adamw(named, lr=1e-2, moments="bf16")
    state = optimizer_tensors(named, optimizer)
    assert all(value.dtype == torch.bfloat16 for name, value in state.items() if "exp_avg" in name)
    ties = 0
    for t in range(1, 9):
        for _, p in named:
            p.grad = torch.randn(p.shape) * 10.0 ** torch.randint(-12, 4, p.shape)
        before = {name: value.double().numpy() for name, value in [*state.items(), *named_data(named)]}
        optimizer.step()
        for name, p in named:
            g, x = p.grad.double().numpy(), before[name]
            m, v = before[f"{name}.exp_avg"], before[f"{name}.exp_avg_sq"]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            x = x * (1 - 1e-2 * (0.1 if p.dim() > 1 else 0.0))
            x = x - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-6, atol=3e-7)
            # fp32 may round either way what lies in the middle; m also loses bits where its two parts cancel.
            slack = {"exp_avg": 2e-7 * (np.abs(before[f"{name}.exp_avg"]) + np.abs(g)), "exp_avg_sq": 3e-7 * v}
            for key, exact in (("exp_avg", m), ("exp_avg_sq", v)):
                found = state[f"{name}.{key}"].double().numpy()
                assert (found >= nearest_bf16(exact - slack[key])).all(), (name, key)
                assert (found <= nearest_bf16(exact + slack[key])).all(), (name, key)
                ties += (found != nearest_bf16(exact)).sum()
            assert state[f"{name}.step"].item() == t
    assert ties < 0.02 * 8 * 2 * 63_380  # 0.9 of a bf16 value often lies in the middle of two


def named_data(named: list[tuple[str, nn.Parameter]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, p.detach().clone()) for name, p in named]


def test_the_update_is_the_fused_one_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers whatever the pieces are: cut inside a tensor, over several tensors, or all at once."""
    results = []
    for size in (2**19, 4096, 160):
        monkeypatch.setitem(PIECE, "cpu", size)
        torch.manual_seed(1)
        named = [(str(i), nn.Parameter(torch.randn(n, 13))) for i, n in enumerate((50, 1, 370, 8))]
        optimizer = adamw(named, lr=1e-2, moments="bf16")
        for _ in range(3):
            for _, p in named:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for _, p in named] + list(optimizer_tensors(named, optimizer).values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fp32_moments_are_torchs_fused_adamw_bit_for_bit() -> None:
    torch.manual_seed(2)
    start = [torch.randn(50, 33), torch.randn(33)]
    grads = [[torch.randn_like(x) for x in start] for _ in range(4)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    decays = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    for p, optimizer in (
        (ours, adamw([("w", ours[0]), ("g", ours[1])], lr=0.01)),
        (theirs, torch.optim.AdamW(decays, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)),
    ):
        for row in grads:
            for parameter, grad in zip(p, row, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Allocations(TorchDispatchMode):
    """Remembers the size of every new piece of memory that an operation returns."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage().data_ptr(): 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return out


def test_bf16_moments_take_half_the_memory_and_a_step_little_more() -> None:
    """A step over 64 MiB of parameters makes a scratch of 4 MiB, not of their size."""
    p = nn.Parameter(torch.zeros(4096, 4096))
    p.grad = torch.ones(4096, 4096)
    sizes = {}
    for moments in ("fp32", "bf16"):
        optimizer = adamw([("w", p)], lr=1e-3, moments=moments)
        state = optimizer_tensors([("w", p)], optimizer)
        sizes[moments] = sum(t.nbytes for name, t in state.items() if "exp_avg" in name)
    assert sizes == {"fp32": 2 * 4 * 4096**2, "bf16": 2 * 2 * 4096**2}
    with Allocations(p, p.grad, *state.values()) as made:
        optimizer.step()
    scratch = 2 * 4 * PIECE["cpu"]
    assert scratch == 4 * 2**20
    assert scratch <= sum(made.sizes.values()) < 1.01 * scratch


def test_bf16_moments_that_could_not_decay_are_refused() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"betas \(0\.9, 0\.999\) do not go with bf16 moments"):
        adamw([("p", p)], lr=0.1, betas=(0.9, 0.999), moments="bf16")
    v = torch.tensor(1.01).bfloat16()
    assert (v.float() * 0.999).bfloat16() == v  # why
    with pytest.raises(ValueError, match=r"FP32|fp32 master weights, got .*bfloat16"):
        adamw([("p", nn.Parameter(torch.ones(2, 2).bfloat16()))], lr=0.1, moments="bf16")
    with pytest.raises(ValueError, match="moments must be one of fp32, bf16, got 'fp16'"):
        adamw([("p", p)], lr=0.1, moments="fp16")


def test_bf16_moments_survive_torchs_state_dict() -> None:
    named = [("w", nn.Parameter(torch.randn(5, 4)))]
    optimizer = adamw(named, lr=0.1, moments="bf16")
    named[0][1].grad = torch.randn(5, 4)
    optimizer.step()
    again = adamw(named, lr=0.1, moments="bf16")
    again.load_state_dict(optimizer.state_dict())
    a, b = optimizer_tensors(named, optimizer), optimizer_tensors(named, again)
    assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([("a", a), ("b", b)], lr=0.1, moments="bf16")
    b.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(a, torch.ones(2, 2)) and (b < 1).all() and optimizer.state_of(b)["step"] == 1
    assert a not in optimizer.state


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_step_is_seen_by_the_parameters_version(moments: str) -> None:
    """torch's fused step alone does not count, and FP8 codes kept by version would never be renewed."""
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([("a", a), ("b", b)], lr=0.1, moments=moments)
    a.grad = torch.ones(2, 2)
    before = a._version, b._version
    optimizer.step()
    assert a._version > before[0] and b._version == before[1]
