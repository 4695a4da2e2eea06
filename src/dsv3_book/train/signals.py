"""Ctrl-C and SIGTERM as a request: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_SECONDS = 2.0  # torchrun passes a terminal's Ctrl-C on, so one press arrives twice
_listening: list[Callable[[], bool]] = []  # what the outermost block gave


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGINT or SIGTERM only makes the function it gives return True.

    A second one, pressed more than two seconds later, means it: KeyboardInterrupt. Handlers can only be set in a
    process's main thread; elsewhere (a notebook's worker thread) signals do what they did before. A block within a
    block hears of what the outer one heard.
    """
    if _listening:
        yield _listening[0]
        return
    first: list[float] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] > AGAIN_SECONDS:
            raise KeyboardInterrupt
        first.append(time.monotonic())

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    _listening.append(lambda: bool(first))
    try:
        yield _listening[0]
    finally:
        _listening.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
