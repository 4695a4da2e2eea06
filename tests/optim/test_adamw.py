"""AdamW: the update by its formula, what decays, and state that is there before the first step."""

import math

import torch
from torch import nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.optim import adamw, optimizer_tensors


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
