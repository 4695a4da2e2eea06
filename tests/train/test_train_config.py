"""Presets, the command line made from them, and what it says to wrong input."""

import json

import pytest

from dsv3_book.config import ModelConfig
from dsv3_book.train.config import Batch, TrainConfig
from dsv3_book.train.presets import PRESETS, from_command_line, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str, tmp_path) -> None:
    config = preset(name, tmp_path)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.preset == name


@pytest.mark.parametrize("name", ["v3-16b", "v3-671b"])
def test_v3_presets_carry_the_reports_schedule(name: str) -> None:
    config = preset(name, "x")
    recipe = config.recipe()
    assert recipe.total_tokens == pytest.approx(14.8e12, rel=1e-5)
    assert (recipe.peak_lr, recipe.warmup_steps, recipe.sequence_length) == (2.2e-4, 2000, 4096)
    assert recipe.low_lr == pytest.approx(2.2e-5)
    assert recipe.final_lr == pytest.approx(7.3e-6)
    assert (config.batch.start, config.batch.end) == (3072, 15360)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert config.model.rope_scaling is None and config.model.max_position_embeddings == 4096


def test_command_line_changes_the_preset() -> None:
    words = "--preset tiny --out run --steps 7 --seed 3 --dtype bf16 --data a b/*.txt --optim.lr 1e-3 "
    words += "--model.num-hidden-layers 6 --model.q_lora_rank None --batch.micro=4 --pause-at 5"
    config = from_command_line(words.split())
    assert (str(config.out), config.steps, config.seed, config.dtype, config.pause_at) == ("run", 7, 3, "bf16", 5)
    assert config.data == ("a", "b/*.txt")
    assert (config.optim.lr, config.batch.micro) == (1e-3, 4)
    assert config.model == ModelConfig.preset("tiny").replace(num_hidden_layers=6, q_lora_rank=None)


def test_default_preset_is_laptop() -> None:
    assert from_command_line(["--out", "x"]).model == ModelConfig.preset("laptop")
    assert str(from_command_line(["--preset", "tiny"]).out) == "runs/tiny"


@pytest.mark.parametrize("words", ["--preset huge", "--preset=huge"])
def test_unknown_preset(words: str) -> None:
    with pytest.raises(ValueError, match="unknown preset 'huge': choose one of tiny, laptop, v3-16b, v3-671b"):
        from_command_line(f"{words} --out x".split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out x --optim.learning-rate 1", "--optim.learning-rate"),
        ("--out x --steps many", "many"),
        ("--out x --model.n-routed-experts 7", "n_routed_experts (7)"),
        ("--out x --batch.micro 3", "batch.micro (3)"),
        ("--out x --batch.start 5", "batch.start (5"),
        ("--out x --steps 0", "steps must be at least 1"),
        ("--out x --every.checkpoint 0", "every.checkpoint must be at least 1"),
        ("--out x --batch.sequence-length 100000", "100000"),
        ("--out x --dtype fp16", "fp16"),
    ],
)
def test_wrong_input_ends_with_status_2_and_names_it(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        from_command_line(words.split())
    assert stop.value.code == 2
    box = " ".join(line.strip("│ ") for line in capsys.readouterr().err.splitlines())
    assert said in box
    with pytest.raises(SystemExit):
        from_command_line(words.split(), speak=False)
    assert capsys.readouterr().err == ""


def test_processes_that_do_not_divide_the_batch() -> None:
    config = preset("tiny", "x", batch=Batch(sequence_length=16, start=8, end=8, multiple=8, micro=2))
    assert config.layout(4).dp == 4
    with pytest.raises(ValueError, match=r"batch\.multiple \(8 sequences\) does not divide among 3 data parallel"):
        config.layout(3)


def test_settings_of_another_version() -> None:
    raw = preset("tiny", "x").to_dict()
    raw["optim"]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum"):
        TrainConfig.from_dict(raw)
