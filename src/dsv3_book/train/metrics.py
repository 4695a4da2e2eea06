"""What a run tells about itself: `metrics.jsonl`, TensorBoard, and a line (or a live bar) for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0  # where there is no terminal: at most one line in this time


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each on disk before the next step begins.

    Opening it for a run that goes on from `step` drops what was written after that step (the work of a run that was
    killed before it could save, and a last line that was cut short), so a resumed file equals an uncut one.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= step] if step and path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


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
    """

    def __init__(self, folder: Path | None, steps: int, routers: Sequence[str] = (), quiet: bool = False) -> None:
        self.folder, self.first, self.steps, self.routers = folder, 0, steps, list(routers)
        self.console = Console(file=sys.stderr, soft_wrap=True, quiet=quiet or folder is None)
        self.live = self.console.is_terminal and not self.console.quiet
        self.recent: deque[tuple[float, int]] = deque(maxlen=20)  # (time, tokens) of the last steps, for the live view
        self.last_line = -float("inf")

    def after(self, step: int) -> Metrics:
        """Ready to go on from `step`."""
        self.first = step
        return self

    def __enter__(self) -> Metrics:
        if self.folder is None:
            return self
        from torch.utils.tensorboard import SummaryWriter  # half a second: only who writes pays it

        self.file = MetricsFile(self.folder / "metrics.jsonl", self.first)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first + 1)
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.task: TaskID = self.bar.add_task("train", total=self.steps, completed=self.first, line="")
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self.bar.stop()
            self.file.close()
            self.board.close()

    def step(self, line: Mapping[str, Any], violations: Sequence[float] = ()) -> None:
        """One optimiser step. `violations`: MaxVio of each router, in the order of `routers`."""
        if self.folder is None:
            return
        self.file.write(line)
        for name, value in line.items():
            if name not in ("step", "tokens"):
                self.board.add_scalar(f"train/{name}", value, line["step"])
        for name, value in zip(self.routers, violations, strict=True):
            self.board.add_scalar(f"max_violation/{name}", value, line["step"])
        self._show(line)

    def validation(self, line: Mapping[str, Any]) -> None:
        """One evaluation."""
        if self.folder is None:
            return
        self.file.write(line)
        for name in ("val_loss", "val_bits_per_byte"):
            self.board.add_scalar(f"validation/{name}", line[name], line["step"])
        self.say(
            f"step {line['step']}: validation {line['val_loss']:.4f} nats/token, "
            f"{line['val_bits_per_byte']:.4f} bits/byte ({line['val_tokens']:,} tokens)"
        )

    def say(self, message: str) -> None:
        """A message to people, above the live bar if there is one."""
        self.console.print(message, markup=False, highlight=False)

    def _show(self, line: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.recent.append((now, line["tokens"]))
        (then, before), done = self.recent[0], line["step"]
        speed = (line["tokens"] - before) / (now - then) if now > then else line["tokens_per_second"]
        left = (self.steps - done) * (now - then) / max(1, len(self.recent) - 1) if len(self.recent) > 1 else None
        text = (
            f"loss {line['loss']:.3f}  mtp {line['loss_mtp']:.3f}  {speed:,.0f} tokens/s  "
            f"MaxVio {line['max_violation']:.2f}" + (f"  {clock(left)} left" if left is not None else "")
        )
        self.bar.update(self.task, completed=done, line=text)
        if not self.live and (now - self.last_line >= LINE_SECONDS or done == self.steps):
            self.say(f"step {done}/{self.steps}  {text}")
            self.last_line = now


def clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
