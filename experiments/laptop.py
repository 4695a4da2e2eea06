"""Records the laptop run: trains the `laptop` preset as `make train` does, and keeps its curves and its sample.

    python experiments/laptop.py [--out runs/laptop]

A run that is already finished in `--out` is recorded as it is. Chapters 7 and 17 and the README show the result.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from train import ROOT, record

PROCESSES = 2
KEEP = ["step", "tokens", "loss", "loss_mtp", "balance_loss", "max_violation", "lr", "grad_norm", "tokens_per_second"]
KEEP += ["bubble", "memory"]


def lines(run: Path) -> list[dict[str, Any]]:
    """The run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def thinned(steps: list[dict[str, Any]], points: int = 200) -> list[dict[str, Any]]:
    """About `points` entries, each the mean over as many steps as it stands for (its last step's number and rate)."""
    size = max(1, len(steps) // points)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    last = ("step", "tokens", "lr")
    return [
        {k: g[-1][k] if k in last else round(sum(line[k] for line in g) / len(g), 5) for k in KEEP if k in g[-1]}
        for g in groups
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/laptop")
    args = parser.parse_args()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command += ["-m", "dsv3_book.train", "--preset", "laptop", "--parallel.pp", str(PROCESSES), "--out", args.out]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, text=True, check=True).stdout
    run = ROOT / args.out
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))
    every = lines(run)
    steps = [line for line in every if "loss" in line]
    validation = [line for line in every if "val_loss" in line]
    shown = ["step", "val_loss", "val_bits_per_byte"]
    results = {
        "processes": PROCESSES,
        "threads": PROCESSES,
        "config": config,
        "seconds": round(
            sum(s["batch_size"] * config["batch"]["sequence_length"] / s["tokens_per_second"] for s in steps)
        ),
        "metrics": thinned(steps),
        "validation": [{k: line[k] for k in shown} for line in validation],
        "xz_bits_per_byte": validation[-1]["val_xz_bits_per_byte"],
        "sample": out.partition("A sample after")[2].partition("\n\n")[2].strip("\n"),
    }
    record("laptop", "make train", results, f"{PROCESSES} processes with one thread each, {config['dtype']}")


if __name__ == "__main__":
    main()
