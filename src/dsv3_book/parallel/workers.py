"""Real processes joined over gloo, for notebooks, tests and benchmarks: `Pool(4).run(f, …)` calls f on every one.

A start costs seconds (Python, torch, the rendezvous), a job milliseconds: the processes stay and wait for the next one.
Functions travel by value (cloudpickle), so one defined in a notebook's cell will do. Training on many machines starts
its processes with `torchrun` instead.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, NoReturn

import cloudpickle
import torch
import torch.distributed as dist

START = 120  # seconds within which all processes must be there
GRACE = 0.5  # seconds that a failure waits for others: a peer often notices a death before we do


class WorkerError(RuntimeError):
    """A process failed; the message holds its rank and its traceback."""


class Pool:
    """`size` processes in one gloo group, each with `threads` threads; started by the first `run`.

    In them torch.distributed is ready, and what they print is printed here when the job is done. They end with `stop`,
    at the end of a `with` block, or when this process ends, however it does. In a script of your own, use a pool under
    `if __name__ == "__main__":`, for each process imports the script.

    timeout: seconds that a job may take; a collective waits for its peers half as long.
    """

    def __init__(self, size: int, timeout: float = 120, threads: int = 1) -> None:
        if size < 1 or threads < 1:
            raise ValueError(f"Pool(size={size}, threads={threads}): both must be at least 1")
        self.size, self.timeout, self.threads = size, timeout, threads
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """What `function(*args, **kwargs)` returned on rank 0, 1, …

        If one process fails, all are stopped, and the next `run` starts new ones.

        Raises:
            WorkerError: it raised on some rank, a process died, or it took longer than `timeout` seconds.
        """
        try:
            if not self.processes:
                self._start()
            job = _by_value((function, args, kwargs))
            for pipe in self.pipes:
                with contextlib.suppress(OSError):  # a dead one: reported below
                    pipe.send_bytes(job)
            answers = self._collect(self.timeout if timeout is None else timeout)
        except BaseException:  # an interrupt too: what still runs would answer to the next job
            self.stop()
            raise
        for rank, (_, printed) in sorted(answers.items()):
            for line in printed.splitlines():
                print(f"rank {rank}: {line}" if self.size > 1 else line)
        return [answers[rank][0] for rank in range(self.size)]

    def stop(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="pool-")
        for rank in range(self.size):
            here, there = context.Pipe()
            args = there, rank, self.size, self.threads, self.timeout / 2, self.folder.name, sys.path
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()  # or its end would stay open when the process dies
            self.processes.append(process)
            self.pipes.append(here)
        self._collect(START)  # each says that it is ready

    def _collect(self, timeout: float) -> dict[int, tuple[Any, str]]:
        """Every rank's answer and what it printed."""
        answers: dict[int, tuple[Any, str]] = {}
        failed: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while missing := set(range(self.size)) - set(answers) - set(failed):
            ready = wait([self.pipes[rank] for rank in missing], max(0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in sorted(missing):
                if self.pipes[rank] not in ready:
                    continue
                try:
                    good, *answer = cloudpickle.loads(self.pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self.processes[rank].join(5)
                    code = self.processes[rank].exitcode
                    failed = {
                        rank: f"died (exit code {code}){self._log(rank)}"
                    } | failed  # the likely cause comes first
                else:
                    if good:
                        answers[rank] = answer[0], answer[1]
                    else:
                        failed[rank] = f"failed:\n{answer[0]}"
            if failed:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failed:
            self._fail(failed)
        if missing:
            self._fail_late(missing, timeout)
        return answers

    def _fail(self, failed: dict[int, str]) -> NoReturn:
        (rank, what), *others = failed.items()
        also = "".join(f"\n(rank {r} then {text.splitlines()[0]} {text.splitlines()[-1]})" for r, text in others)
        raise WorkerError(f"rank {rank} {what}{also}")

    def _fail_late(self, missing: set[int], timeout: float) -> NoReturn:
        if hasattr(signal, "SIGUSR1"):
            for rank in missing:
                os.kill(self.processes[rank].pid, signal.SIGUSR1)  # "where are you?", see _serve
            time.sleep(GRACE)
        ranks = ", ".join(map(str, sorted(missing)))
        raise WorkerError(f"no answer within {timeout:g} s from rank {ranks}{''.join(map(self._log, sorted(missing)))}")

    def _log(self, rank: int) -> str:
        """The end of what the process wrote past Python's own print, torch's warnings for instance."""
        log = Path(self.folder.name) / f"{rank}.log"
        text = log.read_text(encoding="utf-8", errors="replace")[-4000:].strip() if log.exists() else ""
        return f"\nrank {rank} last wrote:\n{text}" if text else ""


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's, which takes along every module that a function might mean; torch has some that can't be copied."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def _by_value(obj: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(obj)
        return file.getvalue()


def _serve(pipe: Connection, rank: int, size: int, threads: int, timeout: float, folder: str, path: list[str]) -> None:
    """A process's life: one job after the other, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a notebook's interrupt reaches all; the pool sees to the processes
    log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    jobs: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    torch.set_num_threads(threads)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, timedelta(seconds=timeout), rank=rank, world_size=size)
    pipe.send_bytes(cloudpickle.dumps((True, None, "")))
    while True:
        job, printed = jobs.get(), io.StringIO()
        try:
            function, args, kwargs = cloudpickle.loads(job)
            with contextlib.redirect_stdout(printed):
                result = function(*args, **kwargs)
            answer = cloudpickle.dumps((True, result, printed.getvalue()))
        except BaseException:
            answer = cloudpickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _listen(pipe: Connection, jobs: SimpleQueue[bytes]) -> None:
    """Hears of the next job, and of the end of the process that gives them, even while a job is being done."""
    try:
        while True:
            jobs.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)
