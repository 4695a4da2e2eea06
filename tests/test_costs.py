"""costs: the released model's numbers to the last weight, and the report's bill."""

import subprocess
import sys

import pytest

from dsv3_book import costs
from dsv3_book.config import ModelConfig
from dsv3_book.costs_table import main, table

V3 = ModelConfig.preset("v3-671b")
LAPTOP = ModelConfig.preset("laptop")


def test_c1_parameters_are_exact():
    c = costs.count(V3)
    assert (c.main, c.main_biases) == (671_026_404_352, 14_848)
    assert (c.active, c.active_with_embedding) == (36_625_603_584, 37_552_282_624)
    assert (c.mtp, c.mtp_biases, c.mtp_on_disk) == (11_610_067_968, 256, 13_463_426_048)
    assert c.on_disk == 684_489_830_400


def test_parts_add_up_and_every_layer_is_there():
    assert sum(costs.main_params(V3).values()) == costs.count(V3).main
    assert set(costs.layer_params(V3, 2)) == {"attention", "norms", "dense_ffn"}
    assert set(costs.layer_params(V3, 3)) == {"attention", "norms", "router", "routed_experts", "shared_experts"}
    assert costs.layer_params(V3, 3)["routed_experts"] == 256 * 3 * 7168 * 2048
    two = costs.count(V3.replace(num_nextn_predict_layers=2))
    assert two.mtp == 2 * costs.count(V3).mtp and two.main == costs.count(V3).main
    none = costs.count(V3.replace(num_nextn_predict_layers=0))
    assert none.mtp == none.mtp_on_disk == 0 and none.on_disk == none.main


def test_no_query_compression_and_several_shared_experts():
    lite = ModelConfig.preset("v3-16b")
    assert costs.attention_params(lite)["q_proj"] == 2048 * 16 * 192
    assert "q_a_proj" not in costs.attention_params(lite)
    assert costs.layer_params(lite, 1)["shared_experts"] == 2 * costs.expert_params(lite)
    # arXiv 2405.04434, appendix B: V2-Lite has 15.7B parameters, 2.4B activated (with no biases and no MTP)
    assert costs.count(lite).main / 1e9 == pytest.approx(15.7, abs=0.05)
    assert costs.count(lite).active / 1e9 == pytest.approx(2.4, abs=0.1)


def test_c2_cache():
    assert (costs.kv_numbers(V3), costs.mha_kv_numbers(V3)) == (576, 32768)
    assert costs.kv_cache_bytes(V3, 1) == 576 * 61 * 2
    assert costs.kv_cache_bytes(V3, 10, mha=True) * 576 == costs.kv_cache_bytes(V3, 10) * 32768


def test_flops_of_one_layer_by_hand():
    flops = costs.layer_flops(V3, 3, context=100)
    assert flops["routed_experts"] == 8 * 3 * 2 * 7168 * 2048
    assert flops["attention_core"] == 2 * 128 * (192 + 128) * 100
    assert flops["attention_proj"] == 2 * (costs.layer_params(V3, 3)["attention"] - 1536 - 512)
    assert costs.causal_context(3) == (1 + 2 + 3) / 3


def test_without_scores_and_mtp_the_count_is_six_n_less_the_norms():
    norms = sum(costs.main_params(V3)[k] for k in ("norms", "final_norm")) + 61 * (1536 + 512)
    gemms = 3 * sum(costs.forward_flops(V3, context=0, mtp=False).values())
    assert gemms == costs.rule_of_thumb_flops(V3) - 6 * norms


def test_the_benchmark_models_token_costs_28_7_mflop():
    # Counted as the issue does: main model alone, with the whole square of scores
    assert costs.training_flops(LAPTOP, 256, mtp=False, causal=False) / 1e6 == pytest.approx(28.7, abs=0.05)
    assert costs.training_flops(LAPTOP, 256, mtp=False) < costs.training_flops(LAPTOP, 256)


def test_mtp_costs_its_block_its_projection_and_the_head_once_more():
    whole, main_only = (sum(costs.forward_flops(V3, 64, mtp=m).values()) for m in (True, False))
    block = sum(costs.layer_flops(V3, 61, 64).values())
    assert whole - main_only == block + 4 * 7168**2 + 2 * 129280 * 7168


def test_c3_the_bill():
    bill = costs.full_bill()
    assert costs.pretraining_bill().gpu_hours == pytest.approx(2_664_000)
    assert bill.gpu_hours == pytest.approx(2_788_000)
    assert bill.dollars == pytest.approx(5.576e6)


def test_c4_days_and_the_mfu_behind_them():
    assert costs.pretraining_bill(1e12).days == pytest.approx(3.7, abs=0.05)
    assert costs.pretraining_bill().days < 61
    assert costs.tokens_per_second_per_gpu() == pytest.approx(1543, abs=1)
    assert 0.38 < costs.implied_mfu(V3) < 0.43
    assert costs.implied_mfu(V3, peak="fp8") == pytest.approx(costs.implied_mfu(V3) * 989 / 1979)
    with pytest.raises(ValueError, match="no peak known for 'int8'"):
        costs.implied_mfu(V3, peak="int8")


def test_training_state_is_fourteen_bytes_a_weight():
    state = costs.training_bytes(1000)
    assert (state.weights, state.master, state.gradients, state.moments) == (2000, 4000, 4000, 4000)
    assert state.total == 14_000


def test_bytes_over_the_wire():
    assert costs.dispatch_bytes(V3, 1) == 7168 + 56 * 4
    assert costs.dispatch_bytes(V3, 4, "bf16") == 4 * 7168 * 2 == costs.combine_bytes(V3, 4)
    assert costs.dispatch_bytes(V3.replace(hidden_size=130), 1) == 130 + 2 * 4  # the last scale covers a ragged tile


@pytest.mark.parametrize("name", ["tiny", "v3-16b", "v3-671b"])
def test_the_table_prints(name, capsys):
    main(["--preset", name])
    text = capsys.readouterr().out
    assert f"{costs.count(ModelConfig.preset(name)).main:,}" in text
    assert ("GPU-hours" in text) is (name == "v3-671b")


def test_a_dense_model_has_a_table_too():
    assert "dense_ffn" in table(ModelConfig.preset("tiny").replace(first_k_dense_replace=4), "dense")


def test_the_command_reads_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(str(LAPTOP))
    command = [sys.executable, "-m", "dsv3_book.costs", "--config", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "8,715,264" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "v9"], "unknown preset 'v9': choose one of"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
        (["--context", "0"], "at least 1, got 0"),
    ],
)
def test_bad_input_ends_with_status_2_and_the_remedy(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_no_torch_is_imported():
    code = "import sys, dsv3_book.costs, dsv3_book.costs_table; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
