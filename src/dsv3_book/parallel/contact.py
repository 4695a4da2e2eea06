"""First contact between processes: who is there, what each has to say, and how fast messages travel.

`Contact` speaks through the store that the processes met at (torchrun's, say). It needs no connection between any two
of them, so it can still tell who is missing, and why, where a collective would only hang. `measure` then tries the
real thing: a message to the neighbour, and a sum over all.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # what else knows the address that worked?

from dsv3_book.parallel.data import DataParallel

SUM_BYTES = 1 << 22  # of the sum that is timed
_number = itertools.count()  # of the contacts of this process: all processes make them in the same order


class NoWord(RuntimeError):
    """Somebody did not answer in time; the message names ranks. The same on all who did."""


class Contact:
    """One conversation of all processes. `answer = contact.settle(what I say, what rank 0 makes of all of it)`.

    timeout: seconds that rank 0 waits for the others to speak.  JSON-able things can be said.
    """

    def __init__(self, parallel: DataParallel, timeout: float) -> None:
        self.parallel, self.timeout = parallel, timeout
        self.prefix, self.rounds = f"contact/{next(_number)}", itertools.count()
        self.store = _get_default_store() if parallel.size > 1 else None

    def settle(self, mine: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """What `judge` returns on rank 0 for the list of what every rank gave, on all ranks.

        Raises:
            NoWord: a rank was silent for `timeout` seconds, naming it.
        """
        if self.store is None:
            return judge([mine])
        key = f"{self.prefix}/{next(self.rounds)}"
        if self.parallel.rank > 0:
            self.store.set(f"{key}/{self.parallel.rank}", json.dumps(mine))
            if not self._wait([f"{key}/answer"], 2 * self.timeout):  # rank 0 may wait for others first
                raise NoWord(f"rank 0 did not answer within {2 * self.timeout:g} s")
            answer = json.loads(self.store.get(f"{key}/answer"))
        else:
            answer = self._judged(key, mine, judge)
            self.store.set(f"{key}/answer", json.dumps(answer))
        if "silent" in answer:
            ranks = ", ".join(map(str, answer["silent"]))
            raise NoWord(f"no word from rank {ranks} within {self.timeout:g} s")
        return answer["said"]

    def _judged(self, key: str, mine: Any, judge: Callable[[list[Any]], Any]) -> dict[str, Any]:
        keys = [f"{key}/{rank}" for rank in range(1, self.parallel.size)]
        if not self._wait(keys, self.timeout):
            assert self.store is not None
            return {"silent": [rank for rank, k in enumerate(keys, 1) if not self.store.check([k])]}
        assert self.store is not None
        return {"said": judge([mine, *(json.loads(self.store.get(k)) for k in keys)])}

    def _wait(self, keys: list[str], timeout: float) -> bool:
        assert self.store is not None
        try:
            self.store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError:  # torch's own error of a store that waited too long; files' and TCP's differ
            return False
        return True


def measure(parallel: DataParallel, timeout: float) -> dict[str, Any]:
    """Seconds of a message to the right neighbour and of a sum of `SUM_BYTES` over all: {"ping": …, "sum": …}, or
    {"error": what did not arrive}. All processes must call it; it returns after `timeout` seconds at the latest.
    """
    if parallel.size == 1:
        return {"ping": 0.0, "sum": 0.0}
    left = (parallel.rank - 1) % parallel.size
    doing, result = [f"message from rank {left}"], {"ping": 0.0, "sum": 0.0}
    caught: list[Exception] = []

    def work() -> None:
        if parallel.device.type == "cuda":
            torch.cuda.set_device(parallel.device)
        try:
            result["ping"] = min(_timed(parallel, lambda: _ring(parallel)) for _ in range(3))
            doing[0] = "sum over all ranks"
            values = torch.ones(SUM_BYTES // 4, device=parallel.device)
            result["sum"] = min(_timed(parallel, lambda: parallel.sum(values)) for _ in range(2))
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=work, daemon=True)  # a message that never comes can't be waited for otherwise
    thread.start()
    thread.join(timeout)
    if caught:
        return {"error": f"no {doing[0]}: {str(caught[0]).splitlines()[0]}"}
    return {"error": f"no {doing[0]} within {timeout:g} s"} if thread.is_alive() else result


def _ring(parallel: DataParallel) -> None:
    """Everyone sends a number to the right and receives one from the left."""
    rank, size = parallel.rank, parallel.size
    out = torch.full((1,), float(rank), device=parallel.device)
    arrived = torch.empty_like(out)
    peers = [(dist.isend, out, (rank + 1) % size), (dist.irecv, arrived, (rank - 1) % size)]
    for work in dist.batch_isend_irecv([dist.P2POp(*peer) for peer in peers]):
        work.wait()
    if arrived.item() != (rank - 1) % size:
        raise RuntimeError(f"got {arrived.item():g} instead of the sender's rank")


def _timed(parallel: DataParallel, work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    if parallel.device.type == "cuda":
        torch.cuda.synchronize(parallel.device)
    return time.perf_counter() - begin
