"""kill -9 while a checkpoint is saved: at every single operation on the disk, and at random moments of two ranks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpointkit import blank, same, wholes

from dsv3_book import checkpoint

pytestmark = pytest.mark.distributed

# A child saves over a copy of a run's folder and dies at its nth operation on the disk; then for n + 1; until it lives.
EVERY_OPERATION = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
import checkpointkit as kit
from dsv3_book import checkpoint
from dsv3_book.parallel import DataParallel

template, step, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.fsync"}

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(number):
    count = itertools.count(1)
    def at(event, args):
        if event in EVENTS and next(count) == number:
            die()
    sys.addaudithook(at)
    sync = os.fsync
    os.fsync = lambda handle: (at("os.fsync", handle), sync(handle))

def check(folder):
    path, state = checkpoint.latest(folder)
    found = kit.blank(kit.wholes())
    checkpoint.load(path, found)
    assert kit.same(found, kit.wholes(state["made"])), (folder, state)
    return state["step"], state["made"]

def save(folder, step, made, keep):
    checkpoint.save(folder, step, kit.wholes(made), {"made": made}, DataParallel(), keep)

def child(prepare, *args):
    process = os.fork()
    if process == 0:
        prepare()
        save(*args)
        os._exit(0)
    return os.waitpid(process, 0)[1]

def die_when_writing():
    FileSystemWriter.write_data = die

for number in itertools.count(1):
    folder = template.parent / f"{template.name}-{number}"
    shutil.copytree(template, folder)
    status = child(lambda: die_at(number), folder, step, 90, keep)
    before = check(folder)
    print(number, status, *before, flush=True)
    assert child(die_when_writing, folder, 8, 80, keep) == signal.SIGKILL  # the next one tidies up, and dies too
    assert check(folder) == before
    save(folder, 9, 99, keep)
    assert check(folder) == (9, 99)
    assert not list(folder.glob(".*")), list(folder.iterdir())  # nothing is left behind
    assert len(list(folder.iterdir())) == keep
    if status == 0:
        break
    assert status == signal.SIGKILL
    shutil.rmtree(folder)
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("step", "before", "after"), [(3, (2, 2), (3, 90)), (2, (2, 2), (2, 90))])
def test_a_kill_at_any_operation_leaves_a_good_checkpoint(tmp_path: Path, step: int, before, after) -> None:
    """A new step; and one of a step that is there, which is for a moment neither the one nor the other."""
    keep = step - 1  # 2 of (1, 2, 3); 1 of (2, 2), so that there is no other to fall back to
    for made in range(3 - keep, 3):
        checkpoint.save(tmp_path / "run", made, wholes(made), {"made": made}, checkpoint.DataParallel(), keep)
    command = [sys.executable, "-c", EVERY_OPERATION, str(tmp_path / "run"), str(step), str(keep)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) > 20 and lines[0][2:] == before and lines[-1][1:] == (0, *after)
    assert [line[2:] for line in lines] == sorted(line[2:] for line in lines)  # once it is there, it stays


# Two ranks save one checkpoint after the other, in the background.
TWO_RANKS = """
import datetime, itertools, sys
from pathlib import Path
import torch.distributed as dist
import checkpointkit as kit
from dsv3_book.checkpoint import SaveError
from dsv3_book.parallel import DataParallel
from dsv3_book.saver import Saver

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = f"file://{folder}/store"
dist.init_process_group("gloo", store, datetime.timedelta(seconds=300), rank=rank, world_size=2)
saver = Saver(folder / "checkpoints", DataParallel(rank, 2))
try:
    for step in itertools.count(1):
        values = kit.deal(rank, 2, seed=step, step=step)
        saver.start(step, values, {})
        kit.blank(values)
except SaveError as error:
    saver.close()
    sys.exit(f"SaveError: {error}")
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_a_rank_at_a_random_moment(tmp_path: Path, victim: int) -> None:
    command = [sys.executable, "-c", TWO_RANKS, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        while not checkpoint.found(tmp_path / "checkpoints"):
            assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1]
            time.sleep(0.01)
        time.sleep(random.Random().uniform(0, 0.3))
        ranks[victim].send_signal(signal.SIGKILL)
        said = ranks[1 - victim].communicate(timeout=400)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[1 - victim].returncode == 1 and "SaveError: the checkpoint of step" in said, said
    assert "with ranks [0, 1] did not finish" in said
    path, state = checkpoint.latest(tmp_path / "checkpoints")
    whole = blank(wholes())
    checkpoint.load(path, whole)
    assert same(whole, wholes(state["step"]))
    checkpoint.save(tmp_path / "checkpoints", state["step"] + 1, whole, {}, checkpoint.DataParallel())
    assert not list((tmp_path / "checkpoints").glob(".*"))


# A process whose main thread fails while its save can't end, because the other rank hangs.
RAISES = """
import datetime, sys, threading
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from dsv3_book import saver as module
from dsv3_book.parallel import DataParallel

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", f"file://{folder}/store", datetime.timedelta(seconds=600), rank=rank, world_size=2)
module.GRACE = 0.5
saver = module.Saver(folder / "checkpoints", DataParallel(rank, 2))
writing = threading.Event()
original = FileSystemWriter.write_data
def write_data(self, plan, planner):
    if rank == 1:
        threading.Event().wait()
    result = original(self, plan, planner)
    writing.set()
    return result
FileSystemWriter.write_data = write_data
saver.start(1, {f"a{rank}": torch.zeros(3)}, {})
writing.wait()
raise ValueError("the step failed")
"""


def test_a_process_that_fails_while_a_save_hangs_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RAISES, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = ranks[0].communicate(timeout=300)[1]  # the other rank would keep it for ten minutes
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    # 1; or SIGABRT, where the end of Python meets the thread in Python and not in its wait for the other rank
    assert ranks[0].returncode in (1, -signal.SIGABRT) and "ValueError: the step failed" in said
    assert not checkpoint.found(tmp_path / "checkpoints")
