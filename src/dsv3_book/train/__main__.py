"""`python -m dsv3_book.train`, alone or under `torchrun`: train, or go on, and write a sample at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from dsv3_book.generate import load, write
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.errors import Ending
from dsv3_book.train.folder import choose_dtype
from dsv3_book.train.machine import free_memory, hostname_warning
from dsv3_book.train.preflight import preflight
from dsv3_book.train.presets import from_command_line
from dsv3_book.train.report import write_report
from dsv3_book.train.signals import stop_signals
from dsv3_book.train.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 finished or stopped on request, 1 the training failed, 2 bad input."""
    ending = Ending()
    with contextlib.ExitStack() as stack:
        try:
            train(argv, ending, stack)
            return 0
        except Exception as error:
            return ending.tell(error)
        finally:
            ending.close()


def train(argv: Sequence[str] | None, ending: Ending, stack: contextlib.ExitStack) -> None:
    """The whole command. `ending` is told how far it has come, so that an error can say of which rank and step."""
    speak = os.environ.get("RANK", "0") == "0"
    config = from_command_line(argv, speak)
    if config.dry_run:
        plan(config, speak)
        return
    if os.environ.get("LOCAL_RANK", "0") == "0" and (warning := hostname_warning()):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    parallel = DataParallel.from_environment(config.parallel.timeout)
    ending.joined(parallel)
    config = dataclasses.replace(config, dtype=choose_dtype(config.dtype, parallel.device))
    preflight(config, parallel)
    trainer = Trainer(config, parallel)
    ending.begun(trainer)
    stack.enter_context(stop_signals())  # to the very end: what an error does there must not be cut short
    trainer.folder.say(trainer.describe())
    if not trainer.run():
        trainer.folder.say(
            f"stopped after step {trainer.step} of {config.steps}; all of it is saved in {config.out}. "
            "The same command goes on from there."
        )
    elif speak:
        trainer.folder.say(f"the report of the run: {write_report(config.out)}")
        sample(trainer)


def sample(trainer: Trainer) -> None:
    """Lets the trained model write, if this process has memory for all of it."""
    config, needed = trainer.config, 4 * trainer.job.numbers()
    if needed > (free := free_memory() or math.inf):
        trainer.folder.say(
            f"no sample: the model has {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free here. Where "
            f"there is more: python -m dsv3_book.generate --checkpoint {config.out}"
        )
        return
    print(f"\nA sample after {config.prompt!r}:\n", flush=True)
    write(*load(config.out, config.swap), config.prompt, max_tokens=200, temperature=0.8, top_p=0.95)


def plan(config: TrainConfig, speak: bool) -> None:
    """Says what the run would need, and how fast it would go; one process does."""
    from dsv3_book.train.dry_run import dry_run

    if speak:
        dry_run(config, config.world)


if __name__ == "__main__":
    sys.exit(record(main)())  # an unexpected error of any process reaches torchrun's summary
