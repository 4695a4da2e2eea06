"""Two runs side by side."""

import json

import pytest

from dsv3_book.train.compare import compare, main, read


def step(number: int, loss: float, speed: float = 100.0, **more: float) -> dict:
    return {"step": number, "loss": loss, "loss_mtp": 2.0, "max_violation": 0.5, "tokens_per_second": speed, **more}


def write(folder, lines, settings=None):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        (folder / "run.json").write_text(json.dumps(settings))
    return folder


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_means_and_differences_over_shared_steps(tmp_path) -> None:
    a = [step(n, 4.0 - n / 8) for n in range(1, 17)]
    a += [
        {"step": 8, "val_loss": 3.5, "val_bits_per_byte": 1.5},
        {"step": 16, "val_loss": 3.0, "val_bits_per_byte": 1.25},
    ]
    b = [step(n, 4.0 - n / 8 + (n > 4) * 0.5, speed=150.0, max_violation=1.5) for n in range(1, 13)]
    b += [{"step": 8, "val_loss": 3.25, "val_bits_per_byte": 1.75}]
    text = compare(read(write(tmp_path / "a", a)), read(write(tmp_path / "b", b)))
    assert row(text, "steps done") == ["16", "12"]
    assert row(text, "loss at step 1") == ["3.8750", "3.8750", "+0.0000"]
    assert row(text, "loss at step 12") == ["2.5000", "3.0000", "+0.5000"]
    assert row(text, "loss, mean of steps 10 to 12") == ["2.6250", "3.1250", "+0.5000"]
    assert row(text, "MaxVio, mean of steps 10 to 12") == ["0.5000", "1.5000", "+1.0000"]
    assert row(text, "validation loss at step 8") == ["3.5000", "3.2500", "-0.2500"]
    assert row(text, "bits per byte at step 8") == ["1.5000", "1.7500", "+0.2500"]
    assert row(text, "tokens/s, median") == ["100", "150", "+50.0", "%"]
    assert "differ from step 1 on (there in max_violation)" in text
    assert "more than rounding (1e-05) from step 5 on: 3.375000 against 3.875000" in text


def test_equal_runs_and_runs_apart_by_rounding(tmp_path) -> None:
    lines = [step(n, 3.0) for n in range(1, 5)]
    a = read(write(tmp_path / "a", lines))
    b = read(write(tmp_path / "b", [line | {"tokens_per_second": 7.0} for line in lines]))
    assert "equal in every number, to the last digit, over all 4 steps" in compare(a, b)
    c = read(write(tmp_path / "c", [step(n, 3.0 + 1e-6 * (n > 2)) for n in range(1, 5)]))
    text = compare(a, c)
    assert "differ from step 3 on (there in loss)" in text and "within 1e-05 of each other" in text
    assert "No validation of the same step" in text


def test_a_difference_beside_its_scatter(tmp_path) -> None:
    a = read(write(tmp_path / "a", [step(n, 3.0) for n in range(1, 41)]))
    b = read(write(tmp_path / "b", [step(n, 3.1 + 0.01 * (-1) ** n) for n in range(1, 41)]))
    assert "Over these 10 steps B's loss is +0.1000 from A's, one step's gap scattering by 0.0105." in compare(a, b)


def test_settings_that_differ_are_named(tmp_path) -> None:
    a = write(tmp_path / "a", [step(1, 3.0)], {"out": "a", "seed": 0, "swap": {"router": None}})
    b = write(tmp_path / "b", [step(1, 3.0)], {"out": "b", "seed": 0, "swap": {"router": "my.py:R"}})
    text = compare(read(a), read(b))
    assert "my.py:R" in text.split("Settings that differ:")[1].split("\n\n")[0] and "seed" not in text


def test_what_cannot_be_compared(tmp_path, capsys) -> None:
    good = write(tmp_path / "good", [step(1, 3.0)])
    (tmp_path / "empty").mkdir()
    late = write(tmp_path / "late", [step(7, 3.0)])
    unbegun = write(tmp_path / "unbegun", [])
    for other, says in (
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path / "empty", "has no metrics.jsonl"),
        (late, "have no step in common"),
        (unbegun, "has no training step yet"),
    ):
        assert main([str(good), str(other)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and says in said and str(other) in said
    assert main([str(good), str(good)]) == 0
    assert "equal in every number" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
