"""Real processes joined over gloo, started once and used by every test of the session.

A start costs seconds (Python, torch, the rendezvous), a job milliseconds. `pool(2).run(function, *args)` calls
`function(*args)` on every process and gives back what each returned, by rank. The function travels by name, so it must
stand at the top of a module; inside it torch.distributed is ready. If one process fails, all are stopped and its
traceback is raised here; the next `run` starts new ones.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest


class WorkerError(AssertionError):
    """A process failed; the message holds its rank and its traceback."""


class Pool:
    """`size` processes in one gloo group, one thread each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """What `function(*args, **kwargs)` returned on rank 0, 1, …

        Raises:
            WorkerError: it raised on some rank, a process died, or it took longer than `timeout` seconds.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout)
            if not ready:
                self._fail(f"no answer within {timeout} s from rank {sorted(set(range(self.size)) - set(answers))}")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join(5)
                    self._fail(f"rank {rank} died (exit code {self.processes[rank].exitcode})")
                if not good:
                    self._fail(f"rank {rank} failed:\n{answers[rank]}")
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = tempfile.mktemp(prefix="gloo-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, store, sys.path), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def _fail(self, message: str) -> None:
        self.stop()
        raise WorkerError(message)


def _serve(pipe: Connection, rank: int, size: int, store: str, path: list[str]) -> None:
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=size)
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: the session's n processes."""
    pools: dict[int, Pool] = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for one in pools.values():
        one.stop()
