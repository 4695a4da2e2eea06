"""Loss spikes: how far a run's loss ever rose above where it had been, and whether it came back (claim C20)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 50  # earlier steps that a step is compared with,
FEWEST = 20  # and so many at least
THRESHOLD = 6.0  # spreads above the median from which on a step counts as a spike
BLOCK = 8192  # steps judged at once
NORMAL = 1.4826  # median absolute deviation → standard deviation, for bell-shaped noise


@dataclass(frozen=True)
class Spike:
    """A step whose loss lies `rise` spreads above `usual`, the median of the steps before it. back: the first later
    step whose loss is at most that median again; None if there is none."""

    step: int
    loss: float
    usual: float
    rise: float
    back: int | None


@dataclass(frozen=True)
class Spikes:
    """What was found. judged: steps that had enough others before them.  largest: the largest rise of all, spike or
    not (None if nothing could be judged, or the loss never rose).  over: the steps that count as spikes."""

    judged: int
    largest: Spike | None
    over: list[Spike]

    @property
    def lasting(self) -> list[Spike]:
        """Those after which the loss was never again where it had been."""
        return [spike for spike in self.over if spike.back is None]


def find_spikes(steps: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray) -> Spikes:
    """Compares every step's loss with the `WINDOW` steps before it.

    Usual is their median; the spread is their median absolute deviation from it, as a standard deviation, and at least
    a thousandth of the median. Both hardly move when a spike itself is among them. A falling loss makes the spread
    larger: early in a run, when it falls fast, only large rises count. Steps whose loss is not finite are left out.
    """
    step, loss = np.asarray(steps), np.asarray(losses, dtype=float)
    finite = np.isfinite(loss)
    step, loss = step[finite], loss[finite]
    judged = range(FEWEST, len(loss))
    usual, rise = np.empty(len(loss)), np.full(len(loss), -np.inf)
    begin = [slice(i, i + 1) for i in judged if i < WINDOW]  # these have fewer steps before them
    for these in begin + [slice(i, min(i + BLOCK, len(loss))) for i in range(WINDOW, len(loss), BLOCK)]:
        width = min(these.start, WINDOW)
        before = np.lib.stride_tricks.sliding_window_view(loss[these.start - width : these.stop - 1], width)
        now = loss[these]
        median = np.median(before, axis=-1)
        deviation = np.median(abs(before - median[:, None]), axis=-1)
        spread = np.maximum(NORMAL * deviation, np.maximum(abs(median) / 1000, 1e-12))
        usual[these], rise[these] = median, (now - median) / spread

    def spike(i: int) -> Spike:
        later = np.flatnonzero(loss[i + 1 :] <= usual[i])
        back = int(step[i + 1 + later[0]]) if len(later) else None
        return Spike(int(step[i]), float(loss[i]), float(usual[i]), float(rise[i]), back)

    most = int(rise.argmax()) if len(judged) else 0
    largest = spike(most) if len(judged) and rise[most] > 0 else None
    return Spikes(len(judged), largest, [spike(i) for i in judged if rise[i] > THRESHOLD])


def told(found: Spikes) -> str:
    """The finding in words: what this run shows, and no more."""
    if not found.judged:
        return f"Too few steps to say: a step is compared with {FEWEST} to {WINDOW} steps before it."
    begin = f"Of {found.judged:,} steps that have {FEWEST} or more before them, "
    if found.largest is None:
        return begin + "none lay above the median of those before it: no spike in this run."
    top = found.largest
    largest = (
        f"the largest rise is at step {top.step:,}: loss {top.loss:.4g}, {top.rise:.1f} spreads above the usual "
        f"{top.usual:.4g}. "
    )
    if not found.over:
        return begin + f"none counts as a spike (more than {THRESHOLD:g} spreads); {largest}No spike in this run."
    count = f"{len(found.over):,} {'counts as a spike' if len(found.over) == 1 else 'count as spikes'}"
    begin += f"{count} (more than {THRESHOLD:g} spreads); {largest}"
    if found.lasting:
        first = found.lasting[0]
        return begin + (
            f"After step {first.step:,} the loss has not been back at {first.usual:.4g} by the end of what was "
            "recorded: so far that spike is not overcome."
        )
    steps = max((spike.back or 0) - spike.step for spike in found.over)
    return begin + f"After each the loss came back to where it had been, within {steps:,} steps at most."
