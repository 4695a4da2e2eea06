"""A step that is not finite: stopped at or left out, its cause found. (Two processes: distributed/test_faults.py.)"""

import dataclasses
import json
import math

import pytest
import torch
from poisonkit import GUILTY, PLACE, activation, gradient, parameter_gradient, poisonable, weight
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainkit import lines, small, tensors_of

from dsv3_book.train import compare
from dsv3_book.train.config import Every
from dsv3_book.train.nonfinite import LIMIT, NonFinite
from dsv3_book.train.report import write_report
from dsv3_book.train.trainer import Trainer


def finish(trainer: Trainer) -> None:
    trainer.run()
    trainer.close()


@pytest.mark.parametrize(("poison", "module"), [(weight, "embed_tokens"), (activation, PLACE), (gradient, None)])
def test_the_cause_is_named_and_written_down(tmp_path, corpus, poison, module) -> None:
    trainer = Trainer(poisonable(small, tmp_path, corpus), quiet=True)
    tokens = torch.stack([trainer.micro_batch(m) for m in range(4)])
    poison(trainer)
    before = tensors_of(trainer)
    with pytest.raises(NonFinite) as error:
        trainer.run()
    folder, said = tmp_path / "nonfinite" / "step-1", str(error.value)
    after = tensors_of(trainer)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert lines(tmp_path) == []
    assert all(shard.weight.grad is None for shard in trainer.optimizer.shards.pieces())

    report = json.loads((folder / "report.json").read_text())
    assert torch.equal(load_file(folder / "tokens.safetensors")["tokens"].long(), tokens)
    where = f"in micro-batch {GUILTY} (sequence {GUILTY} of the run)"
    assert "step 1 is not finite (loss " in said and where in said and str(folder) in said
    assert "there is no checkpoint yet. Lower --optim.lr" in said
    assert [entry["guilty"] for entry in report["micro_batches"]] == [m == GUILTY for m in range(4)]
    assert [entry["sequences"] for entry in report["micro_batches"]] == [[0], [1], [2], [3]]
    losses = [entry["loss"] for entry in report["micro_batches"]]
    assert all(isinstance(loss, float) for m, loss in enumerate(losses) if m != GUILTY)
    bad = [entry["layer"] for entry in report["gradients"]]
    if module is None:
        assert "all outputs are finite, but gradients are not, first on the way back those of layers.1 (" in said
        assert isinstance(losses[GUILTY], float) and report["first_output"] is None
        assert bad == ["layers.1", "layers.0", "embed_tokens"]  # the attention, and all that lies before it
        names = [name for entry in report["gradients"] for name in entry["not_finite"]]
        assert "layers.1.self_attn.o_proj.weight" in names and "layers.1.post_attention_layernorm.weight" not in names
    else:
        assert f"the first output that is not finite is that of {module}, in" in said
        assert losses[GUILTY] == "nan"
        assert report["first_output"] == {"module": module, "micro_batch": GUILTY}
        assert bad[0] == "layers.2"  # MTP's
    assert report["settings"]["sequences"] == 4 and report["config"]["preset"] == "tiny"
    trainer.close()


def test_one_parameter_alone(tmp_path, corpus) -> None:
    trainer = Trainer(poisonable(small, tmp_path, corpus), quiet=True)
    parameter_gradient(trainer, "layers.0.input_layernorm.weight")
    with pytest.raises(NonFinite, match=r"those of layers\.0 \(layers\.0\.input_layernorm\.weight\), in micro-batch 0"):
        trainer.run()
    report = json.loads((tmp_path / "nonfinite" / "step-1" / "report.json").read_text())
    assert report["gradients"] == [{"layer": "layers.0", "not_finite": {"layers.0.input_layernorm.weight": 64}}]
    trainer.close()


def test_a_step_is_left_out_and_training_goes_on(tmp_path, corpus, capsys) -> None:
    config = poisonable(small, tmp_path / "bad", corpus, on_nonfinite="skip", steps=3)
    trainer = Trainer(config, quiet=True)
    activation(trainer)
    before = tensors_of(trainer)
    seen = []
    take = trainer.take
    trainer.take = lambda *args: (took := take(*args), seen.append((took, tensors_of(trainer))))[0]
    finish(trainer)
    assert [took for took, _ in seen] == [False, True, True]
    assert all(torch.equal(value, seen[0][1][name]) for name, value in before.items())  # weights, biases, moments, EMA
    assert capsys.readouterr().err.count("warning: step 1 is not finite") == 1

    first, second, third = [line for line in lines(tmp_path / "bad") if "val_loss" not in line]
    assert first["skipped"] is True and first["loss"] is None and first["grad_norm"] is None and first["step"] == 1
    assert first["tokens"] == 64 and third["tokens"] == 192  # its sequences are passed over
    assert "skipped" not in second and math.isfinite(second["loss"])
    assert trainer.skipped == 0

    finish(Trainer(poisonable(small, tmp_path / "good", corpus, steps=3), quiet=True))
    page = write_report(tmp_path / "bad").read_text()
    assert "left out" in page and "steps whose loss or gradient was not finite" in page
    assert "loss at step 2" in compare.compare(*(compare.read(tmp_path / name) for name in ("good", "bad")))


def test_too_many_in_a_row_stop_the_run_after_a_restart_too(tmp_path, corpus) -> None:
    every = Every(checkpoint=1, validation=100, validation_windows=4)
    config = poisonable(small, tmp_path, corpus, on_nonfinite="skip", steps=LIMIT + 5, every=every)
    first = Trainer(dataclasses.replace(config, pause_at=LIMIT - 3), quiet=True)
    parameter_gradient(first, "norm.weight")
    finish(first)
    second = Trainer(config, quiet=True)
    assert second.step == second.skipped == LIMIT - 3
    parameter_gradient(second, "norm.weight")
    with pytest.raises(NonFinite, match=f"step {LIMIT} is not finite.*the last checkpoint is of step {LIMIT - 1}"):
        second.run()
    second.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, LIMIT))
    assert len(list((tmp_path / "nonfinite").iterdir())) == LIMIT


def test_the_disk_is_full_too(tmp_path, corpus) -> None:
    trainer = Trainer(poisonable(small, tmp_path, corpus), quiet=True)
    activation(trainer)
    (tmp_path / "nonfinite").write_text("in the way")
    with pytest.raises(NonFinite, match=r"that of layers\.1\.self_attn, in micro-batch 2 .*No report: cannot write"):
        trainer.run()
    trainer.close()


def test_the_disk_is_full_when_the_tokens_are_written(tmp_path, corpus, monkeypatch) -> None:
    trainer = Trainer(poisonable(small, tmp_path, corpus), quiet=True)
    activation(trainer)

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("dsv3_book.train.nonfinite.save_file", full)
    with pytest.raises(NonFinite, match=r"No report: cannot write to .*No space left"):
        trainer.run()
    trainer.close()
