"""Memory per rank: by hand for one layer, and every number of the model's state in one place of the cluster."""

import pytest

from dsv3_book import costs
from dsv3_book.config import ModelConfig
from dsv3_book.costs_memory import ema_bytes, layout_bytes, rank_params, zero1_bytes
from dsv3_book.pipeline.place import place_layers
from dsv3_book.pipeline.schedule import make_schedule

V3 = ModelConfig.preset("v3-671b")


def test_a_rank_with_everything_has_the_model() -> None:
    for preset in ("tiny", "laptop", "v3-16b", "v3-671b"):
        cfg = ModelConfig.preset(preset)
        c = costs.count(cfg)
        others, experts = rank_params(cfg, range(cfg.num_hidden_layers), embedding=True, head=True)
        assert others + experts == c.main + c.mtp
        assert experts % (cfg.n_routed_experts * costs.expert_params(cfg)) == 0


def test_one_layer_of_v3_by_hand() -> None:
    others, experts = rank_params(V3, [10], ep=64)
    assert experts == 4 * 3 * 7168 * 2048
    assert others == sum(costs.layer_params(V3, 10).values()) - 64 * experts
    shard = others // 256 + experts // 4
    assert shard == pytest.approx(others / 256 + experts / 4, abs=1)
    found = zero1_bytes(others, experts, 256, 4)
    assert found.weights == 2 * (others + experts) and found.gradients == 4 * (others + experts)
    assert found.master == found.moments == 4 * (-(-others // 256) + experts // 4)
    wide = zero1_bytes(others, experts, 256, 4, weights="fp32", moments="fp32")
    assert (wide.weights, wide.master, wide.moments) == (2 * found.weights, 0, 2 * found.moments)
    assert zero1_bytes(others, experts, 1, 1) == costs.training_bytes(others + experts)
    assert ema_bytes(others, experts, 256, 4) == 2 * found.master


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_every_number_of_the_state_is_in_one_place(name: str) -> None:
    """Master weights of all GPUs are 4 bytes for each weight of the model, mirrored and tied copies or not; the weights
    that GPUs hold are more than that."""
    pp, dp, ep = 16, 128, 64
    schedule = make_schedule(name, pp, 2 * pp)
    placed = place_layers(V3, schedule.num_stages)
    held = [schedule.stages(rank) for rank in range(pp)]
    found = layout_bytes(V3, placed, held, dp, ep)
    total = costs.count(V3).main + costs.count(V3).mtp
    assert sum(rank.master for rank in found) * dp == pytest.approx(4 * total, rel=1e-6)
    experts = 59 * 256 * costs.expert_params(V3)  # in 58 layers and the MTP module
    copies = 2 if name == "dualpipe" else 1
    # In 1F1B the first and the last stage, which both read the embedding, are on two ranks; else on one, or its mirror.
    tied = (1 if name == "dualpipev" else 2) * costs.embedding_params(V3)
    others = copies * (total - experts - costs.embedding_params(V3)) + tied
    assert sum(rank.weights for rank in found) == pytest.approx(2 * (others + copies * experts / ep), rel=1e-9)


def test_bad_layouts() -> None:
    with pytest.raises(ValueError, match="256 experts don't divide among ep = 3"):
        rank_params(V3, [5], ep=3)
    with pytest.raises(ValueError, match="ep = 4 doesn't divide dp = 6"):
        layout_bytes(V3, [range(61)], [[0]], dp=6, ep=4)
