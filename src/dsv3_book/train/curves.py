"""The figures of a run's report: each a small one, so that they stand side by side on a screen, or below each other on
a phone with letters that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from dsv3_book.plot import BLUE, GREEN, ORANGE, figure, svg
from dsv3_book.train.loads import heat, relative

POINTS = 300  # of a line; where there are more steps, each point is the mean of several
SIZE = 4.0, 2.5  # inches


class Line(NamedTuple):
    """A curve: values over steps, NaN where there is none. `few`: with a mark at every point."""

    name: str
    steps: Real[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    few: bool = False


def thin(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, least and greatest values of at most `POINTS` stretches of equally many steps."""
    known = np.isfinite(line.values)
    steps, values = line.steps[known], line.values[known]
    cuts = np.unique(np.linspace(0, len(values), min(POINTS, len(values)) + 1).astype(int))
    starts, sizes = cuts[:-1], np.diff(cuts)
    if not len(starts):
        return steps, values, values, values
    means = np.add.reduceat(values, starts) / sizes
    return steps[cuts[1:] - 1], means, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def curve(name: str, title: str, unit: str, lines: Sequence[Line], floor: float | None = None) -> str:
    """A figure of one or more lines over the steps as an inline SVG; around each, paler, the range it was averaged
    over. floor: what the axis of values begins at."""
    fig, ax = figure(*SIZE)
    said = []
    for line, color, style in zip(lines, (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
        steps, means, low, high = thin(line)
        marks: Mapping[str, Any] = {"marker": "o", "markersize": 3.5} if line.few or len(steps) < 25 else {}
        ax.plot(steps, means, style, color=color, label=line.name, lw=1.4, **marks)
        if (high > low).any():
            ax.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
        if len(means):
            said.append(
                f"{line.name}: from {means[0]:.4g} at step {steps[0]} to {means[-1]:.4g} at step {steps[-1]}, between "
                f"{low.min():.4g} and {high.max():.4g}"
            )
    if len(lines) > 1:
        ax.legend()
    ax.set(title=title, xlabel="step", ylabel=unit)
    _whole_steps(ax)
    if floor is not None:
        ax.set_ylim(bottom=floor)
    return svg(fig, alt=f"Line chart over steps, {title}. {'; '.join(said) or 'No values'}.", name=name)


def _whole_steps(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def load_now(load: Real[np.ndarray, "routers E"], routers: Sequence[str], step: int) -> str:
    """One step's load: routers by experts."""
    rows = len(routers)
    fig, ax = figure(SIZE[0], max(SIZE[1], 1.2 + min(0.16 * rows, 6)))
    heat(fig, ax, relative(load))
    every = -(-rows // 40)
    ax.set(title=f"All routers at step {step:,}", xlabel="expert", ylabel="router")
    ax.set_yticks(range(0, rows, every), routers[::every])
    worst = relative(load).max(-1)
    alt = (
        f"Heat map, routers by experts, load over the router's mean at step {step}. The busiest expert of each router: "
    )
    alt += ", ".join(f"{name} {value:.2f}" for name, value in zip(routers, worst, strict=True))
    return svg(fig, alt=alt, name="load-now")


def load_over_time(
    load: Real[np.ndarray, "moments E"], steps: Real[np.ndarray, " moments"], router: str, name: str
) -> str:
    """One router's load in the course of the run: experts by moments."""
    fig, ax = figure(*SIZE)
    across = relative(load)
    heat(fig, ax, across.T, extent=(0.5, len(steps) + 0.5, across.shape[1] - 0.5, -0.5))
    at = np.unique(np.linspace(0, len(steps) - 1, min(4, len(steps))).round().astype(int))
    ax.set(title=f"{router[:1].upper()}{router[1:]}, over the run", xlabel="step", ylabel="expert")
    ax.set_xticks(at + 1, [f"{steps[i]:,}" for i in at])
    alt = (
        f"Heat map of {router}, experts by steps {steps[0]} to {steps[-1]}, load over mean. The busiest expert's load "
        f"goes from {across[0].max():.2f} to {across[-1].max():.2f} times the mean."
    )
    return svg(fig, alt=alt, name=name)
