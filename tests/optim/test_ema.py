"""The weights' average: its definition, beside the training and not in its way, and in the weights' place."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3_book.optim import EMA, adamw


def net() -> nn.ParameterDict:
    torch.manual_seed(0)
    return nn.ParameterDict({"w": nn.Parameter(torch.randn(33, 7)), "g": nn.Parameter(torch.ones(5))})


def steps(model: nn.ParameterDict, count: int) -> list[dict[str, torch.Tensor]]:
    """Weights after each of some optimiser steps, from an optimiser made anew."""
    optimizer = adamw(model.items(), lr=0.1)
    out = []
    for _ in range(count):
        for p in model.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        out.append({name: p.detach().clone() for name, p in model.items()})
    return out


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_equals_its_definition(decay: float) -> None:
    """Every update in the same fp32 operations bit for bit, and the closed form Σ (1−d)·dᵏ·w in fp64 to rounding."""
    model = net()
    ema = EMA(dict(model.items()), decay)
    expected = {name: p.detach().clone() for name, p in model.items()}
    exact = {name: p.detach().double() for name, p in model.items()}
    optimizer = adamw(model.items(), lr=0.1)
    for _ in range(20):
        for p in model.values():
            p.grad = torch.randn_like(p)
        ema.before_step()
        optimizer.step()
        ema.update()
        for name, p in model.items():
            expected[name] = torch.lerp(expected[name], p.detach(), 1 - decay)
            exact[name] = decay * exact[name] + (1 - decay) * p.detach().double()
    for name, found in ema.tensors().items():
        assert torch.equal(found, expected[name])
        torch.testing.assert_close(found.double(), exact[name], rtol=0, atol=2e-6)
    ema.close()


def test_an_update_is_of_the_weights_as_they_were_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is held up; weights change meanwhile; the average is still that of the snapshot."""
    model = net()
    ema = EMA(dict(model.items()), 0.5)
    start = model["w"].detach().clone()
    go, follow = threading.Event(), ema._follow
    monkeypatch.setattr(ema, "_follow", lambda events: (go.wait(10), follow(events))[1])
    with torch.no_grad():
        model["w"] += 1
        ema.update()
        assert torch.equal(ema.average["w"], start)  # it returned, and nothing has been averaged yet
        model["w"] += 100
    go.set()
    assert torch.equal(ema.tensors()["w"], torch.lerp(start, start + 1, 0.5))


ALONE = """
import os, torch
from dsv3_book.optim import EMA
torch.set_num_threads(2)
weights = {"w": torch.randn(1000, 1001), "v": torch.randn(70_000)[::2].view(-1)}
weights["w"] @ weights["w"].T  # the main thread has its team
before = len(os.listdir("/proc/self/task"))
ema = EMA(weights, 0.5)
ema.update()
ema.wait()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux' /proc")
def test_its_thread_works_alone() -> None:
    """A team of OpenMP threads beside the main thread's would halve the speed of every step from then on."""
    alone = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert alone.stdout == "1\n", alone.stderr


def test_what_fails_in_the_thread_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA(dict(net().items()), 0.5)

    def fail(events: list) -> None:
        raise MemoryError("no memory on purpose")

    monkeypatch.setattr(ema, "_follow", fail)
    ema.update()
    with pytest.raises(MemoryError, match="on purpose"):
        ema.update()


def test_swapped_in_and_out_again() -> None:
    model = net()
    ema = EMA(dict(model.items()), 0.9)
    (after,) = steps(model, 1)
    ema.update()
    average, versions, calls = ema.tensors()["w"].clone(), model["w"]._version, []

    def inside() -> None:
        nonlocal versions
        with ema.swapped(lambda: calls.append(model["w"].detach().clone())):
            assert torch.equal(model["w"], average) and model["w"]._version > versions
            with pytest.raises(RuntimeError, match="swapped"):
                ema.update()
            with pytest.raises(RuntimeError, match="swapped"), ema.swapped():
                pass
            versions = model["w"]._version
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # as an evaluation that fails
        inside()
    assert all(torch.equal(model[name], after[name]) for name in after) and model["w"]._version > versions
    assert torch.equal(ema.tensors()["w"], average)
    assert torch.equal(calls[0], average) and torch.equal(calls[1], after["w"])
    ema.update()


def test_an_error_inside_is_not_followed_by_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks may never send theirs: what went wrong must come out, not wait for them."""
    model, calls = net(), []
    ema = EMA(dict(model.items()), 0.5)
    before = model["w"].detach().clone()
    steps(model, 1)
    after = model["w"].detach().clone()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(MemoryError), ema.swapped(lambda: calls.append(model["w"].detach().clone())):
        raise MemoryError
    assert len(calls) == 1 and torch.equal(calls[0], before) and torch.equal(model["w"], after)
    with ema.swapped():
        pass


def test_saved_and_gone_on_with() -> None:
    model = net()
    one = EMA(dict(model.items()), 0.9)
    steps(model, 1)
    one.update()
    other = EMA(dict(model.items()), 0.9)
    for name, value in other.tensors().items():
        assert not torch.equal(value, one.tensors()[name])
        value.copy_(one.tensors()[name])
    steps(model, 1)
    one.update()
    other.update()
    assert all(torch.equal(one.tensors()[name], value) for name, value in other.tensors().items())


def test_bad_input() -> None:
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"decay must be at least 0 and less than 1, got {decay}"):
            EMA({}, decay)
    with pytest.raises(ValueError, match=r"but w is torch\.bfloat16"):
        EMA({"w": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_rank_without_any_weight() -> None:
    ema = EMA({})
    ema.update()
    assert ema.tensors() == {}
