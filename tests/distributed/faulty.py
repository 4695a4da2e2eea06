"""The trainer's command with faults, for `torchrun tests/distributed/faulty.py …`. They come from the environment:

LEASH   a file with a number of steps: so many may be done, then all wait until it says more
FAULT   "raise 1 5", "sleep 1 5": what rank 1 does when it reads the data of step 5
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from dsv3_book.train.__main__ import main
from dsv3_book.train.trainer import Trainer

LEASH, FAULT = os.environ.get("LEASH"), os.environ.get("FAULT", "none -1 0").split()
plain_step, plain_data = Trainer.train_step, Trainer.micro_batch


def train_step(self: Trainer, *args: Any) -> bool:
    while LEASH is not None and self.step >= int(Path(LEASH).read_text() or 0):
        time.sleep(0.005)
    return plain_step(self, *args)


def micro_batch(self: Trainer, number: int) -> Any:
    kind, rank, step = FAULT
    if self.parallel.rank == int(rank) and self.step + 1 == int(step):
        if kind == "raise":
            raise LookupError("the third shard is not there")
        read_from_a_dead_disk()
    return plain_data(self, number)


def read_from_a_dead_disk() -> None:
    time.sleep(100_000)


Trainer.train_step, Trainer.micro_batch = train_step, micro_batch  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(record(main)())
