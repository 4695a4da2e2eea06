"""`python -m dsv3_book.train`, alone or under `torchrun`: train, or go on, and write a sample at the end."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from dsv3_book.checkpoint import SaveError
from dsv3_book.generate import load, write
from dsv3_book.parallel import DataParallel, PeerError
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.folder import choose_dtype
from dsv3_book.train.preflight import preflight
from dsv3_book.train.presets import from_command_line
from dsv3_book.train.report import write_report
from dsv3_book.train.trainer import NonFinite, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 finished or stopped on request, 1 the training failed, 2 bad input."""
    speak = os.environ.get("RANK", "0") == "0"
    parallel: DataParallel | None = None
    try:
        try:
            config = from_command_line(argv, speak)
            if config.dry_run:
                return plan(config, speak)
            parallel = DataParallel.from_environment(config.parallel.timeout)
            config = dataclasses.replace(config, dtype=choose_dtype(config.dtype, parallel.device))
            preflight(config, parallel)
            trainer = Trainer(config, parallel)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            return complain(error, 2, speak or parallel is not None)
        except PeerError:
            return 2
        trainer.folder.say(trainer.describe())
        try:
            finished = trainer.run()
        except (NonFinite, SaveError) as error:
            return complain(error, 1, speak)
        if not finished:
            trainer.folder.say(
                f"stopped after step {trainer.step} of {config.steps}; all of it is saved in {config.out}. "
                "The same command goes on from there."
            )
        elif speak:
            trainer.folder.say(f"the report of the run: {write_report(config.out)}")
            print(f"\nA sample after {config.prompt!r}:\n", flush=True)
            write(*load(config.out, config.swap), config.prompt, max_tokens=200, temperature=0.8, top_p=0.95)
        return 0
    finally:
        if parallel is not None:
            parallel.close()


def plan(config: TrainConfig, speak: bool) -> int:
    """Says what the run would need, and how fast it would go; one process does."""
    from dsv3_book.train.dry_run import dry_run

    if speak:
        dry_run(config, config.world)
    return 0


def complain(error: Exception, status: int, speak: bool) -> int:
    """Says what is wrong in one line (process 0, or the only one that knows), and tells torchrun, which repeats it."""
    if speak:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    return status


if __name__ == "__main__":
    sys.exit(record(main)())  # an unexpected error of any process reaches torchrun's summary
