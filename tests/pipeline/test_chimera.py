"""Chimera's figures, as its paper derives them (arXiv 2107.06925, §3): what DualPipe is compared with in the book."""

import pytest

from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_one_unit_has_p_minus_2_slots_of_bubble(P: int) -> None:
    """In slots of one forward or one backward, P − 2 are empty, on every rank; then P forwards and 2P − 2 backwards
    are on the critical path when a backward takes longer."""
    slots = simulate(make_schedule("chimera", P, P), Costs(1.0, 0.5, 0.5))
    assert slots.bubble == [P - 2] * P
    whole = simulate(make_schedule("chimera", P, P))  # F = 1, B = 2
    assert whole.makespan == P * 1 + (2 * P - 2) * 2


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_more_units_add_no_bubble_only_where_a_backward_takes_as_long_as_a_forward(P: int) -> None:
    for units in (1, 2, 4, 8):
        schedule = make_schedule("chimera", P, units * P)
        assert simulate(schedule, Costs(1.0, 0.5, 0.5)).bubble == [P - 2] * P
        F, B = 1, 2
        assert max(simulate(schedule).bubble) == (P - 2) * B + (units - 1) * (P - 2) * (B - F)


@pytest.mark.parametrize("P", range(2, 17, 2))
def test_activations_are_least_at_the_ends_and_dont_grow(P: int) -> None:
    for units in (1, 2, 3):
        peaks = simulate(make_schedule("chimera", P, units * P)).peak_activations
        assert peaks == [P // 2 + 1 + min(rank, P - 1 - rank) for rank in range(P)]
