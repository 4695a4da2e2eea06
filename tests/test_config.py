"""ModelConfig: the released file in and out, and errors that name the field, its value and the remedy."""

import json
import subprocess
import sys

import pytest

from dsv3_book.config import PRESETS, ModelConfig, RopeScaling, yarn_mscale

# The fields of DeepSeek-V3's released config.json, typed in from the file.
RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_released_file_is_the_largest_preset_but_for_the_initial_std():
    cfg = ModelConfig.from_hf(RELEASED)
    assert cfg == ModelConfig.preset("v3-671b").replace(initializer_range=0.02)
    assert cfg.num_moe_layers == 58 and cfg.qk_head_dim == 192


def test_absent_alpha_is_the_reports_and_a_given_one_is_kept():
    assert ModelConfig.from_hf(RELEASED).aux_loss_alpha == 1e-4
    assert ModelConfig.from_hf(RELEASED | {"aux_loss_alpha": 0.001}).aux_loss_alpha == 0.001


def test_softmax_scale_of_v3_with_and_without_yarn():
    cfg = ModelConfig.preset("v3-671b")
    assert cfg.softmax_scale == pytest.approx(0.1352, abs=5e-5)
    assert cfg.replace(rope_scaling=None).softmax_scale == pytest.approx(0.0722, abs=5e-5)
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3689, abs=5e-5) and yarn_mscale(1.0, 1.0) == 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_the_released_form(name, tmp_path):
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    path = tmp_path / "config.json"
    path.write_text(str(cfg))
    assert ModelConfig.from_hf(path) == cfg and ModelConfig.from_hf(tmp_path) == cfg


def test_newer_rope_parameters_form_is_read():
    new = {k: v for k, v in RELEASED.items() if k not in ("rope_scaling", "rope_theta")}
    rope = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 5000.0}
    cfg = ModelConfig.from_hf(new)
    assert cfg.rope_theta == 5000.0 and cfg.rope_scaling == ModelConfig.preset("v3-671b").rope_scaling
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert ModelConfig.from_hf(new).rope_scaling is None


def test_mtp_blocks_are_moe_unless_the_model_is_dense():
    tiny = ModelConfig.preset("tiny")
    assert [tiny.is_moe_layer(i) for i in range(5)] == [False, True, True, True, True]
    assert not tiny.replace(first_k_dense_replace=4).is_moe_layer(4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": True}, "hidden_size must be of type int"),
        ({"q_lora_rank": 0}, "null for no query compression"),
        ({"qk_rope_head_dim": 7}, "must be even"),
        ({"n_group": 3}, "n_routed_experts .8. is not divisible by n_group .3."),
        ({"n_group": 8}, "use fewer groups"),
        ({"topk_group": 5}, "topk_group .5. exceeds n_group .4."),
        ({"num_experts_per_tok": 5}, "exceeds the 4 experts"),
        ({"first_k_dense_replace": 9}, "exceeds num_hidden_layers"),
        ({"aux_loss_alpha": -1.0}, "must not be negative"),
        ({"rope_theta": 0.0}, "must be above 0"),
        ({"hiden_size": 64}, "unknown field: hiden_size; known are"),
    ],
)
def test_bad_sizes_name_the_field_and_the_remedy(changes, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.preset("tiny").replace(**changes)


def test_a_number_given_as_text_is_refused():
    """In a process of its own: in this one the tests' type checker would object first."""
    code = "from dsv3_book.config import ModelConfig; ModelConfig.from_hf({'hidden_size': '64'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: hidden_size must be of type int, got '64'" in done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "only 'deepseek_v3'"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
        ({"rope_interleave": False}, "rope_interleave must be True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must equal num_attention_heads"),
        ({"sliding_window": 4}, "unknown config.json key: sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "has no 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}}, "does not know: attention_factor"),
    ],
)
def test_files_that_mean_another_model_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_hf(RELEASED | changes)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_hf(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a JSON list"):
        ModelConfig.from_hf(path)


def test_unknown_preset_and_bad_yarn_settings():
    with pytest.raises(ValueError, match="unknown preset 'v4': choose one of tiny, laptop"):
        ModelConfig.preset("v4")
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        RopeScaling(factor=0.5, original_max_position_embeddings=64)
