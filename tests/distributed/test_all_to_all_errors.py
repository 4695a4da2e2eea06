"""A peer that is gone, late, or of another opinion ends every rank with an error that says so. Nobody hangs."""

import multiprocessing as mp
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.parallel.transport import DelayedTransport, Transport
from dsv3_book.parallel.two_hop import TwoHop

pytestmark = pytest.mark.distributed


def disagree(two_hop: bool, odd: int, kind: str) -> tuple[str, list[str]]:
    """All ranks dispatch rows of width 8 in fp32 to 8 experts; one does otherwise."""
    size, other = dist.get_world_size(), dist.get_rank() == odd
    watch = DelayedTransport()
    E = 16 if other and kind == "E" else 8
    D = 12 if other and kind == "D" else 8
    dtype = torch.bfloat16 if other and kind == "dtype" else torch.float32
    options = {"fp8": other and kind == "fp8", "transport": watch}
    dispatch = TwoHop(make_mesh(ep=size, ranks_per_node=2), E, **options) if two_hop else AllToAll(None, E, **options)
    experts = torch.arange(3)[:, None] * 2 % 8
    try:
        dispatch.start(torch.ones(3, D, dtype=dtype), experts, torch.ones(3, 1)).wait()
    except ValueError as error:
        return str(error), [event.label.part for event in watch.events]
    return "no error", []


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("E", "number of experts is 8 on one and 16 on another"),
        ("D", "width D is 8 on one and 12 on another"),
        ("dtype", "dtype is torch.float32 on one and torch.bfloat16 on another"),
        ("fp8", "FP8 payload is False on one and True on another"),
    ],
)
def test_ranks_that_disagree_are_all_told(pool, kind, says):
    for message, parts in pool(2).run(disagree, False, 1, kind):
        assert message.startswith("the ranks of all-to-all 'dispatch F' don't agree: " + says)
        assert parts == ["counts"]  # before any row was sent
    for message, _ in pool(4).run(disagree, True, 2, kind):
        assert says in message


def late(limit_of_group: float | None, limit_of_wait: float | None) -> tuple[str, float]:
    """Rank 1 comes two seconds late."""
    mesh = make_mesh(ep=2, timeout=limit_of_group)
    dispatch = AllToAll(mesh.ep, 4, transport=Transport(limit_of_wait))
    start = time.perf_counter()
    if dist.get_rank() == 1:
        time.sleep(2)
    try:
        dispatch.name = "F3.0, layer 2"
        exchange = dispatch.plan(torch.zeros(1, 1, dtype=torch.int64))
        exchange.scatter(torch.ones(1, 4), torch.ones(1, 1)).wait()
    except RuntimeError as error:
        return str(error), time.perf_counter() - start
    return "no error", 0.0


@pytest.mark.parametrize("limits", [(0.5, None), (None, 0.5)])
def test_a_late_peer_is_not_waited_for_beyond_the_timeout(pool, limits):
    (message, seconds), _ = pool(2).run(late, *limits)
    assert message.startswith(
        "rank 0: all-to-all 'F3.0, layer 2 dispatch F, counts' with ranks [0, 1] did not finish: "
    )
    assert 0.4 < seconds < 1.8


def live_or_die(rank: int, store: str, out: str, dies_before: str, path: list[str]) -> None:
    """Rank 1 dies in the middle; the others write down what they see."""
    sys.path[:] = path
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=20), rank=rank, world_size=3)
    dispatch = AllToAll(None, 3)
    experts, x = torch.arange(3)[:, None], torch.ones(3, 4)
    handle = dispatch.start(x, experts, torch.ones(3, 1))
    handle.combine(handle.wait().tokens).wait()
    dist.barrier()
    start = time.perf_counter()
    try:
        if rank == 1 and dies_before == "counts":
            os._exit(1)
        exchange = dispatch.plan(experts)
        arrived = exchange.scatter(x, torch.ones(3, 1)).wait()
        if rank == 1:
            os._exit(1)
        exchange.gather(arrived[0], None).wait()
    except RuntimeError as error:
        Path(out, f"{rank}-{dies_before}").write_text(f"{time.perf_counter() - start:.3f} {error}")


@pytest.mark.parametrize("dies_before", ["counts", "gather"])
def test_a_dead_peer_ends_the_others(tmp_path, dies_before):
    context = mp.get_context("spawn")
    store = str(tmp_path / "store")
    processes = [
        context.Process(target=live_or_die, args=(rank, store, str(tmp_path), dies_before, sys.path))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "hangs"
    for rank in (0, 2):
        seconds, message = (tmp_path / f"{rank}-{dies_before}").read_text().split(" ", 1)
        what = "dispatch F, counts" if dies_before == "counts" else "combine F, rows"
        assert message.startswith(f"rank {rank}: all-to-all '{what}' with ranks [0, 1, 2] did not finish: ")
        assert float(seconds) < 20
