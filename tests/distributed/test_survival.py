"""Real processes under torchrun that are killed, stopped, told to end, hang, fail, or find their folder taken.

Where a run has come is read in its files, and how far it may go on a leash is written into one: nothing here depends on
how fast the machine is. The faults that need no torchrun are in `test_faults.py`.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsv3_book import checkpoint
from dsv3_book.parallel import DataParallel
from dsv3_book.train.__main__ import main
from dsv3_book.train.presets import from_command_line
from dsv3_book.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import soak

pytestmark = pytest.mark.distributed
STEPS, EVERY = 36, soak.INTERVAL
FAULTY = (str(Path(__file__).parent / "faulty.py"),)


def arguments(corpus: Path) -> list[str]:
    more = ["--steps", str(STEPS), "--every.checkpoint", str(EVERY), "--every.keep", "3", "--data", str(corpus)]
    return [*soak.SETTINGS.split(), *more]


class Leashed(soak.Run):
    """A run that goes as far as it is allowed to."""

    def __init__(self, out: Path, words: list[str], restarts: int = 0, **environment: str) -> None:
        self.leash = out.parent / f"{out.name}.leash"
        if not self.leash.exists():
            self.allow(0)
        super().__init__(out, words, restarts, FAULTY, LEASH=str(self.leash), **environment)

    def allow(self, steps: int) -> None:
        temporary = self.leash.with_suffix(".new")
        temporary.write_text(str(steps))
        os.replace(temporary, self.leash)

    def upto(self, steps: int) -> None:
        """Lets it do so many, and waits for them."""
        self.allow(steps)
        assert self.until(lambda: self.step() == steps), self.said()

    def says(self, words: str) -> None:
        assert self.until(lambda: words in self.said()), self.said()


@pytest.fixture
def start(tmp_path: Path, corpus: Path) -> Iterator[Callable[..., Leashed]]:
    """`start(name, restarts, more words, LEASH=…, FAULT=…)`: a run, which is stopped after the test at the latest."""
    runs = []

    def begin(name: str, restarts: int = 0, words: str = "", **environment: str) -> Leashed:
        runs.append(Leashed(tmp_path / name, [*arguments(corpus), *words.split()], restarts, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


@pytest.fixture(scope="module")
def undisturbed(pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, from beginning to end at once, in two processes that are there already."""
    out = tmp_path_factory.mktemp("survival") / "undisturbed"
    words = [*arguments(corpus), "--out", str(out)]

    def train() -> None:
        trainer = Trainer(from_command_line(words), DataParallel.from_environment(), quiet=True)
        assert trainer.run()
        trainer.close()

    pool(2).run(train, timeout=1000)
    return out


def require_same(run: soak.Run, undisturbed: Path) -> None:
    assert soak.metrics(run.out) == soak.metrics(undisturbed)
    assert soak.weights(run.out) == soak.weights(undisturbed)


def errors(run: soak.Run) -> list[str]:
    return [line for line in run.said().splitlines() if line.startswith("error:")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's workers in /proc")
class TestSurvival:
    def test_killed_at_random_moments(self, start, undisturbed: Path) -> None:
        """One rank, both, and one while it starts again."""
        run = start("killed", restarts=9)
        aims = ("any", "any", "starting")
        kills = soak.disturb(run, STEPS, 3, seed=int.from_bytes(os.urandom(2)), aims=aims, allow=run.allow)
        said = run.finish(kills)
        assert len(kills) == 3, said
        # An interval, and where a save was under way, which is lost, the steps that were done meanwhile; never another
        # interval, for a save waits for the one before.
        assert all(0 <= kill.repeated < 2 * EVERY for kill in kills), kills
        require_same(run, undisturbed)
        assert "A sample after" in said

    def test_told_to_stop_disk_full_and_folder_taken(self, start, undisturbed: Path, corpus: Path, capsys) -> None:
        """SIGTERM to a worker, then to torchrun; meanwhile saves fail, and two others want the folder."""
        run = start("stopped")
        run.upto(EVERY + 1)
        words = [*arguments(corpus), "--out", str(run.out)]
        assert main([*words, "--parallel.pp", "1", "--parallel.schedule", "1f1b"]) == 2
        assert f"another process is training in {run.out} (process " in capsys.readouterr().err
        intruder = soak.Run(run.out.parent / "intruder", words)
        assert intruder.process.wait(soak.PATIENCE) == 1
        assert len(errors(intruder)) == 1 and "another process is training in" in errors(intruder)[0]

        folder, aside = run.out / "checkpoints", run.out / "aside"
        assert run.until(lambda: [step for step, _ in checkpoint.found(folder)] == [EVERY])
        folder.rename(aside)
        folder.write_text("in the way")
        run.upto(2 * EVERY + 1)
        run.says("warning: the checkpoint of step 8 was not saved: rank 0: cannot write")
        run.upto(2 * EVERY + 2)  # it goes on
        assert run.said().count("warning:") == 1
        folder.unlink()
        aside.rename(folder)
        assert [step for step, _ in checkpoint.found(folder)] == [EVERY]
        run.upto(3 * EVERY)
        assert run.until(lambda: [step for step, _ in checkpoint.found(folder)] == [3 * EVERY, EVERY])

        os.kill(run.workers()[1], signal.SIGTERM)
        run.allow(STEPS)
        assert run.process.wait(soak.PATIENCE) == 0, run.said()
        stopped = checkpoint.found(folder)[0][0]
        assert 3 * EVERY < stopped < STEPS

        again = start("stopped")
        again.allow(stopped + 2)
        assert again.until(lambda: again.step() == stopped + 2)
        again.process.send_signal(signal.SIGTERM)
        again.allow(STEPS)
        again.process.wait(soak.PATIENCE)  # torchrun's own status says that it was told to end
        assert f"stopped after step {stopped + 3} of {STEPS}" in again.said(), again.said()
        assert checkpoint.found(folder)[0][0] == stopped + 3
        last = start("stopped")
        last.finish()
        require_same(last, undisturbed)

    def test_the_first_error_is_what_the_user_sees(self, start) -> None:
        run = start("failed", FAULT="raise 1 3")
        run.allow(STEPS)
        assert run.process.wait(soak.PATIENCE) == 1
        assert errors(run) == ["error: rank 1, step 3: LookupError: the third shard is not there"], run.said()
        assert "dsv3_book/train" not in run.said()  # a traceback of ours
        first = (run.out / "logs" / "rank-1.error.json").read_text()
        assert '"kind": "own"' in first and "in micro_batch" in first
        assert "in micro_batch" in (run.out / "logs" / "rank-1.log").read_text()
        assert '"kind": "lost"' in (run.out / "logs" / "rank-0.error.json").read_text()
        summary = run.said().partition("Root Cause")[2]
        assert "rank      : 1 " in summary and "the third shard is not there" in summary

    def test_a_rank_that_hangs_is_named(self, start) -> None:
        """One is stopped from outside, another waits for its data for ever; both at once, for it is a long wait."""
        patience = 25
        stopped = start("hangs", words=f"--parallel.timeout {patience}")
        sleeps = start("sleeps", words=f"--parallel.timeout {patience}", FAULT="sleep 1 3")
        sleeps.allow(STEPS)
        stopped.upto(3)
        victim = stopped.workers()[1]
        os.kill(victim, signal.SIGSTOP)
        stopped.allow(STEPS)
        for run in (stopped, sleeps):
            run.says("error:")
        os.kill(victim, signal.SIGKILL)  # torchrun does that too, after its half minute
        os.kill(sleeps.workers()[1], signal.SIGKILL)
        for run in (stopped, sleeps):
            assert run.process.wait(soak.PATIENCE) == 1
            assert len(errors(run)) == 1
        assert re.match(
            r"error: rank 1 \(step \d, in .*\) gives no sign of life any more: killed, stopped", errors(stopped)[0]
        )
        assert re.search(
            r"Rank 0, step 4: .*(did not come from rank 1|did not answer|did not finish)", errors(stopped)[0]
        )
        assert re.match(
            r"error: rank 1 \(step 3, in read_from_a_dead_disk, faulty.py:\d+\) kept the others waiting, and stood "
            r"there for \d+ s\. Rank 0, step 3: ",
            errors(sleeps)[0],
        )
