"""Faults inside a run of several processes: numbers that are not finite, metrics and checkpoints that can't be written,
a checkpoint that is damaged; and who is blamed for what. (Those that need torchrun are in `test_survival.py`.)"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from poisonkit import GUILTY, PLACE, activation, gradient, late_gradient, poisonable, weight
from safetensors.torch import load_file
from trainkit import lines, small, tensors_of

from dsv3_book import checkpoint
from dsv3_book.checkpoint import SaveError
from dsv3_book.parallel import DataParallel, PeerError
from dsv3_book.parallel.signs import Sign, blame
from dsv3_book.pipeline.agree import PipelineError
from dsv3_book.train.config import Batch, Every, Parallel, TrainConfig
from dsv3_book.train.errors import words
from dsv3_book.train.metrics import Unwritable
from dsv3_book.train.nonfinite import NonFinite
from dsv3_book.train.trainer import Trainer

POISONS = {"weight": weight, "activation": activation, "gradient": gradient, "late": late_gradient}
LAYOUTS = {"dualpipe": Parallel(pp=2), "ep": Parallel(ep=2)}


def poisoned(config: TrainConfig, poison: str) -> tuple[str, bool]:
    """Trains here until the error: its words, and whether weights and moments are untouched."""
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    POISONS[poison](trainer)
    before = tensors_of(trainer)
    try:
        trainer.run()
        said = ""
    except NonFinite as error:
        said = str(error)
    after = tensors_of(trainer)
    trainer.close()
    same = all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    return said, same


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("poison", "words"),
    [
        ("weight", "the first output that is not finite is that of embed_tokens, in "),
        ("activation", f"the first output that is not finite is that of {PLACE}, in "),
        ("gradient", "all outputs are finite, but gradients are not, first on the way back those of layers.1 ("),
    ],
)
def test_the_cause_is_found_across_ranks(pool, tmp_path, corpus, layout: str, poison: str, words: str) -> None:
    config = poisonable(small, tmp_path, corpus, parallel=LAYOUTS[layout])
    answers = pool(2).run(poisoned, config, poison)
    for said, same in answers:
        assert same and words in said
        assert f"micro-batch {GUILTY} (sequence {GUILTY} of the run)" in said
    report = json.loads((tmp_path / "nonfinite" / "step-1" / "report.json").read_text())
    assert [entry["guilty"] for entry in report["micro_batches"]] == [m == GUILTY for m in range(4)]
    losses = [entry["loss"] for entry in report["micro_batches"]]
    assert all(isinstance(loss, float) for m, loss in enumerate(losses) if m != GUILTY or poison == "gradient")
    layers = [entry["layer"] for entry in report["gradients"]]
    assert layers[0] == ("layers.1" if poison == "gradient" else "layers.2") and layers[-1] == "embed_tokens"
    assert load_file(tmp_path / "nonfinite" / "step-1" / "tokens.safetensors")["tokens"].shape == (4, 1, 18)


@pytest.mark.distributed
def test_whose_tokens_spoiled_the_experts_is_found(pool, tmp_path, corpus) -> None:
    """A bad gradient that goes back through experts spoils theirs, wherever they are: that accuses nobody."""
    config = poisonable(small, tmp_path, corpus, parallel=LAYOUTS["ep"])
    for said, same in pool(2).run(poisoned, config, "late"):
        assert same and "those of norm (" in said and f", in micro-batch {GUILTY} (" in said
    report = json.loads((tmp_path / "nonfinite" / "step-1" / "report.json").read_text())
    assert [entry["guilty"] for entry in report["micro_batches"]] == [m == GUILTY for m in range(4)]
    assert any(".experts." in name for entry in report["gradients"] for name in entry["not_finite"])


def left_out(config: TrainConfig) -> None:
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    activation(trainer)
    trainer.run()
    trainer.close()


@pytest.mark.distributed
def test_two_processes_leave_out_the_step_that_one_does(pool, tmp_path, corpus) -> None:
    curves = []
    for count, parallel in ((1, Parallel()), (2, Parallel(pp=2))):
        config = poisonable(small, tmp_path / str(count), corpus, parallel=parallel, on_nonfinite="skip")
        pool(2).run(left_out, config) if count == 2 else left_out(config)
        curves.append([line for line in lines(config.out) if "val_loss" not in line])
    assert [line.get("skipped", False) for line in curves[1]] == [True, False, False, False]
    for one, two in zip(*curves, strict=True):
        assert [name for name in one if one[name] is None] == [name for name in two if two[name] is None]
        known = {name: value for name, value in one.items() if value is not None}
        assert {name: two[name] for name in known} == pytest.approx(known, rel=1e-5)


# What can't be written -----------------------------------------------------------------------------------------------
def full(config: TrainConfig) -> tuple[str, int]:
    """Metrics go to a full disk from step 3 on; what was raised here, and the last step done."""
    trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    plain = trainer.train_step

    def train_step(*args: Any) -> bool:
        if trainer.step == 2 and trainer.parallel.rank == 0:
            trainer.metrics.file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return plain(*args)

    trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        return str(trainer.run()), trainer.step
    except Unwritable as error:
        return str(error), trainer.step
    finally:
        trainer.close()


@pytest.mark.distributed
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_metrics_that_cannot_be_written_stop_all_ranks_with_a_checkpoint(pool, tmp_path, corpus) -> None:
    config = small(tmp_path, corpus, parallel=Parallel(pp=2), steps=9, batch=Batch(16, 8, 8, 8, 2))
    (said, step), (other, there) = pool(2).run(full, config)
    assert step == there == 4 and other == "False"
    assert "No space left on device" in said and "It stopped after step 4, which is saved" in said
    assert [number for number, _ in checkpoint.found(tmp_path / "checkpoints")] == [4]


def test_lines_that_come_late_are_not_lost(tmp_path) -> None:
    from dsv3_book.train.metrics import MetricsFile

    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    good, file.file = file.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            file.write({"step": step})
    file.file.close()
    file.file = good
    file.write({"step": 4})
    file.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_last_save_fails(tmp_path, corpus, capsys) -> None:
    """Status 1 with the reason; what was there before is there."""
    from dsv3_book.train import __main__ as command

    words = "--preset tiny --steps 4 --model.num-hidden-layers 2 --batch.sequence-length 16 --text.held-out 0.2 "
    words += f"--every.checkpoint 2 --data {corpus} --out {tmp_path / 'run'}"
    plain, aside = Trainer.validate, tmp_path / "run" / "aside"

    def validate(self: Trainer, everything: bool = False) -> dict[str, Any]:
        if everything:  # just before the last save
            self.saver.wait()
            (tmp_path / "run" / "checkpoints").rename(aside)
            (tmp_path / "run" / "checkpoints").write_text("in the way")
        return plain(self, everything)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validate", validate)
        assert command.main(words.split()) == 1
    said = capsys.readouterr().err
    assert said.count("error: the checkpoint of step 4 was not saved: cannot write") == 1
    (tmp_path / "run" / "checkpoints").unlink()
    aside.rename(tmp_path / "run" / "checkpoints")
    assert command.main(words.split()) == 0
    assert "going on after step 2 of 4" in capsys.readouterr().err


# A damaged checkpoint ------------------------------------------------------------------------------------------------
def resume(config: TrainConfig) -> None:
    trainer = Trainer(config, DataParallel.from_environment())
    trainer.run()
    trainer.close()


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_passed_over_at_another_layout(pool, tmp_path, corpus, capfd) -> None:
    base = {"steps": 6, "batch": Batch(16, 8, 8, 8, 2), "every": Every(checkpoint=2, validation=100)}
    resume(small(tmp_path / "whole", corpus, **base))
    config = small(tmp_path / "run", corpus, **base)
    resume(small(tmp_path / "run", corpus, **base, pause_at=4))
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    victim = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    told = tmp_path / "told"

    def two(config: TrainConfig) -> None:
        from contextlib import redirect_stderr

        with open(f"{told}-{os.environ['RANK']}", "w") as file, redirect_stderr(file):
            resume(config)

    pool(2).run(two, small(tmp_path / "run", corpus, **base, parallel=Parallel(pp=2)))
    said = Path(f"{told}-0").read_text()
    assert f"warning: {victim} is corrupt" in said
    assert "warning: falling back to the checkpoint of step 2" in said
    assert "warning" not in Path(f"{told}-1").read_text()
    for one, other in zip(lines(tmp_path / "whole"), lines(config.out), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


# Whose fault ---------------------------------------------------------------------------------------------------------
def signs(**moved: bool) -> tuple[dict[int, Sign], dict[int, Sign]]:
    """Before and after, of ranks that wait at one place; `r2=False`: rank 2 gave no sign between."""
    before = {rank: Sign(5, 7, "receive, transfers.py:80", True, 1.0) for rank in (1, 2, 3)}
    after = {r: Sign(5 + moved.get(f"r{r}", True), s.step, s.where, s.waits, 9.0) for r, s in before.items()}
    return before, after


def test_a_silent_rank_is_blamed() -> None:
    before, after = signs(r2=False)
    assert blame(before, after, set(), late=True).startswith(
        "rank 2 (step 7, in receive, transfers.py:80) gives no sign"
    )
    assert blame(before, after, {2}, late=True) == ""  # it has met an error, and said so
    assert blame(*signs(), set(), late=True) == ""
    before, after = signs(r1=False, r3=False)
    assert " and rank 3 (" in (said := blame(before, after, set(), late=False)) and "their machines are gone" in said


def test_a_busy_rank_is_blamed_if_it_was_waited_for() -> None:
    before, after = signs()
    after[3] = Sign(6, 7, "read, shards.py:12", False, 30.0)
    assert blame(before, after, set(), late=True) == (
        "rank 3 (step 7, in read, shards.py:12) kept the others waiting, and stood there for 30 s"
    )
    assert blame(before, after, set(), late=False) == ""  # whoever was cut off, it wasn't by this one


GLOO = (
    "[/builds/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:14017: Connection reset by peer."
)
GLOO += " This is typically caused by a remote worker hanging or bugs in the application. Check the logs. GLHF! 🏖️"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_words() -> None:
    lost = RuntimeError(GLOO)
    said = words(raised(PipelineError(f"rank 1, at forward of stage 0: {lost}"), lost))
    assert said == "at forward of stage 0: Read error [127.0.0.1]:14017: Connection reset by peer"
    own = KeyError("gate")
    assert words(raised(PipelineError(f"rank 1, at forward of stage 0: {own}"), own)) == (
        "at forward of stage 0: KeyError: 'gate'"
    )
    assert words(ValueError("too small")) == "too small"
    assert words(ZeroDivisionError("division by zero")) == "ZeroDivisionError: division by zero"
    assert words(SaveError("the checkpoint of step 3 was not saved")) == "the checkpoint of step 3 was not saved"
    assert words(PeerError("process 0 met an error")) == ""
