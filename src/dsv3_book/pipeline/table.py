"""The report's Table 2, counted: its formulas beside what the schedules do when they are simulated.

In the formulas B is the *whole* backward of a chunk, I + W, and FB (the report's F&B) an overlapped pair. Activations
are counted in (stage, micro-batch) chunks on the worst rank and don't depend on durations, only on a list's order.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import make_schedule
from .simulate import Costs, simulate

METHODS = ("1f1b", "zb1p", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class Row:
    """One method. `holds` says what `bubble_formula` is to the worst rank's: "exact", "upper bound", "lower bound"."""

    method: str
    bubble_formula: float
    bubble: float  # worst rank, simulated
    holds: str
    activations_formula: int
    activations: int  # worst rank, simulated
    parameters: int  # stages that a rank holds: 1×, 2×


def bubble_formula(method: str, ranks: int, f: float, i: float, w: float, fb: float) -> float:
    """Table 2's bubble. DualPipeV has PP = 2·ranks stages in it (released code, deepseek-ai/DualPipe).

    Raises:
        ValueError: a method that the table doesn't have.
    """
    b = i + w
    match method:
        case "1f1b":
            return (ranks - 1) * (f + b)
        case "zb1p":
            return (ranks - 1) * (f + b - 2 * w)
        case "dualpipe":
            return (ranks / 2 - 1) * (fb + b - 3 * w)
        case "dualpipev":
            return (ranks - 1) * (fb + b - 3 * w)
    raise ValueError(f"Table 2 has no {method!r}: choose one of {', '.join(METHODS)}")


def activations_formula(method: str, ranks: int) -> int:
    """Table 2's activations: PP chunks, or PP + 1."""
    return {"1f1b": ranks, "zb1p": ranks, "dualpipe": ranks + 1, "dualpipev": 2 * ranks + 1}[method]


def formula_holds(method: str, ranks: int, f: float, i: float, w: float, fb: float) -> str:
    """What the formula is to the worst rank's bubble at these durations (same at every stage, no hop): *derived here*
    by simulating, and held by tests. `""`: nothing is claimed.

    1F1B: always exact. ZB1P: exact where W ≤ F and W ≤ I, too small otherwise: there is more weight work than gaps for
    it. DualPipe and DualPipeV, with W ≤ I and B ≤ FB ≤ F + B: exact where F = I, an upper bound where F < I, a lower
    bound where F > I. (DualPipe on two ranks has no bubble at all.)
    """
    if method == "1f1b" or (method == "dualpipe" and ranks == 2) or (method != "dualpipe" and ranks == 1):
        return "exact"
    if method == "zb1p":
        return "exact" if w <= min(f, i) else "lower bound"
    if not (w <= i and i + w <= fb <= f + i + w):
        return ""
    return "exact" if f == i else "upper bound" if f < i else "lower bound"


def table2(
    ranks: int, microbatches: int, f: float = 1.0, i: float = 1.0, w: float = 1.0, fb: float | None = None
) -> list[Row]:
    """Table 2 for `ranks` pipeline ranks (even, for DualPipe), `microbatches` and durations of F, I, W and FB
    (None: F + I + W)."""
    costs = Costs(f, i, w, fb)
    fb = f + i + w if fb is None else fb
    rows = []
    for method in METHODS:
        schedule = make_schedule(method, ranks, microbatches)
        timeline = simulate(schedule, costs)
        rows.append(
            Row(
                method,
                bubble_formula(method, ranks, f, i, w, fb),
                max(timeline.bubble),
                formula_holds(method, ranks, f, i, w, fb),
                activations_formula(method, ranks),
                max(timeline.peak_activations),
                max(len(schedule.stages(rank)) for rank in range(ranks)),
            )
        )
    return rows
