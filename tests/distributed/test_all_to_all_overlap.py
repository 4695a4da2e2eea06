"""Journeys are under way while something else is done: proved by a link that is slow by a known time."""

import time

import pytest
import torch
import torch.distributed as dist

from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.parallel.transport import DelayedTransport, Event
from dsv3_book.parallel.two_hop import TwoHop

pytestmark = pytest.mark.distributed

DELAY = 0.15


def travel(two_hop: bool, work: float, asynchronous: bool) -> list[Event]:
    """Dispatch and combine, forward and backward, with `work` seconds between every start and wait."""
    slow = DelayedTransport(DELAY)
    options = {"asynchronous": asynchronous, "transport": slow}
    mesh = make_mesh(ep=dist.get_world_size(), ranks_per_node=1)
    dispatch = TwoHop(mesh, 4, **options) if two_hop else AllToAll(None, 4, **options)
    exchange = dispatch.plan(torch.tensor([[0, 3], [1, 2]]))
    for go, rows, gates in (
        (exchange.scatter, lambda: torch.ones(2, 3), torch.ones(2, 2)),
        (exchange.gather, lambda: torch.ones(int(exchange.counts.sum()), 3), None),
    ):
        journey = go(rows(), gates)
        time.sleep(work)
        journey.wait()
    return slow.events


def test_work_between_start_and_wait_hides_the_link(pool):
    for events in pool(2).run(travel, False, DELAY + 0.05, True):
        assert [str(event.label) for event in events] == [
            "dispatch F, counts",
            "dispatch F, slots",
            "dispatch F, rows",
            "combine F, rows",
        ]
        for event in events[1:]:
            assert event.wait_ended - event.issued >= DELAY  # it did take that long
            assert event.exposed < DELAY / 3  # but nobody stood still for it


@pytest.mark.parametrize(("work", "asynchronous"), [(0.0, True), (0.05, False)])
def test_without_work_or_in_step_nothing_is_hidden(pool, work, asynchronous):
    for events in pool(2).run(travel, False, work, asynchronous):
        waits = [event.exposed for event in events if event.label.part == "rows"]
        assert sum(waits) + events[1].exposed > 1.9 * DELAY


def test_the_first_of_two_hops_is_hidden_and_the_second_follows(pool):
    for events in pool(2).run(travel, True, DELAY + 0.05, True):
        rows = [event for event in events if event.label.part == "rows"]
        assert [str(event.label) for event in rows] == [
            "dispatch F, rows between nodes",
            "dispatch F, rows inside the node",
            "combine F, rows inside the node",
            "combine F, rows between nodes",
        ]
        assert rows[0].exposed < DELAY / 3 and rows[2].exposed < DELAY / 3
        assert rows[1].issued >= rows[0].wait_ended - 0.01 and rows[3].issued >= rows[2].wait_ended
