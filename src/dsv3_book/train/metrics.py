"""What a run tells about itself: `metrics.jsonl`, TensorBoard, and a live view (or a line) for people."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from dsv3_book.disk import why
from dsv3_book.model.balance import max_violation
from dsv3_book.train.live import Live
from dsv3_book.train.loads import label, load_figure, pixels

LOADS = "load.jsonl"
MOMENTS = 100  # how often in a run the loads of all experts are written down


class Unwritable(OSError):
    """The run can't tell of its steps any more; it stopped after one that is saved."""

    def __init__(self, problem: OSError, folder: Path, step: int) -> None:
        self.problem = problem
        super().__init__(
            f"{why(problem, folder)}: without its metrics the run does not go on. It stopped after step {step}, which "
            "is saved; the same command goes on from there"
        )


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with the system before the next step begins.

    Opening it for a run that goes on from `step` drops what was written after that step (the work of a run that was
    killed before it could save, and a last line that was cut short), so a resumed file equals an uncut one. A line that
    can't be written is kept for the next try, and leaves nothing half-written behind.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= step] if step and path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("ab", buffering=0)
        self.waiting: list[bytes] = []

    def write(self, line: Mapping[str, Any]) -> None:
        """Raises OSError if it can't be written now."""
        self.waiting.append((json.dumps(line, allow_nan=False) + "\n").encode())
        self._empty()

    def close(self) -> None:
        """Raises OSError if some lines could not be written."""
        try:
            self._empty()
        finally:
            self.file.close()

    def _empty(self) -> None:
        while self.waiting:
            line, end = self.waiting[0], os.fstat(self.file.fileno()).st_size
            try:
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.file.fileno(), end)
                raise
            self.waiting.pop(0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, up to the first line that is not a whole one."""
    lines = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(raw)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


class Metrics:
    """Everything a run reports, from the one process that speaks; the others hold a silent one (`folder` None).

    `with metrics.after(step):` opens the files; within it, `step(...)` after each step, `validation(...)` and
    `say(...)` in between.

    Args:
        folder: the run's. It gets `metrics.jsonl`, `load.jsonl` (the load of all experts, about a hundred times in a
            run: for heat maps, and too much for a line of every step) and `tensorboard/`.
        steps: how many the whole run has.
        routers: their names, in the order of the loads' rows.
        quiet: nothing on the screen.
    """

    def __init__(self, folder: Path | None, steps: int, routers: Sequence[str] = (), quiet: bool = False) -> None:
        self.folder, self.first, self.steps, self.routers = folder, 0, steps, list(routers)
        self.console = Console(file=sys.stderr, soft_wrap=True, quiet=quiet or folder is None)
        self.load: Float[np.ndarray, "routers E"] | None = None  # of the last step
        self.problem: OSError | None = None  # the first thing that could not be written

    def after(self, step: int) -> Metrics:
        """Ready to go on from `step`."""
        self.first = step
        return self

    def __enter__(self) -> Metrics:
        if self.folder is None:
            return self
        from torch.utils.tensorboard import SummaryWriter  # half a second: only who writes pays it

        self.file = MetricsFile(self.folder / "metrics.jsonl", self.first)
        self.loads = MetricsFile(self.folder / LOADS, self.first)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first + 1)
        self.live = Live(self.console, self.steps, self.first)
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self.live.stop()
            for one in (self.file, self.loads, self.board):
                with self._noting():
                    one.close()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Nothing that can't be written is an error here: training is to end in order, with a checkpoint."""
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error

    def step(self, line: Mapping[str, Any], load: Float[Tensor, "routers E"] | None = None) -> None:
        """One optimiser step. `load`: tokens per expert in all of it, a row for each of `routers`; None if there are no
        routers."""
        if self.folder is not None:
            with self._noting():
                self._write(line, load)
            self.live.show(line)

    def _write(self, line: Mapping[str, Any], load: Float[Tensor, "routers E"] | None) -> None:
        step = line["step"]
        self.file.write(line)
        for name, value in line.items():
            if name not in ("step", "tokens") and value is not None:
                self.board.add_scalar(f"train/{name}", value, step)
        if load is not None and len(load):
            for name, value in zip(self.routers, max_violation(load).tolist(), strict=True):
                self.board.add_scalar(f"max_violation/{name}", value, step)
            self.load = load.double().cpu().numpy().copy()
            if step == self.steps or step % max(1, self.steps // MOMENTS) == 0:
                self.loads.write({"step": step, "load": self.load.round().astype(int).tolist()})

    def validation(self, line: Mapping[str, Any]) -> None:
        """One evaluation, and a picture of how experts are used at that time."""
        if self.folder is None:
            return
        with self._noting():
            self._write_validation(line)
        self.say(
            f"step {line['step']}: validation {line['val_loss']:.4f} nats/token, "
            f"{line['val_bits_per_byte']:.4f} bits/byte ({line['val_tokens']:,} tokens)"
        )

    def _write_validation(self, line: Mapping[str, Any]) -> None:
        self.file.write(line)
        for name, value in line.items():
            if name.startswith("val_") and name != "val_tokens" and value is not None:
                self.board.add_scalar(f"validation/{name}", value, line["step"])
        if self.load is not None:
            picture = pixels(load_figure(self.load, [label(name) for name in self.routers]))
            self.board.add_image("load over mean", picture, line["step"], dataformats="HWC")

    def say(self, message: str) -> None:
        """A message to people, above the live bar if there is one."""
        self.console.print(message, markup=False, highlight=False)
