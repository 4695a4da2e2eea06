"""`python -m dsv3_book.train.finished RUN`: status 0 once a run has done all its steps, 75 ("try again") before.

A trainer that is asked to stop saves and ends well, so its own status can't tell whoever started it whether to start it
again. Needs no torch, and is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

AGAIN = 75  # EX_TEMPFAIL


def steps_of(run: Path) -> tuple[int, int]:
    """(steps saved, steps in all) of the run in folder `run`; (0, 0) where none has begun."""
    saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    try:
        return max(saved, default=0), json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"]
    except FileNotFoundError:
        return 0, 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1:
        print("usage: python -m dsv3_book.train.finished RUN", file=sys.stderr)
        return 2
    done, steps = steps_of(Path(words[0]))
    if steps and done >= steps:
        print(f"{words[0]}: all {steps} steps are done")
        return 0
    print(f"{words[0]}: {done} of {steps or 'some'} steps are saved; start it again")
    return AGAIN


if __name__ == "__main__":
    sys.exit(main())
