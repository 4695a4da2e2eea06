"""Checkpoints of several ranks: any boxes in, any boxes out; and when one rank can't, all ranks know why."""

import contextlib
import errno
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from checkpointkit import blank, deal, same, wholes
from torch.distributed.checkpoint import FileSystemWriter

from dsv3_book import checkpoint
from dsv3_book.checkpoint import CheckpointError, SaveError, Slab
from dsv3_book.parallel import DataParallel
from dsv3_book.saver import Saver

pytestmark = pytest.mark.distributed


def here() -> DataParallel:
    return DataParallel(dist.get_rank(), dist.get_world_size())


def save(folder: Path, seed: int, step: int) -> str:
    values = deal(dist.get_rank(), dist.get_world_size(), seed, step)
    return checkpoint.save(folder, step, values, {"seed": seed}, here()).name


def load(path: Path, seed: int, step: int, copies: int) -> bool:
    held, expected = (deal(dist.get_rank(), dist.get_world_size(), seed, step, copies) for _ in range(2))
    checkpoint.load(path, blank(held), here())
    return same(held, expected)


# Any layout -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_boxes_of_four_ranks_fill_those_of_fewer(pool, tmp_path: Path, seed: int) -> None:
    assert pool(4).run(save, tmp_path, seed, step=seed) == [f"step-{seed:08}"] * 4
    path, state = checkpoint.latest(tmp_path)
    assert state["seed"] == seed
    assert load_alone(path, seed)
    for ranks in (2, 3, 4):
        assert all(pool(ranks).run(load, path, seed=100 * ranks + seed, step=seed, copies=ranks))


def load_alone(path: Path, step: int) -> bool:
    whole = blank(wholes(step))
    checkpoint.load(path, whole)
    return same(whole, wholes(step))


def shared(folder: Path) -> None:
    values = {f"w{i}": torch.full((1000,), i) for i in range(9)}
    checkpoint.save(folder, 1, values, {}, here())


def test_what_all_hold_is_written_once_and_by_all(pool, tmp_path: Path) -> None:
    pool(3).run(shared, tmp_path)
    files = json.loads((tmp_path / "step-00000001" / "state.json").read_text())["files"]
    sizes = [files[f"__{rank}_0.distcp"]["bytes"] for rank in range(3)]
    assert max(sizes) - min(sizes) < 1000 and 9 * 8000 < sum(sizes) < 12 * 8000


def misfit(path: Path, what: dict[int, dict]) -> str:
    try:
        checkpoint.load(path, what.get(dist.get_rank(), {"rng.0": torch.zeros(40, dtype=torch.uint8)}), here())
    except CheckpointError as error:
        return str(error)
    return "loaded"


def look(folder: Path) -> tuple[str, int]:
    said: list[str] = []
    path, _ = checkpoint.latest(folder, said.append, here()) or (Path(), {})
    return path.name, len(said)


def test_ranks_look_at_files_in_turn_and_find_the_same(pool, tmp_path: Path) -> None:
    for step in (1, 2):
        pool(4).run(save, tmp_path, 0, step)
    assert pool(3).run(look, tmp_path) == [("step-00000002", 0)] * 3
    files = json.loads((tmp_path / "step-00000002" / checkpoint.STATE).read_text())["files"]
    assert len(files) == 5  # of four ranks, and the table
    for name in files:
        victim = tmp_path / "step-00000002" / name
        good = victim.read_bytes()
        victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert pool(3).run(look, tmp_path) == [("step-00000001", 2)] * 3, name
        victim.write_bytes(good)


def look_blindly(folder: Path) -> str:
    """One rank can't read at all, as on a host whose disk fails."""
    failing = patch("dsv3_book.checkpoint.sha256", side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with failing if dist.get_rank() == 1 else contextlib.nullcontext(), pytest.raises(OSError) as error:
        checkpoint.latest(folder, parallel=here())
    return str(error.value)


def test_a_rank_that_can_not_look_is_no_damage(pool, tmp_path: Path) -> None:
    """Else all would go on from an older one."""
    for step in (1, 2):
        pool(2).run(save, tmp_path, 0, step)
    said = pool(2).run(look_blindly, tmp_path)
    assert said[0] == said[1] and "step-00000002: rank 1: PermissionError: [Errno 13] Permission denied" in said[0]


def test_what_does_not_fit_one_rank_is_an_error_on_all(pool, tmp_path: Path) -> None:
    pool(4).run(save, tmp_path, 0, step=1)
    path = tmp_path / "step-00000001"
    wrong = {1: {"model.none": torch.zeros(1)}, 2: {"model.matrix": Slab(torch.zeros(2, 11), (6, 11), (3, 0))}}
    messages = set(pool(3).run(misfit, path, wrong))
    (message,) = messages
    assert "rank 1: " in message and "missing ['model.none']" in message
    assert "rank 2: " in message and "other dtypes: ['model.matrix torch.bfloat16 (here torch.float32)']" in message


# While training goes on -----------------------------------------------------------------------------------------------
@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    event, original = threading.Event(), FileSystemWriter.write_data

    def write_data(self, plan, planner):
        event.wait()
        return original(self, plan, planner)

    with patch.object(FileSystemWriter, "write_data", write_data):
        yield event


def change_at_once(folder: Path) -> tuple[bool, bool]:
    """Whether saves were under way while their tensors changed, and whether the second used the first one's memory."""
    rank, size = dist.get_rank(), dist.get_world_size()
    saver, busy, places = Saver(folder, here()), [], []
    for step in (1, 2):
        values = deal(rank, size, seed=5, step=step)
        with held_back() as event:
            saver.start(step, values, {})
            busy.append(saver.thread.is_alive() and not (folder / checkpoint.name_of(step)).exists())
            blank(values)
            event.set()
            path = saver.wait()
        assert path == folder / checkpoint.name_of(step) and saver.problem() is None
        places.append({place: kept.data_ptr() for place, kept in saver.kept.items()})
    saver.close()
    return all(busy), places[0] == places[1]


def test_a_snapshot_is_what_was_there_at_the_start(pool, tmp_path: Path) -> None:
    assert pool(3).run(change_at_once, tmp_path) == [(True, True)] * 3
    for step in (1, 2):
        assert load_alone(tmp_path / checkpoint.name_of(step), step)


def one_after_the_other(folder: Path) -> list[str]:
    saver = Saver(folder, here(), keep=2)
    assert saver.wait() is None
    for step in range(1, 6):
        saver.start(step, deal(dist.get_rank(), dist.get_world_size(), seed=step, step=step), {})
    saver.close()
    return sorted(path.name for path in folder.iterdir())


def test_a_start_finishes_the_save_before_and_two_are_kept(pool, tmp_path: Path) -> None:
    assert pool(2).run(one_after_the_other, tmp_path) == [["step-00000004", "step-00000005"]] * 2
    assert load_alone(tmp_path / "step-00000004", 4) and load_alone(tmp_path / "step-00000005", 5)


# When it can't be saved -----------------------------------------------------------------------------------------------
class Odd(Exception):
    """An exception that cannot travel to another process."""

    def __init__(self, a: int, b: object) -> None:
        super().__init__("something odd")
        self.b = b

    def __reduce__(self) -> tuple:
        raise TypeError("not to be pickled")


def raises(error: Exception) -> Callable:
    def fail(*args, **kwargs):
        raise error

    return fail


def full_disk(self, plan, planner):
    """Part of the file is there, then the disk is full, as torch finds it: the reason hidden behind its own error."""
    (Path(self.path) / f"{plan.storage_data.prefix}0.distcp").write_bytes(b"half")
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904


def vanishes(self, plan, planner):
    """Written to a disk that rank 0 doesn't see."""
    done = original_write(self, plan, planner)
    lost = Path(self.path) / f"{plan.storage_data.prefix}0.distcp"
    checkpoint_facts = checkpoint.facts_of(lost)
    lost.unlink()
    checkpoint.facts_of = lambda path: checkpoint_facts
    return done


original_write, original_facts = FileSystemWriter.write_data, checkpoint.facts_of
FAULTS: dict[str, tuple[int, object, str, object]] = {
    "full disk": (2, FileSystemWriter, "write_data", full_disk),
    "no permission": (1, FileSystemWriter, "write_data", raises(PermissionError(errno.EACCES, "Permission denied"))),
    "odd": (2, FileSystemWriter, "write_data", raises(Odd(1, 2))),
    "planning": (1, checkpoint.Writing, "create_local_plan", raises(ValueError("no plan"))),
    "rank 0 at the end": (0, checkpoint, "write_text", raises(OSError(errno.EIO, "Input/output error", "state.json"))),
    "copying": (1, Saver, "_snapshot", raises(RuntimeError("can't allocate memory"))),
    "not shared": (2, FileSystemWriter, "write_data", vanishes),
}
MESSAGES = {
    "full disk": r"rank 2: cannot write .*/\.saving-step-00000002/__2_0\.distcp: No space left on device \(free some",
    "no permission": r"rank 1: cannot write .*__1_0\.distcp: Permission denied \(make it writable",
    "odd": r"rank 2: Odd: something odd",
    "planning": r"rank 1: no plan",
    "rank 0 at the end": r"rank 0: cannot write state\.json: Input/output error \(look at that disk\)",
    "copying": r"rank 1: RuntimeError: can't allocate memory",
    "not shared": r"rank 0: cannot write .*__2_0\.distcp: rank 0 does not see .*storage that all ranks share",
}


def fail(folder: Path, fault: str) -> tuple[str, str, list[str]]:
    rank, where, what, instead = FAULTS[fault]
    saver = Saver(folder, here())
    values = lambda step: deal(dist.get_rank(), dist.get_world_size(), seed=step, step=step)
    saver.start(1, values(1), {})
    saver.wait()
    with patch.object(where, what, instead) if dist.get_rank() == rank else patch.dict({}):
        saver.start(2, values(2), {})
        saver.thread.join()
        told = str(saver.problem())
        with pytest.raises(SaveError) as caught:
            saver.start(3, values(3), {})
        checkpoint.facts_of = original_facts
    left = sorted(path.name for path in folder.iterdir())
    assert saver.problem() is None and saver.thread is None
    dist.barrier()
    saver.start(3, values(3), {})
    assert saver.wait() == folder / "step-00000003"
    saver.close()
    return told, str(caught.value), left


@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_learn_why_one_could_not_write(pool, tmp_path: Path, fault: str) -> None:
    answers = pool(3).run(fail, tmp_path, fault)
    assert len({told for told, _, _ in answers}) == len({raised for _, raised, _ in answers}) == 1
    told, raised, left = answers[0]
    assert told == raised and left == ["step-00000001"]  # nothing half-written, and the one before
    assert re.match(rf"the checkpoint of step 2 was not saved: {MESSAGES[fault]}.* Earlier ones are untouched$", told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert load_alone(tmp_path / "step-00000003", 3)


def blocked(folder: Path) -> str:
    try:
        checkpoint.save(folder, 1, {"a": torch.zeros(2)}, {}, here())
    except SaveError as error:
        return str(error)
    return "saved"


def test_a_file_where_the_folder_should_be(pool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    (message,) = set(pool(2).run(blocked, tmp_path / "checkpoints"))
    assert f"rank 0: cannot write {tmp_path / 'checkpoints'}: File exists (something that is no folder" in message
    (message,) = set(pool(2).run(blocked, tmp_path / "checkpoints" / "below"))
    assert "Not a directory (something that is no folder is in the way: move it)" in message


def disagree(folder: Path) -> str:
    try:
        checkpoint.save(folder, 1, {"a": torch.zeros(2 + dist.get_rank())}, {}, here())
    except SaveError as error:
        return str(error)
    return "saved"


def test_ranks_that_disagree_save_nothing(pool, tmp_path: Path) -> None:
    (message,) = set(pool(2).run(disagree, tmp_path))
    assert "the ranks disagree about a: " in message and not list(tmp_path.iterdir())


def late(folder: Path) -> str:
    """Rank 1 never writes, until rank 0 has given up."""
    saver = Saver(folder, here(), timeout=2)
    with held_back() as event:
        if dist.get_rank() == 0:
            event.set()
        saver.start(1, {"a": torch.zeros(3), f"b{dist.get_rank()}": torch.zeros(3)}, {})
        said = ""
        for rank in range(2):
            if rank == dist.get_rank():
                event.set()
                with pytest.raises(SaveError) as caught:
                    saver.wait()
                said = str(caught.value)
            dist.barrier()
    saver.close()
    return said


def test_a_rank_that_hangs_is_waited_for_as_long_as_agreed(pool, tmp_path: Path) -> None:
    for said in pool(2).run(late, tmp_path):
        assert "of step 1 with ranks [0, 1] did not finish" in said
    assert not checkpoint.found(tmp_path)
