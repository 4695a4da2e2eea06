"""Checkpoints written while training goes on: a snapshot at once, the disk later.

    training   ─ step ─┤start├─ step ─── step ─── step ─┤start├─ …
    thread              copy └ write · hash · rename ┘    copy └ …

`start` costs one copy of the state into memory of the CPU, which is kept for the next one. The snapshot is what is
saved, whatever the optimiser does to the weights in the meantime. A thread writes it, and talks with the other ranks'
threads in a group of their own, so that its messages never meet those of training.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.checkpoint import SaveError, save
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.mesh import default_timeout
from dsv3_book.slab import Place, Slab, Value, by_place

GRACE = 10  # seconds that the end of the process leaves to a save under way


class Saver:
    """Saves checkpoints under `folder` in the background, one at a time; all processes must make it, and call alike.

        saver = Saver(folder, parallel, keep=2)
        ...
        saver.start(step, tensors, state)      # from now on tensors may change
        ...
        if saver.problem(): ...                # between steps; ranks learn of it at different moments
        saver.wait()                           # the last one is on disk, or SaveError
        saver.close()

    timeout: seconds that a rank waits for the others' part, the longest write included (None: the default group's).
    """

    def __init__(self, folder: Path, parallel: DataParallel, keep: int = 2, timeout: float | None = None) -> None:
        self.folder, self.keep = folder, keep
        group = None
        if parallel.size > 1:
            limit = default_timeout() if timeout is None else timedelta(seconds=timeout)
            ranks = dist.get_process_group_ranks(parallel.group or dist.group.WORLD)
            group = dist.new_group(ranks, limit, backend="gloo")
        self.parallel = DataParallel(parallel.rank, parallel.size, group)
        self.kept: dict[Place, Tensor] = {}
        self.thread: Thread | None = None
        self.failed: SaveError | None = None
        self.last: Path | None = None
        self.abandoned = False
        atexit.register(self.linger)

    def start(self, step: int, tensors: Mapping[str, Value], state: Mapping[str, Any]) -> None:
        """Takes a snapshot and returns; it is written as `checkpoint.save` would. Finishes the save before it first.

        Raises:
            SaveError: the save before failed (see `wait`).
            TypeError: a state that is not JSON-able.
        """
        state = json.loads(json.dumps(state))
        self.wait()
        problem: list[Exception] = []
        snapshot: dict[str, list[Slab]] = {}
        copied: list[Any] = []
        try:
            snapshot = self._snapshot(tensors, copied)
        except Exception as error:  # the others have begun: they hear of it where they save
            problem.append(error)

        def ready() -> Mapping[str, Value]:
            if problem:
                raise problem[0]
            for event in copied:
                event.synchronize()
            return snapshot

        def run() -> None:
            try:
                self.last = save(self.folder, step, ready, state, self.parallel, self.keep)
            except SaveError as error:
                self.failed = error
            except BaseException as error:  # a mistake of ours: to be raised, not lost with the thread
                self.failed = SaveError(f"the checkpoint of step {step} was not saved: {type(error).__name__}: {error}")
                self.failed.__cause__ = error

        self.thread = Thread(target=run, name="saver", daemon=True)  # a daemon: it must not hold up the process's end
        self.thread.start()

    def wait(self) -> Path | None:
        """The last checkpoint that was saved, once none is under way; None if there was none.

        Raises:
            SaveError: it could not be saved; raised once, and the next one can be started.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed
        return self.last

    def problem(self) -> SaveError | None:
        """What `wait` will raise, if that is known by now. Costs nothing, and other ranks may know earlier or later."""
        return self.failed

    def abandon(self) -> None:
        """Another rank is gone: the end of the process need not wait for a save, which can't succeed any more."""
        self.abandoned = True

    def close(self) -> None:
        """Finishes what is under way (a failure that nobody waited for is dropped), and leaves the group."""
        atexit.unregister(self.linger)
        if self.thread is not None:
            self.thread.join()
        self.thread, self.kept = None, {}
        if self.parallel.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.parallel.group)

    def linger(self) -> None:
        """The process ends: a save under way gets a moment, and no more; then it is cut off, as a kill would."""
        if self.thread is not None and not self.abandoned:
            self.thread.join(GRACE)

    @torch.no_grad()
    def _snapshot(self, tensors: Mapping[str, Value], copied: list[Any]) -> dict[str, list[Slab]]:
        """Copies of all boxes, in the memory of the last snapshot where it fits; on a GPU, there after `copied`."""
        boxes = by_place(tensors)
        self.kept = {place: kept for place, kept in self.kept.items() if place in boxes}
        snapshot: dict[str, list[Slab]] = {name: [] for name in tensors}
        for place, slab in boxes.items():
            value, kept = slab.tensor, self.kept.get(place)
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = self.kept[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            kept.copy_(value, non_blocking=True)
            snapshot[place[0]].append(Slab(kept, slab.shape, slab.offset))
        for device in {slab.tensor.device for slab in boxes.values() if slab.tensor.is_cuda}:
            copied.append(torch.cuda.current_stream(device).record_event())
        return snapshot
