"""The trainer's tokens/s beside the bare training step it is made of, and what a checkpoint costs it.

    bare        one process with two threads: losses and backward of every micro-batch, clipping, AdamW, routing biases;
                no pipeline, no ZeRO-1, no average of the weights, no metrics, no text to read (the tokens are there)
    trainer     the same model, threads and micro-batches in `Trainer.train_step`, with all of these
    dp 2        two processes with one thread each, half of the micro-batches each
    dualpipe    two processes with one thread each, pp 2 by DualPipe
    dp 2, 1f1b  the same with the plain schedule, to tell the schedule's part from the trainer's

All sides take their steps in turns, every round in another order. A ratio is the median over rounds of the ratio within
a round.

    stall       a checkpoint is begun after a step; how much longer the call and the steps are until it is on disk than
                as many steps without one, in steps. The median over saves; the largest is told too.

Predicted before the first run: trainer 0.97 of bare; dp 2 1.05 of the trainer, dualpipe 0.97 of it (chapter 13: 1.09
and 1.06 of two threads without a trainer; one step's messages and the optimiser's on both); stall 0.3 steps.

    python benchmarks/trainer.py [--rounds 10] [--write]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import record
from _trainer_sides import SIDES, advance, alone, begin, saving, settings

from dsv3_book.parallel.workers import Pool


def measure(rounds: int, folder: Path) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """Seconds per step of every side in every round (the slower rank's), and what saves cost."""
    pools = {1: Pool(1, timeout=3600, threads=2), 2: Pool(2, timeout=3600, threads=1)}

    def on(name: str, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What a side's processes answer. The others are halted: idle, but in groups, they take a tenth of a core."""
        size = SIDES[name][0]
        for other, pool in pools.items():
            for process in pool.processes:
                os.kill(process.pid, signal.SIGCONT if other == size else signal.SIGSTOP)
        return pools[size].run(work, *args)

    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    draw = random.Random(0)
    try:
        on("bare", alone)
        for name in SIDES:
            on(name, begin, name, folder)
            on(name, advance, name)  # the first steps warm up
        for _ in range(rounds):
            for name in draw.sample(list(SIDES), len(SIDES)):
                seconds[name].append(max(statistics.median(times) for times in on(name, advance, name)))
        return seconds, on("trainer", saving, "trainer", rounds)[0]
    finally:
        for pool in pools.values():
            for process in pool.processes:
                os.kill(process.pid, signal.SIGCONT)
            pool.stop()


def ratio(seconds: dict[str, list[float]], side: str, over: str) -> float:
    """Tokens/s of one side over another's."""
    return statistics.median(b / a for a, b in zip(seconds[side], seconds[over], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="record as src/dsv3_book/results/trainer.json")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        seconds, saves = measure(given.rounds, Path(folder))
        config = settings("trainer", Path(folder))
    tokens = config.batch.start * config.batch.sequence_length
    results: dict[str, Any] = {
        "sizes": {"hidden_size": config.model.hidden_size, "layers": config.model.num_hidden_layers, "tokens": tokens},
        "others_running": load,
        "tokens_per_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "trainer_over_bare": ratio(seconds, "trainer", "bare"),
        "over_trainer": {name: ratio(seconds, name, "trainer") for name in ("dp 2", "1f1b", "dualpipe")},
        "save": {
            "call": statistics.median(one["call"] for one in saves),
            "all": statistics.median(one["all"] for one in saves),
            "most": max(one["all"] for one in saves),
        },
    }
    for name, rate in results["tokens_per_second"].items():
        print(f"{name:12}{rate:8.0f} tokens/s")
    print(f"trainer / bare step       {results['trainer_over_bare']:.3f}   (asked: at least 0.95)")
    for name, least in (("dp 2", ", asked: at least 0.90"), ("1f1b", ""), ("dualpipe", ", asked: at least 0.80")):
        print(f"{name + ' / trainer':26}{results['over_trainer'][name]:.3f}   ({SIDES[name][0]} processes{least})")
    save = results["save"]
    print(f"a checkpoint stalls for {save['call']:.2f} steps; in all {save['all']:.2f} (most: {save['most']:.2f})")
    if given.write:
        torch.set_num_threads(2)
        record("trainer", " ".join(["python benchmarks/trainer.py", *sys.argv[1:]]), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
