"""Signs of life: every process tells the others, again and again, that it lives, and where its main thread stands.

When a message does not come in time, the one who waits can't tell why: its neighbour may be waiting too, for somebody
who is stopped, or who reads a file that never answers. The signs tell them apart.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

BEAT = 0.5  # seconds between two signs
SHOWN = 3  # ranks that a sentence names

_TORCH = os.path.dirname(torch.__file__)
_OURS = str(Path(__file__).parent.parent)
_PYTHON = sysconfig.get_paths()["stdlib"]
_WAITING = tuple(os.path.join(_OURS, *name) for name in (("parallel", ""), ("pipeline", "transfers.py"), ("saver.py",)))


@dataclass(frozen=True)
class Sign:
    """beat: counts up.  step: under way (0: none yet).  where: a place in the program.  waits: there, for another rank.
    since: how many seconds."""

    beat: int
    step: int
    where: str
    waits: bool
    since: float


class Signs:
    """Gives this process's signs from a thread of its own, from now until `close`.

    step: which step is under way.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, step: Callable[[], int]) -> None:
        self.store, self.rank, self.size, self.step = store, rank, size, step
        self.ended = threading.Event()
        self.watched = threading.get_ident()
        self.thread = threading.Thread(target=self._run, name="signs", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        beat, place, arrived = 0, ("", False), time.monotonic()
        while True:
            frame = sys._current_frames().get(self.watched)
            now = stand(frame) if frame is not None else ("", False)
            if now != place:
                place, arrived = now, time.monotonic()
            beat += 1
            sign = Sign(beat, self.step(), *place, round(time.monotonic() - arrived, 1))
            try:
                self.store.set(f"sign/{self.rank}", json.dumps(asdict(sign)))
            except RuntimeError:  # whoever keeps the store has ended: nobody can be told
                return
            if self.ended.wait(BEAT):
                return

    def read(self) -> dict[int, Sign]:
        """Everybody's last sign, this process's excepted."""
        keys = {rank: f"sign/{rank}" for rank in range(self.size) if rank != self.rank}
        try:
            return {r: Sign(**json.loads(self.store.get(k))) for r, k in keys.items() if self.store.check([k])}
        except RuntimeError:
            return {}

    def close(self) -> None:
        self.ended.set()
        self.thread.join(10 * BEAT)


def stand(frame: FrameType) -> tuple[str, bool]:
    """Where a thread is, in words, and whether it waits for another rank there.

    The place is the innermost one that is neither Python's nor torch's: the reader's own code, or this package's.
    """
    inner, place = frame.f_code.co_filename, frame
    while place.f_back is not None and _library(place.f_code.co_filename):
        place = place.f_back
    file, line = place.f_code.co_filename, place.f_lineno
    waits = inner.startswith(os.path.join(_TORCH, "distributed")) or file.startswith(_WAITING)
    waits = waits or ".wait(" in linecache.getline(file, line)
    return f"{place.f_code.co_name}, {os.path.basename(file)}:{line}", waits


def _library(file: str) -> bool:
    return file.startswith((_TORCH, "<")) or (file.startswith(_PYTHON) and "site-packages" not in file)


def blame(before: Mapping[int, Sign], now: Mapping[int, Sign], ended: Collection[int], late: bool) -> str:
    """Whom the others wait for, as a sentence; "" if the signs don't tell.

    before, now: signs of the other ranks, some beats apart.  ended: ranks that have met an error and said so.  late:
    somebody waited too long (else: was cut off, and those that merely compute have nothing to do with it).
    """
    others = {rank: sign for rank, sign in now.items() if rank not in ended}
    silent = {r: s for r, s in others.items() if r in before and before[r].beat == s.beat}
    if silent:
        gives, its = ("gives", "its machine is") if len(silent) == 1 else ("give", "their machines are")
        return f"{_named(silent)} {gives} no sign of life any more: killed, stopped, or {its} gone"
    busy = {r: s for r, s in others.items() if not s.waits}
    if late and busy:
        since = min(s.since for s in busy.values())
        return f"{_named(busy)} kept the others waiting, and stood there for {since:.0f} s"
    return ""


def _named(signs: Mapping[int, Sign]) -> str:
    named = [f"rank {rank} (step {sign.step}, in {sign.where})" for rank, sign in sorted(signs.items())]
    return " and ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
