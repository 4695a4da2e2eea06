"""The live view: what the last steps were like, in two short lines under a bar, or in one line without a terminal."""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_SECONDS = 10.0  # where there is no terminal: at most one line in this time
RECENT = 20  # steps over which speed and time left are taken


class Live(Progress):
    """A bar of steps with numbers below. Every line fits 60 columns; a narrower terminal breaks it between numbers.

    `with live:` draws it if `console` is a terminal; else `show` prints a line now and then.
    """

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.drawn = console.is_terminal and not console.quiet
        self.numbers = Text()
        super().__init__(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not self.drawn,
            transient=True,
        )
        self.steps, self.last_line = steps, -float("inf")
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT)  # (time, tokens) of the last steps
        self.bar = self.add_task("train", total=steps, completed=done, left="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and below it the numbers."""
        yield from super().get_renderables()
        yield self.numbers

    def show(self, line: Mapping[str, Any]) -> None:
        """A step's line of metrics."""
        now, done = time.monotonic(), line["step"]
        self.recent.append((now, line["tokens"]))
        then, before = self.recent[0]
        speed = (line["tokens"] - before) / (now - then) if now > then else line["tokens_per_second"]
        left = ""
        if len(self.recent) > 1:
            left = f"{clock((self.steps - done) * (now - then) / (len(self.recent) - 1))} left"
        learning, machine = learned(line), worked(line, speed)
        self.numbers = Text("\n".join(broken(parts, self.console.width) for parts in (learning, machine)))
        self.update(self.bar, completed=done, left=left)
        if not self.drawn and (now - self.last_line >= LINE_SECONDS or done == self.steps):
            words = "  ".join([f"step {done}/{self.steps}", *learning, *machine, *[left][: bool(left)]])
            self.console.print(words, markup=False, highlight=False)
            self.last_line = now


def broken(parts: Sequence[str], width: int) -> str:
    """The parts on one line, or on several where it is too long, none of them broken."""
    joined = "  ".join(part.replace(" ", "\xa0") for part in parts)
    return textwrap.fill(joined, width).replace("\xa0", " ")


def learned(line: Mapping[str, Any]) -> list[str]:
    """How the model does. A step that was left out has no loss."""
    loss, mtp = ("–" if line[name] is None else f"{line[name]:.3f}" for name in ("loss", "loss_mtp"))
    return [f"loss {loss}", f"mtp {mtp}", f"MaxVio {line['max_violation']:.2f}"]


def worked(line: Mapping[str, Any], tokens_per_second: float) -> list[str]:
    """How the machine does: of MFU, memory and bubble what is known (a bubble only a pipeline has)."""
    parts = [f"{tokens_per_second:,.0f} tokens/s"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {percent(line['mfu'])}")
    if line.get("memory") is not None:
        parts.append(f"memory {size(line['memory'])}")
    if line.get("bubble"):
        parts.append(f"bubble {percent(line['bubble'])}")
    return parts


def percent(share: float) -> str:
    """0.414 → "41%", 0.0414 → "4.1%"."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def size(count: float) -> str:
    """1288490188 → "1.2 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
