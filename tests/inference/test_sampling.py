"""Which tokens may be drawn, and how often they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.inference.sampling import probabilities, sample

LOGITS = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))


def test_plain_softmax() -> None:
    torch.testing.assert_close(probabilities(LOGITS), LOGITS.exp())


def test_temperature_sharpens() -> None:
    squared = LOGITS.exp() ** 2
    torch.testing.assert_close(probabilities(LOGITS, temperature=0.5), squared / squared.sum())
    assert torch.equal(probabilities(LOGITS, temperature=0), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert sample(LOGITS, temperature=0).tolist() == [1]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.75, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    p = probabilities(LOGITS.double().float(), top_p=top_p - 1e-6 if top_p < 1 else top_p)
    assert p[0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(p[0, kept], LOGITS.exp()[0, kept] / LOGITS.exp()[0, kept].sum())


def test_top_k_and_top_p_together() -> None:
    p = probabilities(LOGITS, top_k=2, top_p=0.9)  # of the two likeliest, renormalised: 2/3 and 1/3
    torch.testing.assert_close(p, torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))
    only = probabilities(LOGITS, top_k=2, top_p=0.6)  # p is a share of what top_k left: 2/3 alone reaches it
    assert torch.equal(only, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@given(st.integers(0, 2**31), st.floats(0.01, 1), st.integers(1, 20), st.floats(0.1, 3))
def test_always_a_distribution(seed: int, top_p: float, top_k: int, temperature: float) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) * 5
    p = probabilities(logits, temperature, top_k, top_p)
    assert (p >= 0).all() and ((p > 0).sum(-1) <= top_k).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(3))
    assert torch.equal(p.argmax(-1), logits.argmax(-1))


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    rows = LOGITS.expand(20_000, 4)
    first, again = (sample(rows, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.bincount(minlength=4) / 20_000, LOGITS.exp()[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, got -1"),
        ({"top_p": 0.0}, "got 0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(LOGITS, **settings)
