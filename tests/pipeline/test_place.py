"""Layers on stages: the best placement there is, found by trying all of them; and V3's."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.config import ModelConfig
from dsv3_book.costs import causal_context, forward_flops
from dsv3_book.pipeline.place import model_costs, place_layers


def stage_costs(placed: list[range], costs: list[float]) -> list[float]:
    sums = [sum(costs[1 + i] for i in layers) for layers in placed]
    sums[0] += costs[0]
    sums[-1] += costs[-1]
    return sums


def everything(layers: int, stages: int) -> list[list[range]]:
    cuts = combinations_with_replacement(range(layers + 1), stages - 1)
    return [[range(a, b) for a, b in zip((0, *cut), (*cut, layers), strict=True)] for cut in cuts]


def config(layers: int) -> ModelConfig:
    return ModelConfig.preset("tiny").replace(num_hidden_layers=layers)


@given(st.data())
def test_no_other_placement_is_better(data: st.DataObject) -> None:
    layers, stages = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    numbers = st.one_of(st.integers(0, 3), st.floats(0, 8, allow_subnormal=False))
    costs = [float(c) for c in data.draw(st.lists(numbers, min_size=layers + 2, max_size=layers + 2))]
    placed = place_layers(config(layers), stages, costs)
    assert len(placed) == stages and [i for stage in placed for i in stage] == list(range(layers))
    slowest = min(max(stage_costs(other, costs)) for other in everything(layers, stages))
    assert max(stage_costs(placed, costs)) == pytest.approx(slowest, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (7, 3), (5, 4), (3, 5), (1, 3), (6, 1)])
def test_of_equally_fast_ones_the_most_even_then_the_one_that_spares_early_stages(
    layers: int, stages: int, after: int
) -> None:
    costs = [0.0, *[1.0] * layers, float(after)]

    def rank(placed: list[range]) -> tuple[float, float, list[int]]:
        sums = stage_costs(placed, costs)
        return max(sums), sum(cost**2 for cost in sums), [len(stage) for stage in placed]

    assert place_layers(config(layers), stages, costs) == min(everything(layers, stages), key=rank)


def test_v3_on_sixteen_stages() -> None:
    cfg = ModelConfig.preset("v3-671b")
    costs = model_costs(cfg)
    assert sum(costs) == pytest.approx(sum(forward_flops(cfg, causal_context(4096)).values()))
    assert costs[-1] / costs[-2] == pytest.approx(3.92, abs=0.01)  # head and MTP, in layers
    placed = place_layers(cfg, 16)
    assert [len(stage) for stage in placed] == [4] * 15 + [1]
    sums = stage_costs(placed, costs)
    assert max(sums) == sums[-1] and max(sums) / costs[-2] == pytest.approx(4.92, abs=0.01)
    assert sum(sums) / 16 / costs[-2] == pytest.approx(4.06, abs=0.01)
    # Without MTP the last stage can take two layers more.
    lean = cfg.replace(num_nextn_predict_layers=0)
    assert [len(stage) for stage in place_layers(lean, 16)].count(4) >= 14


def test_small_models() -> None:
    assert place_layers(config(4), 1) == [range(4)]
    assert [len(stage) for stage in place_layers(config(4), 2)] == [3, 1]
    more_stages = place_layers(config(4), 8)
    assert sorted(len(stage) for stage in more_stages) == [0] * 4 + [1] * 4


def test_what_doesnt_fit_is_named() -> None:
    with pytest.raises(ValueError, match="num_stages=0: a model needs at least one stage"):
        place_layers(config(4), 0)
    for bad in ([1.0] * 5, [1.0] * 5 + [-1.0], [1.0] * 5 + [float("nan")]):
        with pytest.raises(ValueError, match="must be 6 finite numbers, 0 or more: with the first stage, each of 4"):
            place_layers(config(4), 2, bad)
