"""Every schedule, on real processes, against one process that runs the same micro-batches one after the other."""

import os
import re
import time
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelinekit import LAMBDA, alone, batches, config, pipelined

from dsv3_book.parallel.workers import Pool
from dsv3_book.pipeline.executor import Pipeline, PipelineError
from dsv3_book.pipeline.schedule import SCHEDULES, Schedule, make_schedule
from dsv3_book.pipeline.simulate import simulate

pytestmark = pytest.mark.distributed

ONE_WAY = ("1f1b", "zb1p", "dualpipev")  # each weight's micro-batches come in the same order as in one process
USED_TWICE = ("embed_tokens.weight", "lm_head.weight")  # by one micro-batch, if there is an MTP module


@cache
def reference(layers: int, depths: int, count: int, **settings: Any) -> Any:
    return alone(config(layers, depths), count, **settings)


def assert_equal_to_one_process(answers: list[dict[str, Any]], layers: int, depths: int, count: int) -> set[str]:
    """Losses and all gradients to 1e-6 of their norm, loads exactly; returns the names whose bits differ anywhere."""
    losses, gradients = reference(layers, depths, count)
    seen, differ = {}, set()
    for answer in answers:
        for expected, got in zip(losses[:3], answer["losses"][:3], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(answer["losses"].load, losses.load)
        for name, got in answer["gradients"].items():
            held = answer["experts"]
            expected = gradients[name]
            if held is not None and expected.dim() == 3:
                expected = expected[held.start : held.stop]
            assert (got - expected).norm() <= 1e-6 * expected.norm(), name
            seen[name] = seen.get(name, 0) + 1
            if not torch.equal(got, expected):
                differ.add(name)
        assert answer["left"] == 0
    assert seen.keys() == gradients.keys()
    return differ


@pytest.mark.parametrize(
    ("pp", "name", "depths"),
    [
        *((1, name, 1) for name in ONE_WAY),
        *((2, name, depths) for name in SCHEDULES for depths in (0, 2)),
        *((4, name, 1) for name in SCHEDULES),
    ],
)
def test_a_schedule_gives_the_gradients_of_one_process(pool, pp: int, name: str, depths: int) -> None:
    """Bit for bit in a one-way pipeline, but for what a micro-batch uses twice; and what autograd keeps at most, as
    counted by hooks on all it saves, is what the simulator says."""
    M = 2 * pp
    answers = pool(pp).run(pipelined, config(8, depths), name, pp, M)
    differ = assert_equal_to_one_process(answers, 8, depths, M)
    if name in ONE_WAY:
        assert differ <= (set(USED_TWICE) if depths else set())
    assert [answer["peak"] for answer in answers] == simulate(make_schedule(name, pp, M)).peak_activations


def test_recomputation_changes_nothing(pool) -> None:
    answers = pool(2).run(pipelined, config(8, 1), "dualpipev", 2, 4, recompute=True)
    assert assert_equal_to_one_process(answers, 8, 1, 4) <= set(USED_TWICE)


@pytest.mark.parametrize(
    ("name", "pp", "dp", "ep"),
    [("dualpipe", 2, 2, 1), ("dualpipev", 2, 2, 2), ("1f1b", 1, 4, 2), ("zb1p", 2, 2, 2), ("chimera", 2, 2, 2)],
)
def test_pipelines_beside_each_other_sharing_experts(pool, name: str, pp: int, dp: int, ep: int) -> None:
    answers = pool(pp * dp).run(pipelined, config(4, 1), name, pp, 4, dp, ep)
    assert_equal_to_one_process(answers, 4, 1, 4 * dp)


@pytest.mark.slow
def test_eight_processes(pool) -> None:
    """DualPipe on 2 stages' mirrored pairs × 4 data-parallel × 2 expert-parallel ranks."""
    answers = pool(8).run(pipelined, config(4, 1), "dualpipe", 2, 4, 4, 2, timeout=240)
    assert_equal_to_one_process(answers, 4, 1, 16)


def test_fp8_layers_in_a_pipeline(pool) -> None:
    """Quantised as in one process, Wgrad put off: the same bits."""
    _, gradients = alone(config(4, 1), 4, fp8=True)
    for answer in pool(2).run(pipelined, config(4, 1), "zb1p", 2, 4, fp8=True):
        for name, got in answer["gradients"].items():
            assert torch.equal(got, gradients[name]) or name in USED_TWICE, name


def test_stages_of_different_depth(pool) -> None:
    """Five layers, MTP and both ends over four stages: the last has no layer of its own."""
    layers = [range(2), range(2, 3), range(3, 5), range(5, 5)]
    answers = pool(4).run(pipelined, config(5, 1), "dualpipe", 4, 8, layers=layers)
    assert_equal_to_one_process(answers, 5, 1, 8)


def own(text: str, cfg: Any, M: int) -> dict[str, torch.Tensor]:
    pipeline = Pipeline(cfg, Schedule.from_text(text), seed=5)
    pipeline.step(batches(cfg, M), LAMBDA)
    return {n: p.grad for n, p in pipeline.parameters_by_name().items() if p.grad is not None}


def test_a_readers_own_schedule_runs(pool) -> None:
    """All forwards, then all backwards, rank 1 with its weight gradients in the other order: nobody's schedule."""
    text = "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2\nF1.0 F1.1 F1.2 I1.0 I1.1 W1.1 I1.2 W1.2 W1.0"
    _, gradients = alone(config(2, 0), 3)
    for rank in pool(2).run(own, text, config(2, 0), 3):
        for name, got in rank.items():
            assert (got - gradients[name]).norm() <= 1e-6 * gradients[name].norm(), name


# What goes wrong -----------------------------------------------------------------------------------------------------
def refused(change: str) -> str:
    """What this rank says when rank 1 is different, or gone, or asleep."""
    cfg, odd = config(2, 0), dist.get_rank() == 1
    schedule = make_schedule("1f1b", 2, 4)
    pipeline = Pipeline(cfg, schedule, seed=5, timeout=timedelta(seconds=3 if change == "late" else 60))
    tokens = batches(cfg, 4)
    if odd and change == "shape":
        tokens = [t[:, :-1] for t in tokens]
    if odd and change == "count":
        tokens.pop()
    if odd and change == "token":
        tokens[2] = tokens[2] + cfg.vocab_size
    if odd and change in ("dead", "late"):
        forward = pipeline._forward

        def failing(action: Any, paired: bool = False) -> Any:
            if action.microbatch == 2:
                if change == "dead":
                    os._exit(3)
                time.sleep(8)
            return forward(action)

        pipeline._forward = failing  # type: ignore[method-assign]
    try:
        pipeline.step(tokens)
    except (PipelineError, ValueError) as error:
        message = str(error)
    else:
        return "nothing"
    if change in ("late", "dead"):
        with pytest.raises(PipelineError, match="an earlier step was broken off"):
            pipeline.step(tokens)
    else:
        assert pipeline.step(batches(cfg, 4)).main > 0  # nothing had begun
    return message


def test_ranks_that_disagree_are_told_before_anything_is_computed(pool) -> None:
    for rank, message in enumerate(pool(2).run(refused, "shape")):
        assert message.startswith(f"rank {rank}, before its first action")
        assert "micro-batch shape ([2, 9], [2, 8])" in message


def test_one_ranks_mistake_ends_all_before_anything_is_computed(pool) -> None:
    for change, why in {"count": "wants 4 micro-batches of one shape, got 3", "token": "a token is 1"}.items():
        other, odd = pool(2).run(refused, change)
        assert odd.startswith(why) or why in odd
        assert other.startswith("rank 0, before its first action: rank 1 can't begin: ") and why in other


def twice(name: str, depths: int) -> float:
    """How far the gradients after two equal steps are from twice those after one."""
    cfg = config(4, depths)
    pipeline = Pipeline(cfg, make_schedule(name, 2, 4), seed=5)
    pipeline.step(batches(cfg, 4), LAMBDA)
    once = {n: p.grad.clone() for n, p in pipeline.parameters_by_name().items() if p.grad is not None}
    pipeline.step(batches(cfg, 4), LAMBDA)
    found = pipeline.parameters_by_name()
    return max(((found[n].grad / 2 - g).norm() / g.norm()).item() for n, g in once.items())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["dualpipe", "1f1b"])
def test_gradients_of_two_steps_add_up(pool, name: str) -> None:
    """Copies too: mirrored stages', and the embedding's that MTP reads."""
    assert max(pool(2).run(twice, name, 1)) < 1e-6


def without_layers(name: str) -> float:
    cfg = config(1, 0)
    return Pipeline(cfg, make_schedule(name, 4, 8), seed=5).step(batches(cfg, 8)).main.item()


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_stages_and_ranks_without_a_layer(pool, name: str) -> None:
    losses, _ = alone(config(1, 0), 8)
    assert pool(4).run(without_layers, name) == pytest.approx([losses.main.item()] * 4, rel=1e-6)


def test_a_late_peer_is_given_up_on_within_the_timeout() -> None:
    with Pool(2) as own:  # what is given up on leaves the processes' group broken for whoever comes next
        began = time.monotonic()
        message, _ = own.run(refused, "late")
    assert time.monotonic() - began < 60
    assert "rank 0, at backward of stage 0, micro-batch 2" in message
    assert "the input gradient of stage 1, micro-batch 2, did not come from rank 1" in message


def told(queue: Any, rank: int, store: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    queue.put((rank, refused("dead")))


def test_a_dead_peer_ends_the_other_with_its_place(tmp_path: Any) -> None:
    """Outside the pool, which would end both as soon as one dies."""
    import multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=told, args=(queue, rank, str(tmp_path / "store"))) for rank in range(2)]
    for process in processes:
        process.start()
    rank, message = queue.get(timeout=200)
    for process in processes:
        process.join(20)
    assert rank == 0
    assert processes[1].exitcode == 3
    # Whether it still waits for the dead or already has something to send to it is a matter of moments.
    assert re.match(r"rank 0, at (for|back)ward of stage 0, micro-batch [12]: the (out|in)put", message), message
    assert "rank 1" in message


def test_wrong_arguments_are_refused() -> None:
    schedule = make_schedule("1f1b", 1, 2)
    with pytest.raises(ValueError, match="must be 1 ranges, one a stage"):
        Pipeline(config(4, 0), schedule, layers=[range(3)])
    pipeline = Pipeline(config(2, 0), schedule)
    tokens = batches(config(2, 0), 2)
    for bad, of, message in (
        (batches(config(2, 0), 3), None, "wants 2 micro-batches of one shape, got 3"),
        ([t[:, :1] for t in tokens], None, "a width of at least 2"),
        ([t[:0] for t in tokens], None, "B at least 1"),
        ([t - 64 for t in tokens], None, "vocabulary goes from 0 to 63"),
        (tokens, 0, "of = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.step(bad, of=of)
