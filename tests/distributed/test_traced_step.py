"""A real step's trace: what nests, which rank did what, and the schedule's pairs in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pipelinekit import LAMBDA, batches, config
from tracekit import inside, slices
from trainkit import small

from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.parallel.transport import DelayedTransport
from dsv3_book.pipeline.executor import Pipeline, Watch
from dsv3_book.pipeline.schedule import Schedule, make_schedule
from dsv3_book.train import profile
from dsv3_book.train.config import Batch, Every, Parallel, TrainConfig
from dsv3_book.train.profile import write_profile
from dsv3_book.train.trainer import Trainer

pytestmark = pytest.mark.distributed


def dualpipe_step(path: Path) -> Schedule:
    """A watched step of DualPipe on two ranks, whose clocks are made to disagree by 100 s; its trace goes to `path`."""
    cfg, mesh = config(), make_mesh(2)
    rank = dist.get_rank()
    pipeline = Pipeline(cfg, make_schedule("dualpipe", 2, 6), mesh.pp, seed=5)
    watch, offset = Watch(), profile.clock_offset
    pipeline.step(batches(cfg, 6), LAMBDA, watch=watch)
    watch.events = [e._replace(start=e.start + 100 * rank, end=e.end + 100 * rank) for e in watch.events]
    profile.clock_offset = lambda: offset() - 100 * rank
    try:
        write_profile(path, f"pp {rank}", pipeline.schedule.actions[rank], watch)
    finally:
        profile.clock_offset = offset
    return pipeline.schedule


def test_the_pairs_of_a_dualpipe_step_are_in_it_as_in_the_schedule(pool, tmp_path) -> None:
    path = tmp_path / "new" / "trace.json"
    schedule = pool(2).run(dualpipe_step, path)[0]
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]
    trace = json.loads(path.read_text())
    ranks = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert ranks == {0: "rank 0 (pp 0)", 1: "rank 1 (pp 1)"}
    found = slices(trace)
    for rank in (0, 1):
        mine = [event for event in found if event["pid"] == rank and event["tid"] == 0]
        actions = [event for event in mine if " " not in event["name"]]
        assert [event["name"] for event in actions] == [str(action) for action in schedule.actions[rank]]
        assert any(event["cat"] == "FB" for event in actions) and any(event["cat"] == "W" for event in actions)
        parts = [event for event in mine if " " in event["name"]]
        assert {event["cat"] for event in parts} == {"F", "B", "W"}
        for action in actions:
            names = [event["name"].split()[0] for event in parts if inside(event, action) and event["dur"]]
            assert set(names) <= set(action["name"].replace("I", "B").split("+")) and names
        pairs = [a for a in actions if a["cat"] == "FB"]
        for part in parts:
            assert part["args"]["paired"] == any(part["name"].split()[0] in a["name"] for a in pairs)
        pair = [e["name"].split(maxsplit=1) for e in parts if inside(e, pairs[0])]
        sides = [name[0] for name, _ in pair]
        assert "FB" in "".join(sides) and "BF" in "".join(sides)  # the two take turns
    # Both ranks are on one machine: with the clocks brought together again, what one sends the other has not yet had.
    first = {rank: min(e["ts"] for e in found if e["pid"] == rank) for rank in (0, 1)}
    last = max(e["ts"] + e["dur"] for e in found)
    assert min(first.values()) == 0 and max(first.values()) < last < 99e6
    ends = {(e["pid"], e["name"]): e["ts"] + e["dur"] for e in found if e["tid"] == 0}
    starts = {(e["pid"], e["name"]): e["ts"] for e in found if e["tid"] == 0}
    assert starts[1, "F1.0"] >= ends[0, "F0.0"] - 1000 and starts[0, "F1.3"] >= ends[1, "F0.3"] - 1000


def exchanging_step(path: Path) -> None:
    """As `dualpipev` on one rank does, with experts on both ranks: pairs, and messages between them."""
    cfg, size, rank = config(4, 0, first_k_dense_replace=0), dist.get_world_size(), dist.get_rank()
    transport = DelayedTransport(delay=0.002)
    each = cfg.n_routed_experts // size
    dispatch = AllToAll(None, cfg.n_routed_experts, transport=transport)
    schedule = make_schedule("dualpipev", 1, 4)
    pipeline = Pipeline(cfg, schedule, seed=5, dispatch=dispatch, experts=range(rank * each, (rank + 1) * each))
    watch = Watch()
    pipeline.step(batches(cfg, 4), watch=watch)
    write_profile(path, "", schedule.actions[0], watch, transport.events)


def test_what_travels_has_threads_of_its_own(pool, tmp_path) -> None:
    pool(2).run(exchanging_step, tmp_path / "trace.json")
    found = slices(json.loads((tmp_path / "trace.json").read_text()))
    for rank in (0, 1):
        mine = [event for event in found if event["pid"] == rank]
        messages = [event for event in mine if event["cat"] == "all-to-all"]
        rows = [m for m in messages if m["name"].endswith(", rows")]
        assert {m["name"] for m in rows} == {
            f"{what} {kind}, rows" for what in ("dispatch", "combine") for kind in "FB"
        }
        assert all(m["dur"] >= 1999 and m["args"]["bytes"] > 0 for m in rows)
        assert any(m["args"]["waited_for_us"] > 0 for m in rows)
        waits = [event for event in mine if event["cat"] == "wait"]
        assert waits and all(any(inside(w, m) and w["tid"] == m["tid"] for m in messages) for w in waits)
        hidden = [(m, p) for m in rows for p in mine if p["tid"] == 0 and p["args"].get("paired") and inside(p, m)]
        assert hidden  # some part of a pair was done while a message travelled


def run(config: TrainConfig) -> None:
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    trainer.run()
    trainer.close()


def test_a_validation_before_the_step_is_not_in_its_trace(pool, tmp_path, corpus) -> None:
    """Its forwards have all-to-alls, too."""
    counts = []
    for validation in (100, 1):
        out = tmp_path / str(validation)
        every = Every(checkpoint=100, validation=validation, validation_windows=4)
        base: dict[str, Any] = {"batch": Batch(16, 8, 8, 8, 2), "steps": 2, "profile": 2, "every": every}
        pool(2).run(run, small(out, corpus, parallel=Parallel(ep=2), **base))
        found = slices(json.loads((out / "profile" / "step-2.json").read_text()))
        counts.append(sum(event["cat"] == "all-to-all" for event in found))
    assert counts[0] == counts[1] > 0
