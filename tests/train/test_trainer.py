"""The loop: what a step does, and what survives a stop."""

import dataclasses
import functools
import math
import os
import signal
import threading
import time

import pytest
import torch
from trainkit import lines, small, tensors_of

from dsv3_book import checkpoint
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.train.config import Balance, Batch, Every, Optim, Text
from dsv3_book.train.errors import Ending
from dsv3_book.train.trainer import NonFinite, Trainer


def run(config) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    trainer.close()
    return trainer


def contents(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")}


def test_a_run_learns_and_reports(tmp_path, corpus) -> None:
    every = Every(checkpoint=16, validation=8, validation_windows=4)
    trainer = run(small(tmp_path, corpus, steps=32, every=every))
    steps = [line for line in lines(tmp_path, timing=True) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 33))
    wanted = {"step", "loss", "loss_mtp", "balance_loss", "max_violation", "lr", "grad_norm", "tokens"}
    wanted |= {"tokens_per_second", "gamma", "mtp_weight", "batch_size", "bubble", "memory", "mfu"}
    assert set(steps[0]) == wanted
    assert all(math.isfinite(value) for line in steps for value in line.values())
    assert steps[0]["loss"] == pytest.approx(math.log(512), rel=0.02)
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    assert steps[-1]["loss_mtp"] < 0.85 * steps[0]["loss_mtp"]
    assert steps[-1]["tokens"] == sum(line["batch_size"] for line in steps) * 16 == trainer.tokens
    assert steps[0]["batch_size"] == 4 and steps[-1]["batch_size"] == 8
    assert steps[-1]["gamma"] == 0.0 and steps[0]["gamma"] == 0.001
    assert (steps[0]["mtp_weight"], steps[-1]["mtp_weight"]) == (0.3, 0.1)

    evaluated = [line for line in lines(tmp_path) if "val_loss" in line]
    assert [line["step"] for line in evaluated] == [8, 16, 24, 32]
    assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"]
    assert evaluated[-1]["val_tokens"] == len(trainer.data.val) - 1  # all held-out text
    nats = evaluated[-1]["val_loss"] * evaluated[-1]["val_tokens"]
    assert evaluated[-1]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / trainer.data.val_bytes)
    assert evaluated[-1]["val_xz_bits_per_byte"] == trainer.data.val_xz_bits_per_byte
    assert [step for step, _ in checkpoint.found(tmp_path / "checkpoints")] == [32, 16]


def test_a_cut_run_equals_an_uncut_one_bit_for_bit(tmp_path, corpus) -> None:
    every = Every(checkpoint=2, validation=3, validation_windows=4)
    whole = run(small(tmp_path / "whole", corpus, steps=6, every=every))
    cut = small(tmp_path / "cut", corpus, steps=6, every=every)
    first = Trainer(dataclasses.replace(cut, pause_at=3))
    assert first.run() is False
    # What a process that is killed leaves: lines of steps that were never saved, the last one cut short.
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    first.close()
    second = Trainer(cut)
    assert second.step == 3 and second.sequences == first.sequences
    assert second.run() is True
    a, b = tensors_of(whole), tensors_of(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_parameter_in_several_pieces_is_cut_as_well(tmp_path, corpus, monkeypatch) -> None:
    """As those of large models, which lie in more than one bucket: each piece goes on counting its steps."""
    monkeypatch.setattr("dsv3_book.train.job.ZeRO1", functools.partial(ZeRO1, bucket=3000))
    whole = run(small(tmp_path / "whole", corpus, steps=6))
    cut = small(tmp_path / "cut", corpus, steps=6)
    run(dataclasses.replace(cut, pause_at=3))
    second = run(cut)
    parts = second.optimizer.parts()
    assert len(parts) > len({part.name for part in parts})
    assert {second.optimizer.optimizer.state_of(part.weight)["step"].item() for part in parts} == {6}
    a, b = tensors_of(whole), tensors_of(second)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_an_end_leaves_a_save_under_way_its_moment(tmp_path, corpus, monkeypatch) -> None:
    trainer = Trainer(small(tmp_path, corpus), quiet=True)
    begun = threading.Event()

    def slow(*args, **options):
        begun.set()
        time.sleep(0.5)
        return checkpoint.save(*args, **options)

    monkeypatch.setattr("dsv3_book.saver.save", slow)
    ending = Ending()
    ending.begun(trainer)
    trainer.save()
    begun.wait()
    ending.close()
    assert checkpoint.latest(trainer.folder.checkpoints) is not None
    Trainer(trainer.config, quiet=True).close()  # the folder is free


def test_the_optimizer_and_the_biases_are_part_of_it(tmp_path, corpus) -> None:
    first = run(small(tmp_path, corpus, steps=3))
    again = Trainer(small(tmp_path, corpus, steps=3))
    tensors = tensors_of(again)
    assert torch.equal(tensors["optimizer.layers.1.self_attn.o_proj.weight.step"], torch.tensor([3.0]))
    assert tensors["optimizer.embed_tokens.weight.exp_avg"].abs().sum() > 0
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, tensors_of(first)["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert bias.abs().max() > 0
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in tensors  # the MTP module has a router too


def test_micro_batches_change_nothing_but_rounding(tmp_path, corpus) -> None:
    curves = []
    for micro in (1, 4):
        config = small(tmp_path / str(micro), corpus, batch=Batch(16, start=4, end=4, multiple=4, micro=micro))
        run(config)
        curves.append([line for line in lines(config.out) if "loss" in line])
    for a, b in zip(*curves, strict=True):
        for name in ("loss", "loss_mtp", "balance_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
        assert a["max_violation"] == b["max_violation"]


def test_the_gradient_is_that_of_main_plus_weighted_mtp_plus_balance(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus, balance=Balance(gamma=0.5), optim=Optim(clip=1e9, lr=1e-3, warmup_steps=1))
    trainer = Trainer(config)
    losses = trainer.model.losses(trainer.micro_batch(0))  # the whole first step
    (losses.main + 0.3 * losses.mtp + losses.balance).backward()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    trainer.optimizer.zero_grad()
    bias = next(trainer.job.routers())[1].e_score_correction_bias
    trainer.run()
    first = lines(tmp_path)[0]
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(losses.main.item(), rel=1e-6)
    assert bias.abs().max() >= 0.5  # one step of γ


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus, steps=4, every=Every(checkpoint=2, validation=100))
    trainer = Trainer(dataclasses.replace(config, pause_at=2))
    trainer.run()
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    before = tensors_of(trainer)
    trainer.config = config
    with pytest.raises(NonFinite, match=r"step 3 is not finite \(loss nan.*the last checkpoint is of step 2") as error:
        trainer.run()
    assert "--optim.lr" in str(error.value)
    after = tensors_of(trainer)
    assert all(torch.equal(before[k], after[k]) for k in before if not before[k].isnan().any())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, corpus, number: signal.Signals) -> None:
    config = small(tmp_path, corpus, steps=50)
    trainer = Trainer(config)
    micro_batch = trainer.micro_batch

    def interrupted(count: int) -> torch.Tensor:
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return micro_batch(count)

    trainer.micro_batch = interrupted
    before = signal.getsignal(number)
    assert trainer.run() is False
    assert trainer.step == 3
    assert signal.getsignal(number) is before
    assert checkpoint.latest(tmp_path / "checkpoints")[1]["step"] == 3


def test_a_finished_run_is_left_alone(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus)
    run(config)
    before = lines(tmp_path, timing=True)
    again = Trainer(config)
    assert again.describe() == f"{tmp_path} is finished: all 4 steps are done"
    assert again.run() is True
    assert lines(tmp_path, timing=True) == before


def test_another_model_is_refused_and_the_run_left_as_it_was(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus)
    run(config)
    files = contents(tmp_path)
    other = dataclasses.replace(config, model=config.model.replace(hidden_size=32, vocab_size=600))
    with pytest.raises(ValueError, match=r"hidden_size: 64 → 32; vocab_size: 512 → 600.*name another --out"):
        Trainer(other)
    assert contents(tmp_path) == files


def test_other_text_is_refused(tmp_path, corpus) -> None:
    config = small(tmp_path / "run", corpus)
    run(config)
    (tmp_path / "other.txt").write_text("something else entirely\n" * 300)
    with pytest.raises(ValueError, match="trained on other text or with another tokenizer"):
        Trainer(dataclasses.replace(config, data=(str(tmp_path / "other.txt"),)))


def test_fewer_steps_than_done_are_refused_and_other_settings_said(tmp_path, corpus, capsys) -> None:
    config = small(tmp_path, corpus)
    run(config)
    with pytest.raises(ValueError, match="already done 4 steps, more than --steps 2"):
        Trainer(dataclasses.replace(config, steps=2))
    trainer = Trainer(dataclasses.replace(config, steps=5, optim=dataclasses.replace(config.optim, lr=1e-3)))
    said = capsys.readouterr().err
    assert "optim.lr: 0.003 → 0.001" in said and "steps: 4 → 5" in said
    trainer.folder.release()
    assert trainer.run() is True and trainer.step == 5


def test_an_average_cannot_begin_in_the_middle(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus, optim=Optim(lr=3e-3, warmup_steps=2, ema=0.0))
    run(config)
    with pytest.raises(ValueError, match=r"without an average of the weights: go on with --optim\.ema 0, or"):
        Trainer(dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema=0.9)))


def test_two_runs_in_one_folder_are_refused(tmp_path, corpus) -> None:
    config = small(tmp_path, corpus)
    trainer = Trainer(config)
    with pytest.raises(ValueError, match="another process is training in"):
        Trainer(config)
    trainer.close()
    Trainer(config)


def test_a_truncated_checkpoint_is_passed_over(tmp_path, corpus, capsys) -> None:
    config = small(tmp_path, corpus, every=Every(checkpoint=2, validation=100))
    whole = run(config)
    newest = tmp_path / "checkpoints" / "step-00000004" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-100])
    trainer = Trainer(config)
    said = capsys.readouterr().err
    assert trainer.step == 2
    assert f"{newest} is truncated" in said and "falling back to the checkpoint of step 2" in said
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(whole).values(), tensors_of(trainer).values(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("no/such/path",)}, "no/such/path"),
        ({"text": Text(tokenizer="no/tokenizer.json")}, "no/tokenizer.json"),
        ({"batch": Batch(250, start=4, end=4, multiple=4, micro=2), "data": ("short.txt",)}, "shorter sequence"),
    ],
)
def test_bad_text_is_named_before_anything_is_written(tmp_path, corpus, monkeypatch, changes, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("one line\nand another\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(small(tmp_path / "run", corpus, **changes))
    assert contents(tmp_path / "run") == {}


def test_a_dense_model_has_no_routers(tmp_path, corpus) -> None:
    model = small(tmp_path, corpus).model.replace(first_k_dense_replace=2, num_nextn_predict_layers=0)
    run(small(tmp_path, corpus, model=model, steps=2))
    assert [(line["max_violation"], line["loss_mtp"]) for line in lines(tmp_path)[:2]] == [(0.0, 0.0)] * 2


def test_bf16_runs(tmp_path, corpus) -> None:
    trainer = run(small(tmp_path, corpus, dtype="bf16", steps=2))
    assert trainer.model.compute_dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_quiet_run_says_nothing_and_writes_the_same(tmp_path, corpus, capfd) -> None:
    config = small(tmp_path, corpus, steps=2)
    Trainer(config, quiet=True).run()
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert len([line for line in lines(tmp_path) if "loss" in line]) == 2
