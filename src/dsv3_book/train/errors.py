"""How a run ends badly: the first error of any rank is what the user sees, in a sentence; the rest is in the logs.

When one rank fails, all others fail a moment later, for want of what it should have sent. So each leaves a note for the
others before it ends (in the store at which they met, and for people in RUN/logs/rank-3.error.json); and a rank whose
error is only that another one is gone looks for the note of the one that failed first, and shows that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.distributed_c10d import _get_default_store

from dsv3_book.checkpoint import CheckpointError, SaveError
from dsv3_book.parallel import DataParallel, PeerError
from dsv3_book.parallel.lost import innermost, is_late, is_lost, reason
from dsv3_book.parallel.signs import Signs, blame
from dsv3_book.pipeline.agree import PipelineError
from dsv3_book.train.logs import NAME
from dsv3_book.train.metrics import Unwritable
from dsv3_book.train.nonfinite import NonFinite
from dsv3_book.train.preflight import PreflightError

if TYPE_CHECKING:
    from dsv3_book.train.trainer import Trainer

KEY = "errors"  # in the store: one note a line, in the order in which they came
FOREIGN = 2.0  # seconds that a rank waits for the note of one that has ended: it was left before that end
SILENT = 5.0  # … and for signs of life of those that were waited for in vain
INPUT = (ValueError, OSError, ModuleNotFoundError)  # before training begins: what the user gave is at fault
TOLD = (NonFinite, SaveError, PreflightError, CheckpointError, Unwritable)  # the same on all ranks, or rank 0's only
PLAIN = (*TOLD, PipelineError, PeerError)  # errors of ours: the sentence needs no type in front


@dataclass(frozen=True)
class Note:
    """kind: "own" (an error of this rank), "all" (the same on all ranks), "lost" (that another one is gone or silent).
    screen: what its messages are written to."""

    kind: str
    rank: int
    step: int | None
    time: float
    message: str
    screen: str


class Ending:
    """Of one process. It knows as much of the run as there is: its processes when `joined`, a trainer when `begun`."""

    def __init__(self) -> None:
        self.parallel = DataParallel(int(os.environ.get("RANK", 0)))  # what torchrun says, until they are joined
        self.store: Any = None  # torch's stubs know neither its `clone` nor its `append`
        self.signs: Signs | None = None
        self.trainer: Trainer | None = None

    def joined(self, parallel: DataParallel) -> None:
        """From now on there are others, who get signs of life."""
        self.parallel = parallel
        if parallel.size > 1:
            store: Any = _get_default_store()
            self.store = store.clone()  # a connection of its own: it mustn't wait for what others ask
            self.signs = Signs(self.store, parallel.rank, parallel.size, lambda: self.step or 0)

    def begun(self, trainer: Trainer) -> None:
        self.trainer = trainer
        with contextlib.suppress(OSError):
            self._file(trainer.config.out).unlink(missing_ok=True)

    @property
    def step(self) -> int | None:
        """The step under way, or that comes next."""
        return min(self.trainer.step + 1, self.trainer.config.steps) if self.trainer is not None else None

    def tell(self, error: Exception) -> int:
        """Leaves a note, says what is wrong if it is this rank's to say, and tells torchrun, which repeats it.

        Returns the exit status: 1 the training failed, 2 bad input.
        """
        bad_input = self.trainer is None and isinstance(error, (*INPUT, PeerError))
        mine = self._note(error, bad_input)
        self._write_down(error, mine)
        if self.trainer is not None and mine.kind == "lost":
            self.trainer.saver.abandon()
        first = self._first(mine, is_late(error))
        sentence = f"error: {self._sentence(first)}"
        speaks = first.rank == mine.rank or (mine.rank == 0 and first.screen != mine.screen)
        if self.store is None and mine.kind == "all" and mine.rank > 0:
            speaks = False  # each of the processes finds the same, before they know of each other
        if speaks and first.message:  # a PeerError has nothing to say: the one it speaks of has said it
            print(sentence, file=sys.stderr, flush=True)
        _tell_torchrun(sentence, first.time if first.rank == mine.rank else time.time() + 1)
        return 2 if bad_input else 1

    def close(self) -> None:
        """The end of what runs beside the main thread, and of the group of processes. The folder is free from now on,
        unless a save is under way: then when the process ends."""
        if self.signs is not None:
            self.signs.close()
        if self.trainer is not None:
            self.trainer.saver.linger()  # before its group of processes is gone
            if (saving := self.trainer.saver.thread) is None or not saving.is_alive():
                self.trainer.folder.release()
        self.parallel.close()

    # This rank's -------------------------------------------------------------------------------------------------
    def _note(self, error: Exception, bad_input: bool) -> Note:
        kind = "own"
        if isinstance(error, PeerError) or is_lost(error) or (isinstance(error, PipelineError) and not error.__cause__):
            kind = "lost"
        elif bad_input or isinstance(error, TOLD):
            kind = "all"
        return Note(kind, self.parallel.rank, self.step, time.time(), words(error), _screen())

    def _write_down(self, error: Exception, note: Note) -> None:
        """For people, with the traceback: in the log and beside it, or where there is no log yet, on the screen."""
        trace = "".join(traceback.format_exception(error))
        if self.trainer is None:
            if note.kind == "own":
                print(trace, file=sys.stderr, end="", flush=True)
            return
        logging.getLogger(NAME).error("%s", trace)
        with contextlib.suppress(OSError):  # a full disk: the screen still has it
            kept = {**asdict(note), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "traceback": trace}
            self._file(self.trainer.config.out).write_text(json.dumps(kept, indent=1), encoding="utf-8")

    def _file(self, out: Path) -> Path:
        return out / "logs" / f"rank-{self.parallel.rank}.error.json"

    # Whose was the first? ----------------------------------------------------------------------------------------
    def _first(self, mine: Note, late: bool) -> Note:
        """The note that is to be shown: this rank's, or another's from which its error follows."""
        if self.store is None or self.signs is None:
            return mine
        before, waits = self.signs.read(), SILENT if late else FOREIGN
        notes = self._exchange(mine)
        deadline = time.monotonic() + waits
        while not _settled(mine, notes, self.parallel.size) and time.monotonic() < deadline:
            time.sleep(0.05)
            notes = self._exchange()
        if own := [note for note in notes if note.kind == "own"]:
            return own[0]
        if same := [note for note in notes if note.kind == "all"]:
            return min(same, key=lambda note: note.rank)
        first = next((note for note in notes if note.message), mine)
        if first.rank == mine.rank:
            who = blame(before, self.signs.read(), {note.rank for note in notes}, late)
            return replace(mine, message=f"{who}. {_upper(self._sentence(mine))}", kind="blamed") if who else mine
        return first

    def _exchange(self, mine: Note | None = None) -> list[Note]:
        """All notes so far, this rank's put beside them."""
        try:
            if mine is not None:
                self.store.append(KEY, json.dumps(asdict(mine)) + "\n")
            lines = self.store.get(KEY).decode().splitlines() if self.store.check([KEY]) else []
        except RuntimeError:  # the store has ended
            return [mine] if mine is not None else []
        return [Note(**json.loads(line)) for line in lines]

    def _sentence(self, note: Note) -> str:
        """A note, with who and when in front where the message doesn't hold for all."""
        where = [f"rank {note.rank}"] if self.parallel.size > 1 else []
        where += [f"step {note.step}"] if note.step is not None else []
        if not where or note.kind == "blamed" or (note.kind == "all" and note.rank == 0):
            return note.message
        return f"{', '.join(where)}: {note.message}"


def _settled(mine: Note, notes: list[Note], size: int) -> bool:
    """Whether more notes would change nothing."""
    if any(note.kind == "own" for note in notes) or len({note.rank for note in notes}) == size:
        return True
    return mine.kind == "all" and any(note.kind == "all" and note.rank == 0 for note in notes)


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def words(error: Exception) -> str:
    """An error in a sentence."""
    if isinstance(error, PeerError):
        return ""
    text = reason(error)
    if isinstance(error, PipelineError):  # which names its rank in the pipeline
        text = text.partition(", ")[2] or text
        first = innermost(error)
        if first is not error and not is_lost(error) and str(first):
            text = text.replace(reason(first), f"{type(first).__name__}: {reason(first)}", 1)
        return text
    if is_lost(error) and not error.__cause__:  # torch's own words say nothing of what was waited for
        return f"in {_place(error)}: {text}"
    return text if isinstance(error, (*PLAIN, *INPUT)) and text else f"{type(error).__name__}: {text}"


def _place(error: Exception) -> str:
    """Where in this package an error came up."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "dsv3_book" in f.filename]
    return f"{frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else "torch"


def _screen() -> str:
    """What this process's messages are written to: the same for processes that share a terminal, or a file."""
    try:
        file = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # replaced, by a notebook or a test
        return f"{socket.gethostname()} {os.getpid()}"
    return f"{socket.gethostname()} {file.st_dev} {file.st_ino}"


def _tell_torchrun(sentence: str, when: float) -> None:
    """torchrun shows what it finds in this file, of the rank with the earliest time as the cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": sentence, "timestamp": str(int(when))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": more}}), encoding="utf-8")
