"""`python -m dsv3_book.train.compare RUN_A RUN_B`: two runs side by side, from what they wrote.

Say what changed, then whether it helped: the first run is the reference, differences are second minus first. Only
steps that both have done are compared, and an average is over the last quarter of these, where a curve has calmed down.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_book.checkpoint import differences
from dsv3_book.train.metrics import read_lines

CLOCK = ("tokens_per_second", "bubble", "memory", "mfu")  # these differ between two runs of the same thing
ROUNDING = 1e-5  # relative: what another order of sums makes of a loss in its first steps
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run wrote: its training lines and its validations, by step, and its settings if they are there."""

    folder: Path
    steps: dict[int, Line]
    validations: dict[int, Line]
    settings: dict[str, Any] | None


def read(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        FileNotFoundError: there is no such folder, or no metrics in it.
        ValueError: no training step in its metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        what = "is no run: it has no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}; give the --out of a training run")
    lines = read_lines(path)
    steps = {line["step"]: line for line in lines if "loss" in line and not line.get("skipped")}
    if not steps:
        raise ValueError(f"{path} has no training step yet: wait until the run has done one")
    settings = folder / "run.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    return Run(folder, steps, {line["step"]: line for line in lines if "val_loss" in line}, known)


def compare(a: Run, b: Run) -> str:
    """The table and what it says, as text.

    Raises:
        ValueError: the runs have no step in common.
    """
    shared = sorted(a.steps.keys() & b.steps.keys())
    if not shared:
        raise ValueError(f"{a.folder} and {b.folder} have no step in common: nothing can be compared")
    late = shared[-max(1, len(shared) // 4) :]
    over = f"steps {late[0]} to {late[-1]}"
    rows = [["", "A", "B", "B − A"], ["steps done", str(max(a.steps)), str(max(b.steps)), ""]]
    rows += [_row(f"loss at step {step}", a.steps[step], b.steps[step], "loss") for step in _spread(shared)]
    for name, key in (("loss", "loss"), ("MTP loss", "loss_mtp"), ("MaxVio", "max_violation")):
        rows.append(_row(f"{name}, mean of {over}", _mean(a, late, key), _mean(b, late, key), key))
    if both := sorted(a.validations.keys() & b.validations.keys()):
        last = both[-1]
        for name, key in (("validation loss", "val_loss"), ("bits per byte", "val_bits_per_byte")):
            rows.append(_row(f"{name} at step {last}", a.validations[last], b.validations[last], key))
    rows.append(_speed(a, b, shared))
    text = [f"A: {a.folder}", f"B: {b.folder}", *_settings(a, b), "", *_table(rows), ""]
    if not both:
        text.append("No validation of the same step in both.")
    return "\n".join([*text, *_noise(a, b, late), *_parting(a, b, shared)])


# What is said --------------------------------------------------------------------------------------------------------
def _settings(a: Run, b: Run) -> list[str]:
    if a.settings is None or b.settings is None:
        return []
    one, two = ({key: value for key, value in s.items() if key != "out"} for s in (a.settings, b.settings))
    return ["", "Settings that differ:", *(f"  {said}" for said in differences(one, two) or ["none"])]


def _noise(a: Run, b: Run, late: Sequence[int]) -> list[str]:
    """How the mean difference compares with its own scatter from step to step: both runs read the same batches."""
    gaps = [b.steps[step]["loss"] - a.steps[step]["loss"] for step in late]
    if len(gaps) < 8 or not (scatter := statistics.stdev(gaps)):
        return []
    mean = statistics.fmean(gaps)
    return [
        f"Over these {len(gaps)} steps B's loss is {mean:+.4f} from A's, one step's gap scattering by {scatter:.4f}."
    ]


def _parting(a: Run, b: Run, shared: Sequence[int]) -> list[str]:
    """From which step on the runs differ: at all, and by more than rounding."""
    keys = [key for key in a.steps[shared[0]] if key not in CLOCK]
    apart = next((s for s in shared if any(a.steps[s].get(k) != b.steps[s].get(k) for k in keys)), None)
    if apart is None:
        return [
            f"The runs are equal in every number, to the last digit, over all {len(shared)} steps that both have done."
        ]
    names = ", ".join(k for k in keys if a.steps[apart].get(k) != b.steps[apart].get(k))
    said = [f"The runs differ from step {apart} on (there in {names})."]
    far = next((s for s in shared if not math.isclose(*_losses(a, b, s), rel_tol=ROUNDING)), None)
    if far is None:
        return [
            *said,
            f"Their losses stay within {ROUNDING:g} of each other: no more than another order of sums makes.",
        ]
    there = "{} against {}".format(*(f"{loss:.6f}" for loss in _losses(a, b, far)))
    return [*said, f"Their losses differ by more than rounding ({ROUNDING:g}) from step {far} on: {there}."]


def _losses(a: Run, b: Run, step: int) -> tuple[float, float]:
    return a.steps[step]["loss"], b.steps[step]["loss"]


# The table -----------------------------------------------------------------------------------------------------------
def _spread(shared: Sequence[int]) -> list[int]:
    """The first, the last, and up to three between them."""
    last = len(shared) - 1
    return sorted({shared[last * quarter // 4] for quarter in range(5)})


def _mean(run: Run, steps: Sequence[int], key: str) -> Line:
    found = [run.steps[step][key] for step in steps if key in run.steps[step]]
    return {key: statistics.fmean(found)} if found else {}


def _row(name: str, a: Line, b: Line, key: str) -> list[str]:
    if key not in a or key not in b:
        return [name, *(f"{line[key]:.4f}" if key in line else "–" for line in (a, b)), ""]
    return [name, f"{a[key]:.4f}", f"{b[key]:.4f}", f"{b[key] - a[key]:+.4f}"]


def _speed(a: Run, b: Run, shared: Sequence[int]) -> list[str]:
    """Medians: a pause to save or validate is one step's."""
    found = [
        [run.steps[s]["tokens_per_second"] for s in shared if "tokens_per_second" in run.steps[s]] for run in (a, b)
    ]
    if not all(found):
        return ["tokens/s, median", *("–" if not f else f"{statistics.median(f):,.0f}" for f in found), ""]
    one, two = map(statistics.median, found)
    return ["tokens/s, median", f"{one:,.0f}", f"{two:,.0f}", f"{100 * (two / one - 1):+.1f} %"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [line.rstrip() for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""

    def runs(
        a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")],
        b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")],
    ) -> tuple[Path, Path]:
        """Compare two training runs.

        Args:
            a: the reference's folder.
            b: the other's.
        """
        return a, b

    folders = tyro.cli(runs, args=argv, prog="python -m dsv3_book.train.compare")
    try:
        print(compare(*map(read, folders)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
