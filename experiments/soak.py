"""Kills a training run again and again, and compares what comes out with a run that nobody disturbed.

    python experiments/soak.py --kills 20 [--seed 0] [--out runs/soak] [--write]

Two processes under torchrun (DualPipe, a small model, a checkpoint every few steps, restarts allowed) are killed with
`kill -9` at random moments: one of them or both, in a step, while a checkpoint is being written, while they start. The
metrics must be those of the undisturbed run bit for bit, clock and memory excepted, and so must the last checkpoint.
`--write` records the result as `dsv3_book/results/soak.json`.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCK = ("tokens_per_second", "bubble", "memory", "mfu")  # what differs between two runs of the same thing
SETTINGS = (
    "--preset tiny --dtype fp32 --parallel.pp 2 --parallel.schedule dualpipe --model.num-hidden-layers 2 "
    "--batch.sequence-length 16 --batch.start 8 --batch.end 8 --batch.multiple 8 --batch.micro 2 --optim.ema 0.9 "
    "--text.held-out 0.2 --every.validation 10 --every.validation-windows 4"
)
PROGRAM = ("-m", "dsv3_book.train")
INTERVAL = 4  # steps between checkpoints
PATIENCE = 600.0  # seconds in which something must happen: only a hang takes as long


@dataclass
class Kill:
    """moment: what was aimed at.  victims: ranks.  saving: whether a checkpoint was being written.  step: the last one
    in the metrics at that moment.  starts: how often the run had been started by then.  resumed: the step that the next
    start went on after; known when the run is finished."""

    moment: str
    victims: list[int]
    saving: bool
    step: int
    starts: int
    resumed: int = 0

    @property
    def repeated(self) -> int:
        """Steps done again."""
        return self.step - self.resumed


class Run:
    """A training run under torchrun, in a folder of its own, that can be watched and killed."""

    def __init__(
        self, out: Path, arguments: list[str], restarts: int = 0, program: Sequence[str] = PROGRAM, **environment: str
    ) -> None:
        self.out = out
        self.screen = out.parent / f"{out.name}.screen"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), *program, "--out", str(out), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        with self.screen.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def said(self) -> str:
        return self.screen.read_text(encoding="utf-8", errors="replace")

    def step(self) -> int:
        """The last step in the metrics; 0 if there is none."""
        path = self.out / "metrics.jsonl"
        steps = re.findall(rb'\n?\{"step": (\d+), "tokens": \d+, "loss"', path.read_bytes()) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def starts(self) -> list[int]:
        """The step after which each start went on, so far as they came to training."""
        log = self.out / "logs" / "rank-0.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return [
            int(done or 0) for done in re.findall(r"INFO    (?:going on after step (\d+) of|training \d+ steps)", text)
        ]

    def saving(self) -> bool:
        return any((self.out / "checkpoints").glob(".saving-*"))

    def workers(self) -> dict[int, int]:
        """Process of each rank: torchrun's children."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return {}
        found = {}
        for child in map(int, children):
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes()
            except OSError:  # it has just ended
                continue
            if match := re.search(rb"(?:^|\0)RANK=(\d+)\0", environment):
                found[int(match[1])] = child
        return found

    def until(self, happened: Callable[[], bool]) -> bool:
        """Waits; False if the run has ended before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None:
                return happened()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {self.out} for {PATIENCE:g} s:\n{self.said()[-3000:]}")
            time.sleep(0.002)
        return True

    def kill(self, victims: list[int], moment: str) -> Kill | None:
        """kill -9 of these ranks; None if the run was over."""
        workers, kill = self.workers(), Kill(moment, victims, self.saving(), self.step(), len(self.starts()))
        if not workers.keys() >= set(victims):
            return None
        for rank in victims:
            os.kill(workers[rank], signal.SIGKILL)
        kill.step, kill.saving = self.step(), kill.saving or self.saving()  # as it is now: a line may just have come
        return kill

    def finish(self, kills: Sequence[Kill] = ()) -> str:
        """Waits for the end, which must be a good one; what was said. Completes what is known of the kills."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            raise
        if status != 0:
            raise RuntimeError(f"{self.out} ended with status {status}:\n{self.said()[-5000:]}")
        for kill in kills:
            kill.resumed = self.starts()[kill.starts]
        return self.said()

    def stop(self) -> None:
        """Whatever still runs of it ends, as after a test that failed."""
        for pid in [*self.workers().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


MOMENTS = ("any", "saving", "any", "starting")  # in turn: in a step, while a checkpoint is written, at a new start


def disturb(
    run: Run,
    steps: int,
    kills: int,
    seed: int,
    aims: Sequence[str] = MOMENTS,
    allow: Callable[[int], None] = lambda step: None,
    say: Callable[[str], None] = print,
) -> list[Kill]:
    """Kills the run as drawn from `seed`, and leaves it to finish.

    Where it has come so far is read in its metrics: a slow machine changes nothing but the moment within a step.

    allow: told how far the run may have come by the next kill, for one that waits to be allowed.
    """
    draw, done = random.Random(seed), []
    room = (steps - 2 * INTERVAL) // kills  # steps from one kill to the next
    for number in range(kills):
        moment = aims[number % len(aims)]
        workers = run.workers()
        if moment == "starting":
            run.until(lambda old=workers: len(new := run.workers()) == 2 and not {*new.values()} & {*old.values()})
            time.sleep(draw.uniform(0, 6))
        else:
            at = 1 + number * room + draw.randrange(room)
            allow(at + INTERVAL)
            run.until(lambda at=at: run.step() >= at)
            if moment == "saving":
                run.until(run.saving)
            else:
                time.sleep(draw.uniform(0, 0.2))
        kill = run.kill(draw.choice([[0], [1], [0, 1]]), moment)
        if kill is None:
            break
        done.append(kill)
        how = f"{moment}, saving" if kill.saving else moment
        say(f"kill {len(done)}: rank {' and '.join(map(str, kill.victims))} at step {kill.step} ({how})")
        if aims[(number + 1) % len(aims)] != "starting":  # else the next one may come before it is on its way again
            run.until(lambda kill=kill: len(run.starts()) > kill.starts)
    allow(steps)
    return done


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def weights(out: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint."""
    import torch

    from dsv3_book import checkpoint
    from dsv3_book.careful import Reader

    path = checkpoint.latest(out / "checkpoints")[0]  # type: ignore[index]
    found = {n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in Reader(path).table().items()}
    checkpoint.load(path, found)
    return {name: value.numpy().tobytes() for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--write", action="store_true", help="record the result in the package")
    args = parser.parse_args()
    steps = 30 * args.kills
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    arguments = [*SETTINGS.split(), "--steps", str(steps), "--every.checkpoint", str(INTERVAL)]
    arguments += ["--data", str(ROOT / "src" / "dsv3_book"), "--text.max-bytes", "300000"]
    Run(args.out / "undisturbed", arguments).finish()
    run = Run(args.out / "killed", arguments, restarts=3 * args.kills)
    try:
        kills = disturb(run, steps, args.kills, args.seed)
        run.finish(kills)
    finally:
        run.stop()
    pair = [args.out / "undisturbed", args.out / "killed"]
    one, two = map(metrics, pair)
    same, equal = one == two, weights(pair[0]) == weights(pair[1])
    most = max(kill.repeated for kill in kills)
    for number, kill in enumerate(kills, 1):
        print(f"kill {number}: {kill.repeated} steps done again")
    print(f"{len(kills)} kills in {steps} steps; most steps done again: {most} (a checkpoint every {INTERVAL})")
    print(f"metrics {'equal' if same else 'DIFFER'}; last checkpoint {'equal' if equal else 'DIFFERS'}, bit for bit")
    if args.write:
        from train import record

        command = f"python experiments/soak.py --kills {args.kills} --seed {args.seed} --write"
        results = {
            "steps": steps,
            "interval": INTERVAL,
            "settings": SETTINGS,
            "kills": [asdict(kill) | {"repeated": kill.repeated} for kill in kills],
            "most_repeated": most,
            "metrics_equal": same,
            "checkpoint_equal": equal,
            "lines": len(one),
        }
        record("soak", command, results, "two processes, one thread each, fp32")
    return 0 if same and equal and len(kills) == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
