"""Table 2: formulas beside simulated schedules, where they are exact and where they only bound (claims C13, C14)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate
from dsv3_book.pipeline.table import METHODS, activations_formula, bubble_formula, formula_holds, table2


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("times", [2, 3])
def test_exact_where_f_is_i_and_w_is_not_longer(ranks, times):
    for row in table2(ranks, times * ranks):
        assert row.holds == "exact"
        assert row.bubble == row.bubble_formula, row
        assert row.activations == row.activations_formula, row
        assert row.parameters == (2 if "dual" in row.method else 1)


def test_report_numbers_at_sixteen_ranks():
    assert {row.method: (row.bubble, row.activations) for row in table2(16, 40)} == {
        "1f1b": (45, 16), "zb1p": (15, 16), "dualpipe": (14, 17), "dualpipev": (30, 33),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 10, 12, 14, 16])
def test_exact_from_two_to_eight_microbatches_a_rank(ranks):
    for times in range(2, 9):
        assert all(
            (row.bubble, row.activations) == (row.bubble_formula, row.activations_formula)
            for row in table2(ranks, times * ranks)
        )


def test_c14_neither_grows_with_microbatches():
    for method in METHODS:
        found = set()
        for microbatches in (16, 20, 64):
            timeline = simulate(make_schedule(method, 6, microbatches), Costs(3, 3, 2, 7))
            found.add((max(timeline.bubble), max(timeline.peak_activations)))
        assert len(found) == 1, (method, found)


@given(
    st.sampled_from(METHODS), st.sampled_from([2, 4, 6]), st.integers(0, 3),
    *(st.integers(1, 20) for _ in range(3)), st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=40)
def test_what_is_claimed_of_each_formula_holds(method, ranks, more, f, i, w, gained):
    """Any durations: whole numbers, so that "exact" can be meant; FB anywhere between B and F + B."""
    fb = i + w + round((1 - gained) * f)
    timeline = simulate(make_schedule(method, ranks, 2 * (ranks + more)), Costs(f, i, w, fb))
    formula, found = bubble_formula(method, ranks, f, i, w, fb), max(timeline.bubble)
    match formula_holds(method, ranks, f, i, w, fb):
        case "exact":
            assert found == formula
        case "upper bound":
            assert found <= formula
        case "lower bound":
            assert found >= formula
    assert max(timeline.peak_activations) == activations_formula(method, ranks)


@given(st.sampled_from(METHODS), st.integers(1, 20), st.integers(0, 20), st.floats(0, 1))
@settings(max_examples=60)
def test_exact_also_when_a_pair_gains(method, f, w, gained):
    """F = I and W ≤ I are enough: F&B may be shorter than F + B, as long as it is no shorter than B."""
    w = min(w, f)
    assert formula_holds(method, 6, f, f, w, f + w + round((1 - gained) * f)) == "exact"


@pytest.mark.parametrize(
    ("method", "f", "i", "w", "holds"),
    [
        ("1f1b", 9, 1, 5, "exact"),
        ("zb1p", 2, 3, 2, "exact"),
        ("zb1p", 2, 3, 3, "lower bound"),  # W > F: more weight work than fits
        ("dualpipe", 2, 3, 1, "upper bound"),
        ("dualpipe", 3, 2, 1, "lower bound"),
        ("dualpipev", 2, 3, 1, "upper bound"),
        ("dualpipev", 3, 2, 1, "lower bound"),
        ("dualpipe", 1, 1, 3, ""),  # W > I: nothing claimed
    ],
)
def test_both_regimes_are_really_apart(method, f, i, w, holds):
    [row] = [row for row in table2(6, 12, f, i, w) if row.method == method]
    assert row.holds == holds
    assert {
        "exact": row.bubble == row.bubble_formula, "upper bound": row.bubble < row.bubble_formula,
        "lower bound": row.bubble > row.bubble_formula, "": row.bubble != row.bubble_formula,
    }[holds], row  # fmt: skip


def test_two_ranks_of_dualpipe_and_one_of_the_others_have_no_bubble():
    assert max(simulate(make_schedule("dualpipe", 2, 6), Costs(5, 2, 4)).bubble) == 0
    for method in ("1f1b", "zb1p", "dualpipev"):
        assert simulate(make_schedule(method, 1, 6), Costs(5, 2, 4)).bubble == [0]


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'chimera'"):
        bubble_formula("chimera", 4, 1, 1, 1, 3)
