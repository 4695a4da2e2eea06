"""A log of every rank, RUN/logs/rank-3.log: what it did and when, Python's warnings, what torch logs, and its error."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

NAME = "dsv3_book.train"  # of the logger
BEGIN = "log of process"  # how a log's first line begins
_open: list[_File] = []  # at most one: a process is one rank of one run


def rank_log(out: Path, rank: int) -> logging.Logger:
    """The log of this process, `out`/logs/rank-`rank`.log: what is written goes to the end of the file, line by line.
    The first line names process and machine.

    Use it as any logger: `log.info("step 3: 1.21 s")`, and `log.exception("failed")` in an `except` for the whole
    traceback. From now on it also gets Python's warnings and what torch logs (warnings and errors); both are shown as
    before, too. A later call, for another run in this process, ends this log. If the file can no longer be written,
    training goes on and that is said once.

    Raises:
        OSError: the file can't be made.
    """
    close_log()
    path = out / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path, encoding="utf-8")
    file.setFormatter(_Lines("%(asctime)s %(levelname)-7s %(message)s"))
    _open.append(file)
    log = logging.getLogger(NAME)
    log.setLevel(logging.INFO)
    log.propagate = False  # it is a file; what people should see is told them elsewhere
    log.addHandler(file)
    for heard in _torchs():
        heard.addHandler(file)
    _hear_warnings(log)
    log.info("%s %d on %s", BEGIN, os.getpid(), socket.gethostname())
    return log


def starts(out: Path) -> int | None:
    """How often rank 0 of the run in `out` was started, by its log; None if there is none."""
    path = out / "logs" / "rank-0.log"
    if not path.exists():
        return None
    return path.read_text(encoding="utf-8", errors="replace").count(f" {BEGIN} ")


def close_log() -> None:
    """Ends the log of this process, if there is one."""
    for file in _open:
        for log in (logging.getLogger(NAME), *_torchs()):
            log.removeHandler(file)
        with contextlib.suppress(OSError):  # a full disk was told of already
            file.close()
    _open.clear()


def _torchs() -> list[logging.Logger]:
    """torch's logger, and those below it that keep what they get to themselves."""
    known = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith("torch.")]
    apart = [log for log in known if isinstance(log, logging.Logger) and not log.propagate]
    return [logging.getLogger("torch"), *apart]


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip()


class _File(logging.FileHandler):
    """A file that holds nobody up: it is flushed after every record, and a full disk ends the log, not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        print(f"note: {self.baseFilename} gets no more lines: {error}", file=sys.stderr, flush=True)
        self.setLevel(logging.CRITICAL + 1)


def _hear_warnings(log: logging.Logger) -> None:
    """Writes down every warning that is shown. (`logging.captureWarnings` would no longer show them.)"""
    shown = warnings.showwarning
    if getattr(shown, "logs", False):
        return

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any) -> None:
        log.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        shown(message, category, filename, lineno, *rest, **more)

    show.logs = True  # type: ignore[attr-defined]
    warnings.showwarning = show
