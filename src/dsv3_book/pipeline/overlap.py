"""A forward and a backward chunk as a pair: one's tokens travel while the other is computed (report §3.2.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dsv3_book.pipeline.stage import Parts

# The order in which the parts of a pair's layers are begun. Both streams, what is computed (attention F, mlp B, mlp W,
# mlp F, attention B, attention W) and what travels (combine B, dispatch F, dispatch B, combine F), keep the order of
# the released profile. There kernels run while their issuer goes on, and a transfer may be issued after the computation
# that hides it; here a computation blocks its issuer, so each transfer is begun just before.
ORDER = (
    ("B", "combine"),
    ("F", "attention"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("B", "mlp W"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attention"),
    ("B", "attention W"),
)


class Event(NamedTuple):
    """A part that was done: of a forward ("F"), a backward ("B") or weight gradients that were put off ("W"), of which
    stage and micro-batch, from when to when (seconds of `time.perf_counter`), and whether its chunk was one of a pair.
    """

    kind: str
    stage: int
    microbatch: int
    part: str
    start: float
    end: float
    paired: bool


class Run:
    """A chunk's forward or backward under way; `next` names the part that comes next, None when all is done."""

    def __init__(self, parts: Parts, done: Callable[[str, float, float], None] | None = None) -> None:
        self.parts, self.done = parts, done
        self.next: str | None = None
        self.result: Tensor | None = None
        self._resume()

    def step(self) -> None:
        """Does the next part."""
        part, start = self.next, time.perf_counter()
        self._resume()
        if self.done and part:
            self.done(part, start, time.perf_counter())

    def finish(self) -> Tensor | None:
        """Does all that is left; gives the chunk's result."""
        while self.next:
            self.step()
        return self.result

    def _resume(self) -> None:
        try:
            self.next = next(self.parts)
        except StopIteration as stop:
            self.next, self.result = None, stop.value


def overlapped(forward: Run, backward: Run) -> tuple[Tensor | None, Tensor | None]:
    """Runs both, layer by layer in `ORDER`; gives their results.

    A part that is not in the order (embedding, head, the end of a combine)
    is done as soon as its turn in its own chunk has come. When one of the two
    has no layers left, the other goes on alone.
    """
    runs = {"F": forward, "B": backward}
    while forward.next and backward.next:
        for side, part in ORDER:
            run = runs[side]
            while run.next and (side, run.next) not in ORDER:
                run.step()
            if run.next == part:
                run.step()
    return forward.finish(), backward.finish()
