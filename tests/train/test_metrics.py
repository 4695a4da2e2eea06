"""metrics.jsonl across stops, and what people see."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3_book.train import live, loads
from dsv3_book.train.live import Live, clock, percent, size
from dsv3_book.train.metrics import Metrics, MetricsFile, read_lines

LINE = {"loss": 1.0, "loss_mtp": 1.0, "max_violation": 0.5, "tokens_per_second": 100.0}
VALIDATION = {"val_loss": 1.0, "val_bits_per_byte": 2.0, "val_tokens": 10}
ROUTERS = ["layers.1.mlp.gate", "layers.2.mlp.gate"]
MACHINE = {"mfu": 0.414, "memory": 3 * 2**29, "bubble": 0.125}


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


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(live.time, "monotonic", lambda: self.now)


def test_plain_lines_are_not_a_flood(tmp_path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    with Metrics(tmp_path, 1000, ROUTERS[:1]).after(0) as run:
        for step in range(1, 1001):
            clock.now += 0.1
            run.step({"step": step, "tokens": step * 10, **LINE, **MACHINE}, torch.tensor([[3.0, 1.0]]))
    said = capsys.readouterr().err.splitlines()
    assert 5 <= len(said) <= 12  # 100 seconds, a line every ten
    assert said[-1] == (
        "step 1000/1000  loss 1.000  mtp 1.000  MaxVio 0.50  100 tokens/s  MFU 41%  memory 1.5 GiB  bubble 12%  "
        "0:00 left"
    )
    assert said[1].startswith("step 102/1000") and said[1].endswith("1:30 left")  # 898 steps of 0.1 s
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1000


def test_what_is_not_known_is_not_shown(tmp_path, capsys: pytest.CaptureFixture) -> None:
    with Metrics(tmp_path, 1).after(0) as run:
        run.step({"step": 1, "tokens": 10, **LINE, "bubble": 0.0})
    assert capsys.readouterr().err == "step 1/1  loss 1.000  mtp 1.000  MaxVio 0.50  100 tokens/s\n"


@pytest.mark.parametrize("width", [80, 60, 40])
def test_on_a_terminal_lines_fit_or_break_between_numbers(width: int, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    view = Live(console, 243_000, 10)
    for step in (11, 12):
        clock.now += 3.0
        view.show({"step": step, "tokens": step * 63_000_000, **LINE, **MACHINE})
    with console.capture() as shown:
        for each in view.get_renderables():
            console.print(each)
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines[1:])
    numbers = ["loss 1.000", "mtp 1.000", "MaxVio 0.50", "21,000,000 tokens/s", "MFU 41%", "memory 1.5 GiB"]
    assert all(part in text for part in [*numbers, "bubble 12%"])
    if width >= 60:
        assert len(lines) == 3
    if width == 80:
        assert "step 12/243000" in lines[0] and "202:29:24 left" in lines[0]
    assert console.file.getvalue() == ""  # a terminal has the bar and gets no lines


def test_the_bar_is_for_terminals_alone(tmp_path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    with Metrics(tmp_path, 2, quiet=True).after(0) as run:
        run.step({"step": 1, "tokens": 1, **LINE})
        run.say("hello")
    assert not run.live.drawn and capsys.readouterr().err == ""


def board(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_scalars_of_each_router_and_heat_maps(tmp_path) -> None:
    with Metrics(tmp_path, 4, ROUTERS, quiet=True).after(0) as run:
        run.validation({"step": 0, **VALIDATION})  # no load is known yet
        for step in range(1, 5):
            load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 4.0 * step, 2.0, 2.0]])
            run.step({"step": step, "tokens": step, **LINE}, load)
            if step % 2 == 0:
                run.validation({"step": step, **VALIDATION, "val_loss_ema": 0.5, "val_xz_bits_per_byte": None})
    found = board(tmp_path)
    second = [(event.step, round(event.value, 4)) for event in found.Scalars(f"max_violation/{ROUTERS[1]}")]
    assert second == [(1, 1.0), (2, 1.6667), (3, 2.0), (4, 2.2)]
    assert [event.value for event in found.Scalars(f"max_violation/{ROUTERS[0]}")] == [0.0] * 4
    assert [event.step for event in found.Scalars("validation/val_loss_ema")] == [2, 4]
    pictures = found.Images("load over mean")
    assert [picture.step for picture in pictures] == [2, 4]
    assert Image.open(io.BytesIO(pictures[0].encoded_image_string)).size == (640, 182)


def test_a_heat_map_shows_which_expert_is_busy() -> None:
    """Dark to light is nothing to twice the mean; rows and columns stand where their names do."""
    load = np.array([[0.0, 2.0, 4.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    fig = loads.load_figure(load, ["layer 1", "layer 2"])
    bright = loads.pixels(fig).astype(float).mean(-1)
    axes = fig.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layer 1", "layer 2"]

    def at(expert: int, router: int) -> float:
        x, y = axes.transData.transform((expert, router))
        return bright[bright.shape[0] - 1 - round(y), round(x)]

    assert at(0, 0) < at(1, 0) < at(2, 0) and at(1, 0) == at(3, 0) == at(0, 1)


def test_relative_loads() -> None:
    assert np.array_equal(loads.relative(np.array([[1, 3], [0, 0]])), [[0.5, 1.5], [1.0, 1.0]])
    assert loads.label("layers.12.mlp.gate") == "layer 12" and loads.label("own") == "own"


def run_to(folder: Path, first: int, last: int, steps: int) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    with Metrics(folder, steps, ROUTERS, quiet=True).after(first) as run:
        for step in range(first + 1, last + 1):
            run.step({"step": step, "tokens": step, **LINE}, torch.full((2, 3), float(step)))
    return read_lines(folder / "load.jsonl")


def test_loads_are_kept_about_a_hundred_times_and_across_stops(tmp_path) -> None:
    whole = run_to(tmp_path / "whole", 0, 250, 251)
    assert [line["step"] for line in whole] == list(range(2, 251, 2))
    assert whole[0] == {"step": 2, "load": [[2, 2, 2], [2, 2, 2]]}
    run_to(tmp_path / "cut", 0, 7, 251)  # killed; the last checkpoint is of step 4
    assert run_to(tmp_path / "cut", 4, 250, 251) == whole
    assert run_to(tmp_path / "whole", 250, 251, 251)[-1]["step"] == 251


def test_the_silent_one_writes_nothing(tmp_path, capsys: pytest.CaptureFixture) -> None:
    with Metrics(None, 10).after(0) as run:
        run.step({"step": 1, "tokens": 1, **LINE})
        run.validation({"step": 1})
        run.say("hello")
    assert capsys.readouterr().err == ""


def test_without_routers(tmp_path) -> None:
    with Metrics(tmp_path, 1, quiet=True).after(0) as run:
        run.step({"step": 1, "tokens": 1, **LINE}, torch.zeros(0, 4))
        run.validation({"step": 1, **VALIDATION})
    assert read_lines(tmp_path / "load.jsonl") == []


def test_clock_percent_and_size() -> None:
    assert [percent(x) for x in (0.414, 0.1, 0.0414, 0.0)] == ["41%", "10%", "4.1%", "0.0%"]
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert [size(n) for n in (600 * 2**20, 2**30, 80.5 * 2**30)] == ["600 MiB", "1.0 GiB", "80.5 GiB"]
