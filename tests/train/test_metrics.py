"""metrics.jsonl across stops, and what people see."""

import json

import pytest

from dsv3_book.train import metrics
from dsv3_book.train.metrics import Metrics, MetricsFile, clock, read_lines

LINE = {"loss": 1.0, "loss_mtp": 1.0, "max_violation": 0.5, "tokens_per_second": 100.0}


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "val_loss": 3}\n{"step": 3}\n{"st')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "a": 3.5})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "a": 1},
        {"step": 2, "a": 2},
        {"step": 2, "val_loss": 3},
        {"step": 3, "a": 3.5},
    ]


def test_a_new_run_begins_an_empty_file(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_reading_stops_at_the_first_broken_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    assert read_lines(path) == [{"step": 1}]


def test_plain_lines_are_not_a_flood(tmp_path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 1000, ["layers.1.mlp.gate"]).after(0) as run:
        for step in range(1, 1001):
            now[0] += 0.1
            run.step({"step": step, "tokens": step * 10, **LINE}, [0.5])
    said = capsys.readouterr().err.splitlines()
    assert 5 <= len(said) <= 12  # 100 seconds, a line every ten
    assert said[-1].startswith("step 1000/1000") and "100 tokens/s" in said[-1] and "MaxVio 0.50" in said[-1]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1000
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_silent_one_writes_nothing(tmp_path, capsys: pytest.CaptureFixture) -> None:
    with Metrics(None, 10).after(0) as run:
        run.step({"step": 1, "tokens": 1, **LINE})
        run.validation({"step": 1})
        run.say("hello")
    assert capsys.readouterr().err == ""


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
