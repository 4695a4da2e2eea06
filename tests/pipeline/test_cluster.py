"""cluster: V3 on H800s in durations. The figures that the book quotes, and what they hang on (claims C15, C16, C18)."""

from dataclasses import replace

import pytest

from dsv3_book.config import ModelConfig
from dsv3_book.costs import PEAK_FLOPS, causal_context, forward_flops, tokens_per_second_per_gpu, training_flops
from dsv3_book.pipeline.cluster import (
    ALONE,
    COMPUTING_SMS,
    PEAK,
    PROFILED,
    all_to_all_ms,
    balance_of,
    gpus_crossed,
    hop_ms,
    layer_times,
    nodes_crossed,
    simulate_step,
    stage_costs,
    stage_layers,
)
from dsv3_book.pipeline.pair import PROFILE, PROFILE_LAYERS, alone, pair
from dsv3_book.pipeline.scaling import scale_out, slower_links
from dsv3_book.pipeline.schedule import Action, Pair

V3 = ModelConfig.preset("v3-671b")


def test_work_at_the_peak_is_the_flops_of_costs():
    """No efficiency, no recomputation: the parts' times are the FLOPs that costs.py counts, none lost, none twice."""
    plain = replace(PEAK, gemm=1e12, gemm_weight=1e12, core=1e12, core_backward=1e12)
    stages = stage_layers(V3, 16, plain)
    forward = sum(
        time
        for stage in stages
        for layer in stage
        for name, time in layer.items()
        if name in ("attention(F)", "mlp(F)")
    )
    # BF16 products (two heads, eh_proj) run at half the FP8 rate
    flops = 4096 * sum(forward_flops(V3, causal_context(4096)).values())
    slower = 4096 * (2 * 2 * 129280 * 7168 + 4 * 7168**2)
    assert forward * 1e9 == pytest.approx(flops + slower)
    weights = sum(time for stage in stages for layer in stage for name, time in layer.items() if name.endswith("(W)"))
    cores = sum(2 * 128 * 320 * causal_context(4096) for _ in range(62)) * 4096
    assert weights * 1e9 == pytest.approx(flops + slower - cores)
    assert training_flops(V3, 4096) * 4096 == pytest.approx(3 * flops)


def test_an_all_to_all_by_hand():
    assert nodes_crossed(V3, 8) == 4 * 7 / 8
    assert all_to_all_ms(V3, PEAK, "fp8", 4096, 8) == pytest.approx(4096 * 3.5 * (7168 + 4 * 56) / 50e9 * 1e3)
    assert all_to_all_ms(V3, PEAK, "bf16", 4096, 8) == pytest.approx(4096 * 3.5 * 2 * 7168 / 50e9 * 1e3)
    assert all_to_all_ms(V3, replace(PEAK, wait=1e-3), "fp8", 4096, 8) == pytest.approx(3.119, abs=0.001)
    assert nodes_crossed(V3, 1) == 0 and all_to_all_ms(V3, PEAK, "fp8", 4096, 1) > 0  # inside a node: NVLink alone
    # 2 experts a node over 8 GPUs: 7 · (1 − C(28,2)/C(32,2)) others, in each of 4 nodes
    assert gpus_crossed(V3, 8) == pytest.approx(4 * 7 * (1 - 378 / 496))


def test_the_node_limit_caps_copies_where_freedom_does_not():
    free = nodes_crossed(V3, 8, limited=False)
    assert free == pytest.approx(7 * (1 - 0.3385), abs=0.01)  # 8 experts over 8 nodes
    assert nodes_crossed(V3, 8) < free < 8


def test_c15_the_ratio_and_what_it_hangs_on():
    ratios = {machine.name: balance_of(layer_times(V3, 3, machine)) for machine in (PEAK, ALONE, PROFILED)}
    assert {name: round(a / b, 2) for name, (a, b) in ratios.items()} == {
        "hardware peak": 0.94, "released kernels, each alone": 2.09, "released profile": 1.10,
    }  # fmt: skip
    profile = balance_of(PROFILE)
    assert profile[0] / profile[1] == pytest.approx(1.13, abs=0.005)


def test_parts_against_the_profiles_kernels():
    times = layer_times(V3, 3, PROFILED)
    assert set(times) == set(PROFILE)
    mean = {name: sum(layer[name] for layer in PROFILE_LAYERS) / 4 for name in PROFILE}
    for name, time in times.items():
        assert time == pytest.approx(mean[name], rel=0.28), name  # rates are few and rounded; the worst is dispatch(F)
    assert sum(times.values()) == pytest.approx(sum(mean.values()), rel=0.02)


def test_c16_the_pair_hides_all_but_the_first_transfer():
    for machine, hidden in ((PROFILED, 0.990), (ALONE, 1.0), (PEAK, 0.938)):
        layer = layer_times(V3, 3, machine)
        assert pair([layer] * 4, [layer] * 4).hidden_share == pytest.approx(hidden, abs=0.001), machine.name
    layer = layer_times(V3, 3, PROFILED)
    both = pair([layer] * 4, [layer] * 4)
    assert both.span == pytest.approx(125.4, abs=0.1)
    assert 1 - both.compute / both.span < 0.01
    assert (alone("F", [layer] * 4).span + alone("B", [layer] * 4).span) / both.span == pytest.approx(1.895, abs=0.005)


def test_c18_near_zero_overhead_at_a_constant_ratio():
    rows = scale_out(V3, [2048, 4096, 8192, 20480])
    assert [row.nodes for row in rows] == [8, 16, 32, 80] and [row.cfg.n_routed_experts for row in rows] == [
        256,
        512,
        1024,
        2560,
    ]
    assert [round(row.crossed, 2) for row in rows] == [3.5, 3.75, 3.88, 3.95]  # the cap of 4 is the limit
    assert max(row.overhead for row in rows) < 0.03
    assert rows[0].ratio / rows[-1].ratio < 1.1
    steps = [simulate_step(row.cfg, nodes=row.nodes).tokens_per_second_per_gpu for row in (rows[0], rows[-1])]
    assert steps[1] / steps[0] > 0.97
    free = scale_out(V3, [2048, 20480], limited=False)
    assert free[0].overhead < free[1].overhead and free[1].overhead > 0.25  # copies per token go to 8: ratio not kept
    assert free[1].crossed > 7.5
    with pytest.raises(ValueError, match="multiple of 256"):
        scale_out(V3, [2000])


def test_overhead_appears_when_the_ratio_is_lost():
    rows = slower_links(V3, [0.5, 1, 1.5, 2, 3])
    overheads = [1 - row.compute / row.span for row in rows]
    assert overheads == sorted(overheads)
    assert overheads[1] < 0.01 and overheads[3] > 0.4
    # once communication is the longer one it alone sets the time
    assert rows[-1].span == pytest.approx(rows[-1].communication, rel=0.02)


def test_stages_differ():
    stages = stage_layers(V3, 16, PROFILED)
    assert sum(len(stage) for stage in stages) == 61 + 4  # layers; head, eh_proj, MTP block, head
    assert "dispatch(F)" not in stages[0][0] and "dispatch(F)" in stages[0][3]  # three dense layers come first
    costs = stage_costs(stages)
    assert costs.of(Action("F", 0, 0)) < costs.of(Action("F", 1, 0))  # dense layers send nothing
    assert costs.of(Action("W", 15, 0)) > costs.of(Action("W", 1, 0))  # two heads and a block
    assert costs.of(Action("B", 5, 0)) == costs.of(Action("I", 5, 0)) + costs.of(Action("W", 5, 0))
    both = Pair(Action("F", 4, 0), Action("B", 11, 1))
    assert costs.of(both) == pytest.approx(125.4, abs=0.1)
    assert stage_costs(stages, overlap=False).of(both) == pytest.approx(
        costs.of(Action("F", 4, 0)) + costs.of(Action("B", 11, 1))
    )
    # a pair of unlike stages: the order of its two chunks matters
    assert costs.of(Pair(Action("F", 0, 0), Action("B", 15, 0))) != costs.of(
        Pair(Action("F", 15, 0), Action("B", 0, 0))
    )


def test_a_step_of_v3():
    step = simulate_step(V3)  # the report's layout at the profile's rates: 16 ranks, 120 micro-batches
    assert step.microbatches == 120
    assert step.tokens_per_second_per_gpu == pytest.approx(1425, abs=2)
    assert step.tokens_per_second_per_gpu / tokens_per_second_per_gpu() == pytest.approx(0.923, abs=0.002)
    assert simulate_step(V3, overlap=False).tokens_per_second_per_gpu == pytest.approx(1005, abs=2)
    assert step.idle_share == pytest.approx(0.186, abs=0.001)
    assert simulate_step(V3, "1f1b").tokens_per_second_per_gpu == pytest.approx(946, abs=2)
    assert simulate_step(V3, machine=ALONE).tokens_per_second_per_gpu == pytest.approx(1875, abs=2)


def test_rates_are_below_the_hardware():
    for machine in (ALONE, PROFILED):
        assert machine.gemm < PEAK.gemm == PEAK_FLOPS["fp8"] * COMPUTING_SMS
        assert max(machine.core, machine.core_backward) < PEAK.core and machine.ib <= PEAK.ib
    assert hop_ms(V3, PEAK) == pytest.approx(1.174, abs=0.001)
