"""The report's schedules, at its own breakpoints and stretched to short runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.train.recipe import REPORT_TOKENS, Recipe, tokens_in

T = 10**12
V3 = Recipe()


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (T, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (12.15 * T, (2.2e-4 + 2.2e-5) / 2),  # the middle of the cosine
        (14.3 * T, 2.2e-5),
        (14.633 * T - 1, 2.2e-5),
        (14.633 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_at_the_reports_breakpoints(tokens: float, lr: float) -> None:
    assert V3.lr(100_000, tokens) == pytest.approx(lr, rel=1e-12)


def test_warm_up_takes_2000_steps() -> None:
    assert V3.lr(0, 0) == pytest.approx(2.2e-4 / 2000)
    assert V3.lr(999, 1) == pytest.approx(1.1e-4)
    assert V3.lr(1998, 1) < 2.2e-4 == V3.lr(1999, 1)


def test_the_pieces_add_up_to_the_run() -> None:
    assert 10 * T + 4.3 * T + 333e9 + 167e9 == REPORT_TOKENS
    assert V3.low_until == pytest.approx(REPORT_TOKENS - 167e9)


def test_batch_grows_from_3072_to_15360_over_469_billion_tokens() -> None:
    assert V3.batch(0) == 3072
    assert V3.batch(469e9 / 2) == (3072 + 15360) // 2
    assert V3.batch(469e9) == V3.batch(14e12) == 15360


def test_bias_speed_and_mtp_weight_change_when_the_report_says() -> None:
    assert V3.gamma(0) == V3.gamma(14.3 * T - 1) == 0.001
    assert V3.gamma(14.3 * T) == 0.0
    assert V3.mtp(0) == V3.mtp(10 * T - 1) == 0.3
    assert V3.mtp(10 * T) == 0.1


@given(st.integers(10_000, 10**9), st.floats(0, 1), st.integers(3000, 10**6))
def test_a_short_run_passes_the_same_stations(total: int, where: float, step: int) -> None:
    short = Recipe(total_tokens=total)
    # A station's two sides are told apart by one rounding, so look a hair beside it.
    if min(abs(where - b / REPORT_TOKENS) for b in (10e12, 14.3e12, 14.633e12, 469e9)) < 1e-9:
        return
    a, b = short.at(step, where * total), V3.at(step, where * REPORT_TOKENS)
    assert a.lr == pytest.approx(b.lr, rel=1e-6)
    assert (a.gamma, a.mtp_weight) == (b.gamma, b.mtp_weight)
    assert abs(a.sequences - b.sequences) <= 1


@given(st.integers(1, 3000), st.integers(1, 20), st.integers(1, 8), st.sampled_from([1, 2, 4, 8]))
def test_length_of_a_run_of_so_many_steps(steps: int, start: int, factor: int, multiple: int) -> None:
    start, end = start * multiple, start * factor * multiple
    total = tokens_in(steps, 16, start, end, multiple)
    recipe = Recipe(total_tokens=total, sequence_length=16, batch_start=start, batch_end=end, batch_multiple=multiple)
    seen, sizes = 0, []
    for _ in range(steps):
        sizes.append(recipe.batch(seen))
        seen += sizes[-1] * 16
    assert all(size % multiple == 0 for size in sizes)
    assert sizes == sorted(sizes)
    assert abs(seen - total) <= 16 * (end - start)  # two lengths may lead to each other, less than a step apart


def test_a_constant_batch_is_counted_exactly() -> None:
    assert tokens_in(10, 256, 8, 8) == pytest.approx(10 * 256 * 8)


def test_the_reports_run_takes_about_243_thousand_steps() -> None:
    ramp = 469e9 / 4096 * math.log(5) / (15360 - 3072)
    steps = ramp + (14.8e12 - 469e9) / 4096 / 15360
    assert tokens_in(round(steps), 4096, 3072, 15360) == pytest.approx(REPORT_TOKENS, rel=1e-5)
    assert 242_000 < steps < 244_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_start": 10, "batch_multiple": 4}, r"batch\.start \(10 sequences\) is not a multiple .* \(4\): use 8"),
        ({"batch_start": 20, "batch_end": 10}, "got 20 and 10"),
        ({"warmup_steps": -1}, "must not be negative, got -1"),
        ({"total_tokens": 0.0}, "needs tokens"),
    ],
)
def test_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tokens_in(0, 16, 1, 1)
