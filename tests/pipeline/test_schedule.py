"""Schedules as data: the released order, the rule of transfers, words to actions, errors that help."""

import pickle

import pytest
import released

from dsv3_book.pipeline.schedule import Action, Pair, Schedule, Transfer, make_schedule, spell


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_dualpipe_follows_the_released_order_action_for_action(num_ranks: int) -> None:
    for num_microbatches in [*range(2 * num_ranks, 2 * num_ranks + 8, 2), 5 * num_ranks, 8 * num_ranks]:
        schedule = make_schedule("dualpipe", num_ranks, num_microbatches)
        for rank in range(num_ranks):
            assert [str(a) for a in schedule.actions[rank]] == released.dualpipe(num_ranks, rank, num_microbatches)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_dualpipev_follows_the_released_order_action_for_action(num_ranks: int) -> None:
    for num_microbatches in [*range(2 * num_ranks, 2 * num_ranks + 4), 5 * num_ranks, 8 * num_ranks]:
        schedule = make_schedule("dualpipev", num_ranks, num_microbatches)
        assert schedule.num_stages == 2 * num_ranks
        for rank in range(num_ranks):
            assert [str(a) for a in schedule.actions[rank]] == released.dualpipev(num_ranks, rank, num_microbatches)
