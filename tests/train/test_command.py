"""The command itself: one line for a mistake, status 2; and a whole run under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainkit import lines

from dsv3_book.train.__main__ import main

TINY = "--preset tiny --steps 2 --model.num-hidden-layers 2 --batch.sequence-length 16 --text.held-out 0.2"


def command(out: Path, corpus: Path, more: str = "") -> list[str]:
    return [*TINY.split(), "--out", str(out), "--data", str(corpus), *more.split()]


def test_trains_writes_a_sample_and_says_when_it_is_finished(tmp_path, corpus, capsys) -> None:
    assert main(command(tmp_path / "run", corpus, "--pause-at 1")) == 0
    assert "stopped after step 1 of 2" in (paused := capsys.readouterr()).err
    assert "The same command goes on from there" in paused.err and paused.out == ""
    assert main(command(tmp_path / "run", corpus)) == 0
    first = capsys.readouterr()
    assert "going on after step 1 of 2" in first.err and "A sample after 'def '" in first.out
    assert main(command(tmp_path / "run", corpus)) == 0
    again = capsys.readouterr()
    assert "is finished: all 2 steps are done" in again.err
    assert again.out == first.out


def test_a_model_too_large_for_a_sample_has_been_trained_all_the_same(tmp_path, corpus, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dsv3_book.train.__main__.free_memory", lambda: 1000)
    assert main(command(tmp_path / "run", corpus)) == 0
    said = capsys.readouterr()
    assert "no sample: the model has 0.0 GB, and 0.0 GB of memory are free here" in said.err and said.out == ""
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--preset huge", "unknown preset 'huge'"),
        ("--data no/such/folder", "no/such/folder"),
        ("--text.tokenizer no/such/tokenizer.json", "no/such/tokenizer.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, corpus, capsys, more: str, message: str) -> None:
    assert main(command(tmp_path / "run", corpus, more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "   \n", "no text in"),
        ("rows.jsonl", '{"text": "one"}\n{"body": "two"}\n', "rows.jsonl:2"),
    ],
)
def test_text_without_text(tmp_path, corpus, capsys, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    assert main(command(tmp_path / "run", tmp_path / name)) == 2
    assert message in capsys.readouterr().err


def test_an_undecodable_file_is_skipped_and_named(tmp_path, corpus, capsys) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 100)
    assert main(command(tmp_path / "run", corpus, f"{tmp_path / 'binary.txt'}")) == 0
    assert "1 skipped: " in (said := capsys.readouterr().err) and "binary.txt" in said


def test_all_checkpoints_damaged(tmp_path, corpus, capsys) -> None:
    assert main(command(tmp_path / "run", corpus)) == 0
    for file in (tmp_path / "run" / "checkpoints").glob("*/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    assert main(command(tmp_path / "run", corpus)) == 2
    said = capsys.readouterr().err
    assert "is truncated" in said and "delete" in said


@pytest.mark.distributed
def test_two_processes_under_torchrun(tmp_path, corpus) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "dsv3_book.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = "--batch.micro 2 --seed 5"
    done = subprocess.run(
        [*torchrun, *command(tmp_path / "two", corpus, more)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A sample after") == 1 and done.stderr.count("training 2 steps") == 1
    assert main(command(tmp_path / "one", corpus, more)) == 0
    for x, y in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert y == pytest.approx(x, rel=1e-5)


def test_a_mistake_under_torchrun_is_told_once(tmp_path) -> None:
    """What process 0 says, and others don't (their environment is torchrun's; the processes are not needed for it)."""
    told = []
    for rank in "01":
        words = [sys.executable, "-m", "dsv3_book.train", "--preset", "huge", "--out", str(tmp_path)]
        files = {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json")}
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | files)
        assert done.returncode == 2
        assert "unknown preset 'huge'" in (tmp_path / f"{rank}.json").read_text()  # torchrun's summary quotes it
        told.append(done.stderr)
    assert told == ["error: unknown preset 'huge': choose one of tiny, laptop, v3-16b, v3-671b\n", ""]
