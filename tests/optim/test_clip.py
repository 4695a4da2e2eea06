"""One norm over everything, each gradient once."""

import math

import pytest
import torch
from torch import nn

from dsv3_book.optim import clip_by_global_norm, global_norm


def parameters(*grads: list[float] | None) -> list[nn.Parameter]:
    out = []
    for grad in grads:
        p = nn.Parameter(torch.zeros(len(grad or [0])))
        p.grad = None if grad is None else torch.tensor(grad)
        out.append(p)
    return out


def test_norm_spans_all_parts_and_skips_what_has_no_gradient() -> None:
    a, b, c = parameters([3.0], [0.0, 4.0], None)
    assert global_norm([([a, c], None), ([b], None)]).item() == 5.0


def test_a_parameter_named_twice_counts_once() -> None:
    (a,) = parameters([3.0, 4.0])
    assert global_norm([([a, a], None), ([a], None)]).item() == 5.0
    norm = clip_by_global_norm([([a, a], None), ([a], None)], 1.0)
    assert norm.item() == 5.0
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.8]))


def test_small_gradients_are_left_alone() -> None:
    (a,) = parameters([0.3, 0.4])
    assert clip_by_global_norm([([a], None)], 1.0).item() == pytest.approx(0.5)
    assert torch.equal(a.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_comes_back_and_spoils_nothing(bad: float) -> None:
    a, b = parameters([bad], [2.0])
    assert not torch.isfinite(clip_by_global_norm([([a, b], None)], 1.0))
    assert b.grad.item() == 2.0


def test_no_gradients_at_all() -> None:
    assert clip_by_global_norm([(parameters(None), None)], 1.0).item() == 0.0
    assert clip_by_global_norm([], 1.0).item() == 0.0


def test_norm_is_taken_in_fp32() -> None:
    p = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    p.grad = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    expected = p.grad.double().norm().item()
    norm = global_norm([([p], None)])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-5)


def test_a_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        clip_by_global_norm([], 0.0)
