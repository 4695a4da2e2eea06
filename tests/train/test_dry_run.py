"""The dry run's numbers: against closed forms, the simulator, a real routing, the report's figures, and each other."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dsv3_book import costs
from dsv3_book.config import ModelConfig
from dsv3_book.costs_activations import Numbers
from dsv3_book.costs_memory import ema_bytes, layout_bytes, rank_params
from dsv3_book.model import Transformer
from dsv3_book.model.router import select
from dsv3_book.parallel.mesh import Layout
from dsv3_book.parallel.traffic import traffic_of
from dsv3_book.pipeline.cluster import PROFILED, Setting, simulate_step, stage_layers
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.pipeline.simulate import simulate
from dsv3_book.train.config import Batch, Parallel, Swap, TrainConfig
from dsv3_book.train.dry_run import dry_run, text
from dsv3_book.train.plan import GPU_MEMORY, Plan, make_job, plan_run
from dsv3_book.train.plan_links import layer_bytes, links
from dsv3_book.train.plan_memory import PlannedJob, count_weights, memory, peak_activations, unique
from dsv3_book.train.plan_time import UNEVEN, Batches, even, possible
from dsv3_book.train.presets import preset

V3 = preset("v3-671b")
V16 = preset("v3-16b", parallel=Parallel(pp=4, ep=8, schedule="1f1b"))


@pytest.fixture(scope="module")
def v3() -> Plan:
    return plan_run(V3, 2048)


def job_of(config: TrainConfig, world: int, schedule: str | None = None) -> tuple[PlannedJob, Layout]:
    if schedule:
        config = replace(config, parallel=replace(config.parallel, schedule=schedule))
    full = replace(config, batch=replace(config.batch, start=config.batch.end))
    layout = full.layout(world, 8)
    return make_job(config, layout, config.batch.end // (config.batch.micro * layout.dp)), layout


# Placement and parameters --------------------------------------------------------------------------------------------
def test_v3_has_the_reports_parameters(v3: Plan) -> None:
    assert v3.parameters == v3.expected == 671_026_404_352 + 11_610_067_968
    assert (v3.pp, v3.dp, v3.ep, v3.nodes, v3.micro_batches) == (16, 128, 64, 8, 120)
    assert [i for stage in v3.stages for i in stage.layers] == list(range(61))
    assert [stage.ranks for stage in v3.stages] == [(min(s, 15 - s), max(s, 15 - s)) for s in range(16)]
    first, last = v3.stages[0], v3.stages[-1]
    assert (first.embedding, first.dense, first.head) == (True, (0, 1, 2), False)
    assert (last.embedding, last.head, last.mtp) == (True, True, (61,))
    assert not any(stage.embedding or stage.head or stage.mtp or stage.dense for stage in v3.stages[1:-1])


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"])
def test_counted_modules_are_the_closed_forms(name: str) -> None:
    """Each rank's, and together the model's: every copy is counted, and accounts for what is over."""
    job, _ = job_of(replace(V16, batch=Batch(multiple=3072)), 32, name)
    held = count_weights(job)
    cfg, last = job.cfg, len(job.placed) - 1
    for rank, mine in enumerate(held):
        stages = job.schedule.stages(rank)
        expected = sum(sum(rank_params(cfg, job.placed[s], job.ep, head=s == last)) for s in stages)
        expected += costs.embedding_params(cfg) * bool({0, last} & set(stages))
        assert sum(weight.numbers for weight in mine.values()) == expected
    assert unique(held, job.ep) == costs.count(cfg).main + costs.count(cfg).mtp


def test_modules_are_those_that_a_pipeline_builds() -> None:
    """Names and sizes, where one process holds one stage, and where it holds two that share the embedding."""
    cfg = ModelConfig.preset("tiny")
    for name, M in (("1f1b", 2), ("dualpipev", 2)):
        schedule = make_schedule(name, 1, M)
        pipeline = Pipeline(cfg, schedule, device="meta")
        job = PlannedJob(cfg, schedule, pipeline.layers, 1, 1, 1, Setting(), Numbers(), "fp32", True, False, 32)
        (held,) = count_weights(job)
        assert {n: w.numbers for n, w in held.items()} == {
            n: p.numel() for n, p in pipeline.parameters_by_name().items()
        }
        assert sum(w.numbers for w in held.values() if w.expert) == 4 * 8 * costs.expert_params(cfg)


# Memory --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_state_is_as_layout_bytes_says(name: str) -> None:
    job, _ = job_of(V3, 2048, name)
    held = count_weights(job)
    stages = [job.schedule.stages(rank) for rank in range(16)]
    for weights in ("fp32", "bf16"):
        expected = layout_bytes(job.cfg, job.placed, stages, 128, 64, weights, "bf16")
        found = memory(replace(job, numbers=Numbers(weights=weights)), held)
        for one, other in zip(found, expected, strict=True):
            assert one.weights == other.weights and one.gradients == other.gradients
            assert one.master == pytest.approx(other.master, abs=64) and one.state == pytest.approx(other.total, abs=64)


def test_averages_are_one_for_every_weight(v3: Plan) -> None:
    """On all GPUs together; none of them without an average, all of it on one without ZeRO."""
    config = replace(V3, optim=replace(V3.optim, ema=0.999))
    job, _ = job_of(config, 2048)
    held = count_weights(job)
    assert sum(m.cpu for m in memory(job, held)) * 128 == pytest.approx(8 * v3.parameters, rel=1e-6)
    assert not any(m.cpu for m in memory(replace(job, ema=False), held))
    whole = memory(replace(job, zero=False), held)
    assert whole[7].cpu == ema_bytes(whole[7].parameters, 0, 1, 1) and whole[7].moments == 4 * whole[7].parameters


def test_fp8_copies_are_of_what_is_multiplied_in_fp8(v3: Plan) -> None:
    """All but embedding, head, eh_proj, routers and norms, twice: as they are, and transposed."""
    cfg = V3.model
    apart = 2 * costs.embedding_params(cfg) + 2 * cfg.hidden_size**2  # embedding, head and eh_proj
    routers = sum(cfg.is_moe_layer(i) for i in (*range(4), 60, 61)) * cfg.n_routed_experts * cfg.hidden_size
    rest = v3.memory[0].parameters - apart - routers
    assert v3.memory[0].fp8_copies / 2 == pytest.approx(rest, rel=1e-4)
    job, _ = job_of(V16, 32)
    assert memory(job, count_weights(job))[0].fp8_copies == 0


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"])
def test_peaks_are_the_simulators(name: str) -> None:
    schedule = make_schedule(name, 4, 12)
    ones = [1.0] * schedule.num_stages
    found = [peak_activations(actions, ones, [0.0] * schedule.num_stages) for actions in schedule.actions]
    assert [most for _, most in found] == simulate(schedule).peak_activations
    assert all(peak == most for peak, most in found)


def test_what_waits_for_its_w_is_counted() -> None:
    """ZB1P puts W off: what it needs lives on after the I. By hand: F F I W, then only W's bytes."""
    actions = make_schedule("zb1p", 1, 2).actions[0]
    kinds = [part.kind for action in actions for part in action.parts]
    assert kinds.index("W") > kinds.index("I")
    light, _ = peak_activations(actions, [1.0], [0.0])
    heavy, _ = peak_activations(actions, [1.0], [5.0])
    assert heavy >= 5.0 > light


def test_v3_does_not_fit_and_why(v3: Plan) -> None:
    assert [m.micro_batches for m in v3.memory] == [17] * 16
    assert not v3.fits and v3.worst.rank in (0, 15)
    assert v3.worst.total == pytest.approx(99.8e9, rel=0.01)
    assert v3.memory[1].total == pytest.approx(92.1e9, rel=0.01)
    assert 75e9 < max(m.total for m in v3.changed) < GPU_MEMORY  # what the report does would do
    saved = {change.what: change.saves for change in v3.changes}
    assert saved["attention's output"] == pytest.approx(17 * 4 * 4096 * 128 * (128 * 2 + 4))
    assert len(saved) == 3
    job, _ = job_of(V3, 2048)
    held = count_weights(job)
    fullest = [max(m.total for m in memory(replace(job, tokens=v3.longest + more), held)) for more in (0, 128)]
    assert fullest[0] <= GPU_MEMORY < fullest[1]


def test_memory_follows_its_causes() -> None:
    job, _ = job_of(V3, 2048)
    held = count_weights(job)
    base = memory(job, held)[7]
    for changes in ({"recompute": False}, {"fp8": False}):
        assert memory(replace(job, numbers=replace(job.numbers, **changes)), held)[7].activations > base.activations
    half = memory(replace(job, tokens=2048), held)[7]
    assert half.activations == pytest.approx(base.activations / 2, rel=1e-3) and half.rooms == base.rooms / 2
    assert memory(replace(job, dp=256), held)[7].moments == pytest.approx(base.moments / 2, rel=1e-6)


# Links ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("direct", [False, True])
def test_dispatched_bytes_are_those_of_a_real_routing(direct: bool) -> None:
    """V3's router on random scores: what `AllToAll` and `TwoHop` would count, for one layer and micro-batch. The mean
    number of copies supposes that the experts of a node are two of its 32 (they are so on the average)."""
    config = replace(V3, parallel=replace(V3.parallel, dispatch="direct" if direct else "auto"))
    job, _ = job_of(config, 2048)
    N = 64 * 64
    scores = torch.rand(N, 256, generator=torch.Generator().manual_seed(0))
    experts = select(scores, torch.zeros(256), 8, 4, 8)
    sent = {"ib": 0.0, "nvlink": 0.0}
    for backward in (False, True):
        traffic = traffic_of(experts, 256, 64, 8, width=7168, two_hop=not direct, fp8=True, backward=backward)
        for name in sent:
            sent[name] += sum(traffic[way][name].payload for way in ("scatter", "gather")) / N * 4096
    found = layer_bytes(job)
    for name in sent:
        assert found[name] == pytest.approx(sent[name], rel=0.05)


def test_a_steps_bytes_by_hand() -> None:
    job, layout = job_of(V3, 2048)
    held = count_weights(job)
    found = links(job, layout, held)
    by_layer = layer_bytes(job)
    assert by_layer["ib"] == 2 * 4096 * 3.5 * (7168 + 4 * 56 + 2 * 7168)
    # Each direction's 60 micro-batches at each of two stages: 8 MoE layers in all; in stages 0 and 15 three.
    assert found[7].ib.dispatch == 60 * 8 * by_layer["ib"] and found[0].ib.dispatch == 60 * 3 * by_layer["ib"]
    message = 4096 * 7168 * 2
    assert found[7].ib.stages == 2 * 120 * message and found[0].ib.stages == 120 * message
    assert found[7].nvlink.stages == 0  # pipeline ranks are on nodes of their own
    # Others: 256 GPUs on 32 nodes; experts: the same on 2 of 128 in either pipeline rank, each on a node of its own.
    others, experts = (sum(w.numbers for w in held[7].values() if w.expert is kind) for kind in (False, True))
    assert found[7].nvlink.state == pytest.approx(8 * others * 7 / 8)
    assert found[7].ib.state == pytest.approx(8 * others / 8 * 31 / 32 + 8 * experts * 3 / 4)


def test_nothing_travels_where_there_is_nobody_else() -> None:
    plan = plan_run(preset("tiny"), 1)
    assert plan.links[0].ib.total == plan.links[0].nvlink.total == 0
    assert plan.memory[0].weights == 4 * sum(p.numel() for p in Transformer(ModelConfig.preset("tiny")).parameters())
    assert plan.memory[0].rooms == plan.memory[0].messages == plan.memory[0].buckets == 0
    two = plan_run(preset("tiny", parallel=Parallel(pp=2)), 2)
    assert two.links[0].nvlink.stages == 8 * 64 * 64 * 4 and two.links[0].ib.total == 0  # 8 messages of 2 · 32 tokens


# Time ----------------------------------------------------------------------------------------------------------------
def test_a_step_is_the_simulators(v3: Plan) -> None:
    step = simulate_step(V3.model)
    profiled = v3.speeds[0]
    assert profiled.machine == PROFILED.name
    assert profiled.pipeline_seconds == pytest.approx(step.timeline.makespan / 1e3)
    assert profiled.idle_share == pytest.approx(step.idle_share)
    assert 15360 * 4096 / profiled.step_seconds / 2048 == pytest.approx(profiled.tokens_per_second_per_gpu)
    assert 0.2 < profiled.end_seconds < 1


def test_the_figures_beside_the_report(v3: Plan) -> None:
    profiled, alone, peak = v3.speeds
    assert profiled.hours_per_trillion == pytest.approx(199.8e3, rel=0.005)
    assert alone.hours_per_trillion == pytest.approx(151.8e3, rel=0.005)
    assert peak.hours_per_trillion < alone.hours_per_trillion < costs.REPORT_HOURS_PER_TRILLION
    assert profiled.days == pytest.approx(60.2, abs=0.2)
    assert profiled.dollars == pytest.approx(2 * profiled.gpu_hours)
    assert profiled.gpu_hours == pytest.approx(profiled.days * 24 * 2048)
    assert v3.tokens == pytest.approx(14.8e12, rel=1e-4)
    assert sum(term.hours for term in v3.terms) == pytest.approx(profiled.hours_per_trillion)
    assert all(term.hours > 0 for term in v3.terms)
    uneven = next(term.hours for term in v3.terms if term.name == UNEVEN)
    assert profiled.hours_per_trillion - uneven == pytest.approx(174.4e3, rel=0.005)


def test_between_its_ends_a_steps_length_is_a_straight_line() -> None:
    seconds = {M: simulate_step(V3.model, microbatches=M).timeline.makespan for M in (32, 78, 120)}
    line = seconds[32] + (seconds[120] - seconds[32]) * (78 - 32) / (120 - 32)
    assert seconds[78] == pytest.approx(line, rel=0.005)


def test_even_stages_have_the_same_to_do() -> None:
    stages = stage_layers(V3.model, 16, PROFILED)
    alike = even(stages)
    assert {len(stage) for stage in alike} == {4} and len({str(stage) for stage in alike}) == 1

    def total(of: list, part: str) -> float:
        return sum(layer.get(part, 0.0) for stage in of for layer in stage)

    for part in ("attention(F)", "mlp(W)", "dispatch(F)", "combine(F)"):
        assert total(alike, part) == pytest.approx(total(stages, part))


def test_the_batch_grows_and_every_step_is_counted() -> None:
    batches = Batches.of(V3.recipe(), V3.steps, 128)
    sizes, micro, steps = zip(*batches.levels, strict=True)
    assert sizes == tuple(range(3072, 15361, 768)) and micro == tuple(size // 128 for size in sizes)
    assert sum(steps) == V3.steps
    recipe, seen = V3.recipe(), 0
    for _ in range(steps[0]):
        assert recipe.batch(seen) == 3072
        seen += 3072 * 4096
    assert recipe.batch(seen) == 3840
    assert Batches.of(V3.recipe(), 10, 128).levels[0] == (3072, 24, 10)


def test_more_gpus_are_faster_and_dearer() -> None:
    """The same batch over twice as many pipelines: fewer micro-batches each, so more of the step is filling."""
    small = replace(preset("laptop"), batch=Batch(256, 256, 256, 256, 1), parallel=Parallel(pp=2, ep=2))
    plans = [plan_run(small, world) for world in (4, 8, 16)]
    for one, two in pairwise(plans):
        assert two.speeds[0].days < one.speeds[0].days
        assert two.speeds[0].gpu_hours > one.speeds[0].gpu_hours
        assert two.speeds[0].tokens_per_second_per_gpu < one.speeds[0].tokens_per_second_per_gpu
        assert two.worst.moments < one.worst.moments


# What doesn't fit ----------------------------------------------------------------------------------------------------
def test_a_batch_that_begins_too_small_is_a_problem_not_an_error() -> None:
    tiny = preset("tiny", parallel=Parallel(pp=4), steps=5)  # begins with 4 micro-batches, ends with 8
    (problem,) = plan_run(tiny, 4).problems
    assert "a step of 8 sequences" in problem and "take 8" in problem
    assert not plan_run(replace(tiny, batch=replace(tiny.batch, start=16)), 4).problems
    assert possible("dualpipe", 4, 4) == 8 and possible("dualpipe", 16, 24) == 32
    with pytest.raises(ValueError, match="no schedule is called"):
        possible("mine", 2, 4)


@pytest.mark.parametrize(
    ("config", "world", "said"),
    [
        (V3, None, "--dry-run needs --world"),
        (V3, 0, "--dry-run needs --world"),
        (V3, 1000, "1000 processes don't divide into pipelines of parallel.pp = 16"),
        (V3, 16 * 96, "ep = 64 doesn't divide dp = 96"),
        (V16, 4 * 40, "batch.multiple"),
        (replace(V16, parallel=Parallel(pp=8, ep=8, schedule="chimera")), 8 * 256, "divisible by the 8 stages"),
        (replace(V16, swap=Swap(router="mine.py:Mine")), 32, "leave out --swap.router"),
    ],
)
def test_numbers_that_do_not_fit(config: TrainConfig, world: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dry_run(config, world)


# What is printed -----------------------------------------------------------------------------------------------------
def test_the_page_is_narrow_and_says_it_all(v3: Plan) -> None:
    plans = [v3, plan_run(V16, 64), plan_run(preset("laptop"), 2), plan_run(preset("tiny"), 1)]
    pages = [text(plan) for plan in plans]
    for page in pages:
        assert max(map(len, page.splitlines())) <= 100
    assert "682,636,472,320 counted on the meta device, 682,636,472,320 expected" in pages[0]
    assert "does NOT fit, by 19.8 GB, on pipeline rank 0" in pages[0]
    assert f"at most {v3.longest:,} tokens would fit" in pages[0]
    assert "layer 60, head, MTP (61; reads the embedding)" in pages[0]
    assert "Beside the report" in pages[0] and "Beside the report" not in "".join(pages[1:])
    assert "fits, with" in pages[1] and "GPU, MB" in pages[2]


def test_the_plan_is_jsonable(v3: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    again = json.loads(json.dumps(v3.to_dict()))
    assert again["memory"][7]["total"] == v3.memory[7].total and again["fits"] is False
    assert again["speeds"][0]["machine"] == "released profile"
    plan = dry_run(preset("tiny"), 2)
    assert capsys.readouterr().out.strip() == text(plan)
