"""Where the processes that `torchrun` started find each other, the second time too.

torchrun's agent keeps one store for all its starts of the workers. gloo and NCCL leave their addresses in it, and a
worker that is started again would try to reach processes that are long gone. (Seen with torch 2.13: after a restart
every process waits until its timeout. The restart's number is no help, for on several hosts each agent counts its own.)
So those that really are here agree on a name first, and keep everything of this start under it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 300.0  # seconds for all to come, if nothing else is asked
PAUSE = 0.01  # between two looks


def meet(rank: int, size: int, timeout: float | None = None) -> dist.Store | None:
    """The agent's store, seen from this start only; None where no agent keeps one (torch then makes its own).

    Everyone leaves a name of its own. Rank 0 answers every name that it finds, even a dead one's, with its own; whoever
    is answered says so. A name is never used twice, so only those of one start can come together.

    timeout: seconds that all have to come.

    Raises:
        RuntimeError: some did not come, naming them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    limit = timedelta(seconds=timeout or PATIENCE)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    name = uuid.uuid4().hex
    if rank == 0:
        welcome(store, name, size, limit)
        return dist.PrefixStore(name, store)
    store.set(f"here/{rank}", name)
    try:
        store.wait([f"answer/{name}"], limit)
    except RuntimeError as error:
        raise RuntimeError(f"rank 0 did not join within {limit.total_seconds():g} s: see its log") from error
    start = store.get(f"answer/{name}").decode()
    store.set(f"{start}/joined/{rank}", "")
    return dist.PrefixStore(start, store)


def welcome(store: dist.Store, name: str, size: int, limit: timedelta) -> None:
    """Rank 0's part: answers until all have said that they heard it."""
    missing, deadline = set(range(1, size)), time.monotonic() + limit.total_seconds()
    answered: set[str] = set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{rank}"]) and (who := store.get(f"here/{rank}").decode()) not in answered:
                store.set(f"answer/{who}", name)
                answered.add(who)
            if store.check([f"{name}/joined/{rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"rank {ranks} did not join within {limit.total_seconds():g} s: see their logs")
        time.sleep(PAUSE if missing else 0)
