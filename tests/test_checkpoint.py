"""Checkpoints: whole or not there, checked before they are trusted."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from dsv3_book import checkpoint
from dsv3_book.checkpoint import CheckpointError, SaveError, check, differences, found, latest, load, save
from dsv3_book.parallel import DataParallel

ALONE = DataParallel()


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(3, 4, generator=draw),
        "model.b": torch.randn(2, 3, 4, generator=draw).to(torch.bfloat16),
        "optimizer.a.step": torch.tensor(float(seed)),
        "rng.0": torch.get_rng_state(),
    }


def written(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        save(folder, step, tensors(step), {"tokens": step * 10}, ALONE, keep)
    return folder


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7, tensors(7), {"tokens": 70}, ALONE)
    assert path.name == "step-00000007"
    state = check(path)
    assert (state["step"], state["tokens"]) == (7, 70)
    empty = {name: torch.zeros_like(value) for name, value in tensors(7).items()}
    load(path, empty)
    assert all(torch.equal(empty[name], value) for name, value in tensors(7).items())
    assert checkpoint.names(path) == set(empty)
    some = {"model.a": torch.zeros(3, 4)}
    load(path, some)
    assert torch.equal(some["model.a"], tensors(7)["model.a"])


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 10, keep=2)
    assert [step for step, _ in found(tmp_path)] == [10, 2]
    path, state = latest(tmp_path)
    assert (path.name, state["step"]) == ("step-00000010", 10)
    assert latest(tmp_path / "nothing") is None


def test_a_crash_while_saving_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 1)
    for where, what in (
        (FileSystemWriter, "write_data"),
        (FileSystemWriter, "finish"),
        (checkpoint, "facts_of"),
        (checkpoint, "write_text"),
        (Path, "rename"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, crash)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2, tensors(2), {}, ALONE)
        assert latest(tmp_path)[1]["step"] == 1
    written(tmp_path, 2)
    assert latest(tmp_path)[1]["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]  # what was left behind is gone


def crash(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", shorten, "is truncated: .* bytes, .* were saved"),
        ("__0_0.distcp", flip, "is corrupt: its checksum"),
        ("__0_0.distcp", Path.unlink, "is missing"),
        (".metadata", shorten, "is truncated"),
        (".metadata", flip, "is corrupt"),
        ("state.json", shorten, "is damaged: it is not the JSON that was saved"),
        ("state.json", Path.unlink, "is missing: the checkpoint is not complete"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str, damage, message: str) -> None:
    written(tmp_path, 1, 2)
    damaged = tmp_path / "step-00000002" / name
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as error:
        check(damaged.parent)
    assert str(damaged) in str(error.value)
    said: list[str] = []
    assert latest(tmp_path, said.append)[1]["step"] == 1
    assert str(damaged) in said[0] and said[1] == "warning: falling back to the checkpoint of step 1"
    written(tmp_path, 2)  # the run comes by again, and replaces it
    assert check(damaged.parent)["step"] == 2


def test_when_all_are_damaged_the_remedy_is_named(tmp_path: Path) -> None:
    written(tmp_path, 1)
    shorten(tmp_path / "step-00000001" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*truncated.*Restore one .*, or delete .* again"):
        latest(tmp_path)


def test_a_damaged_one_that_is_newer_takes_nobodys_place(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 9)
    shorten(tmp_path / "step-00000009" / "__0_0.distcp")
    written(tmp_path, 4, keep=2)
    assert [step for step, _ in found(tmp_path)] == [9, 4, 3]
    assert latest(tmp_path, lambda line: None)[1]["step"] == 4


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """A real failure of the system's, which torch's writer turns into an error of its own that tells nothing."""
    resource = pytest.importorskip("resource")
    written(tmp_path, 1)
    large = {"model.a": torch.zeros(500_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(
            SaveError, match=r"step 2 was not saved: cannot write .*__0_0\.distcp: File too large \(raise"
        ):
            save(tmp_path, 2, large, {}, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-00000001"]
    save(tmp_path, 2, large, {}, ALONE)
    assert latest(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (99, "a newer")])
def test_another_format(tmp_path: Path, version: int, age: str) -> None:
    path = written(tmp_path, 1) / "step-00000001"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": version}))
    with pytest.raises(
        CheckpointError, match=f"has format {version}, of {age} version of dsv3_book, .* go on with that"
    ):
        check(path)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(), {}, ALONE)
    with pytest.raises(
        CheckpointError, match=r"missing \['model.c'\]; other shapes: \['model.a \(3, 4\) \(here \(4, 4\)"
    ):
        load(path, {"model.a": torch.zeros(4, 4), "model.c": torch.zeros(1)})


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("echo it ran",)


def test_a_table_of_contents_cannot_run_code(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = save(tmp_path, 1, tensors(), {}, ALONE)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"names (posix|nt)\.system, which has no place there: refused"):
        load(path, {"model.a": torch.zeros(3, 4)})
    (path / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="no checkpoint's table of contents"):
        load(path, {"model.a": torch.zeros(3, 4)})
    assert "it ran" not in capfd.readouterr().out


def test_entries_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model.a": {"not": "a tensor"}}, checkpoint_id=path, no_dist=True)
    with pytest.raises(CheckpointError, match=r"not tensors: \['model.a"):
        load(path, {"model.a.not": torch.zeros(1)})


def test_differences_are_written_with_dots() -> None:
    before = {"a": 1, "model": {"x": 1, "y": 2}, "gone": 0}
    assert differences(before, {"a": 1, "model": {"x": 1, "y": 3}}) == ["gone: 0 → absent", "model.y: 2 → 3"]
