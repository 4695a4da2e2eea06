"""A schedule as the report's Figure 5: a row for each rank, time to the right, in each box the micro-batch's number.

What is drawn is the timeline that :func:`~dsv3_book.pipeline.simulate.simulate` counts: a box is as long as its action
takes, and where a row is empty, the rank waits.
"""

from collections import Counter
from itertools import groupby
from typing import Any

from dsv3_book.pipeline.schedule import Action, Schedule
from dsv3_book.pipeline.simulate import Costs, Span, Timeline, simulate
from dsv3_book.plot import BLUE, CARD, GREEN, GREY, INK, LIGHT, ORANGE, RED, Picture, figure, finish

COLORS = {"F": BLUE, "B": RED, "I": ORANGE, "W": GREEN}
MEANING = {"F": "forward", "B": "backward, whole", "I": "backward, inputs", "W": "backward, weights"}
SMALLEST = 4.2  # points: where a number would have to be smaller, it is left out


def draw(
    schedule: Schedule | Timeline,
    costs: Costs | None = None,
    *,
    caption: str = "",
    name: str = "",
    unit: str = "",
    width: float = 7.2,
    until: float | None = None,
    counts: bool = False,
) -> Picture:
    """The figure of a schedule, or of a timeline that `simulate` gave.

    Colours tell forward, backward and its two halves apart. Of a pair's box the upper half is the forward, the lower
    half the backward. Pale boxes are the second way through the ranks: in a two-way pipeline the micro-batches that
    enter at the last rank, in a V the chunks on the way back.

    Args:
        costs: durations, for a schedule (default: F = I = W = 1, a pair F + I + W, no hops).
        caption, name: as in :func:`dsv3_book.plot.finish`.
        unit: of time, for the axis ("ms").
        width: in inches; 7.2 fills the page's column.
        until: draw only up to this time.
        counts: write each rank's bubble and its most activations at once beside its row.

    Raises:
        ValueError: costs for a timeline, which has its durations already; or a schedule that can't be simulated.
    """
    if isinstance(schedule, Timeline):
        if costs is not None:
            raise ValueError("a timeline has its durations already: give draw a schedule with costs, or no costs")
        timeline = schedule
    else:
        timeline = simulate(schedule, costs)
        unit = unit or ("" if costs else "F = I = W = 1")
    end = timeline.makespan if until is None else min(until, timeline.makespan)
    spans = [span for mine in timeline.spans for span in mine if span.start < end]
    pale = _second_way(timeline)

    fig, ax = figure(width, 0.75 + 0.29 * timeline.num_ranks)
    ax.set(xlim=(0, end), ylim=(timeline.num_ranks - 0.5, -0.5), xlabel=f"time ({unit})" if unit else "time")
    ax.set_yticks(range(timeline.num_ranks), range(timeline.num_ranks))
    ax.set_ylabel("rank")
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ax.barh(range(timeline.num_ranks), end, height=0.86, color=LIGHT, alpha=0.55, lw=0)  # seen where a rank waits
    boxes = [box for span in spans for box in _boxes(span, pale, end)]
    _fill(ax, boxes)
    _write(ax, boxes, (width - (1.6 if counts else 0.7)) * 72 / end)
    if counts:
        for rank, (bubble, held) in enumerate(zip(timeline.bubble, timeline.peak_activations, strict=True)):
            _beside(ax, rank, f"{bubble:.4g}", str(held), INK)
        _beside(ax, -0.8, "bubble", "held", GREY)
    kinds = Counter(part.kind for span in spans for part in span.action.parts)
    _legend(fig, [kind for kind in COLORS if kinds[kind]], _what_pale_means(timeline) if pale else "")
    return finish(fig, alt=_alt(timeline, unit, end), caption=caption, name=name)


# --- boxes ----------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float, Action, bool]  # left, right, top, bottom, what, pale


def _boxes(span: Span, pale: set[tuple[int, int]], end: float) -> list[Box]:
    """One box, or a pair's two halves, one above the other."""
    parts, top, height = span.action.parts, span.rank - 0.43, 0.86 / len(span.action.parts)
    return [
        (span.start, min(span.end, end), top + i * height, top + (i + 1) * height, part,
         (part.stage, part.microbatch) in pale)
        for i, part in enumerate(parts)
    ]  # fmt: skip


def _fill(ax: Any, boxes: list[Box]) -> None:
    from matplotlib.collections import PolyCollection

    corners = [[(l, t), (r, t), (r, b), (l, b)] for l, r, t, b, _, _ in boxes]
    colors = [_color(part.kind, light) for *_, part, light in boxes]
    ax.add_collection(PolyCollection(corners, facecolors=colors, edgecolors=CARD, linewidths=0.5, zorder=2))


def _write(ax: Any, boxes: list[Box], points: float) -> None:
    """The micro-batch in each box, all in one size: the largest that fits all boxes, but if that is smaller than
    SMALLEST, this, in the boxes that have room for it. `points` are the points in one unit of time."""
    digit = 0.72  # a digit's width with some air, in sizes of the font
    fits = [(r - l) * points / len(str(part.microbatch)) / digit for l, r, _, _, part, _ in boxes]
    size = min(6.5 if any(b - t < 0.8 for _, _, t, b, _, _ in boxes) else 8.0, *fits)
    size = max(size, SMALLEST)
    for (l, r, t, b, part, light), fit in zip(boxes, fits, strict=True):
        if fit >= size:
            ax.text((l + r) / 2, (t + b) / 2, part.microbatch, ha="center", va="center_baseline", fontsize=size,
                    color=INK if light or part.kind == "I" else "white", zorder=3)  # fmt: skip


def _beside(ax: Any, row: float, bubble: str, held: str, color: str) -> None:
    for x, text in ((1.05, bubble), (1.12, held)):
        ax.text(x, row, text, transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=7.5, color=color)


def _color(kind: str, pale: bool) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    mix = 0.38 if pale else 1.0
    red, green, blue = (mix * c + (1 - mix) for c in to_rgb(COLORS[kind]))
    return red, green, blue


def _legend(fig: Any, kinds: list[str], pale: str) -> None:
    from matplotlib.patches import Patch

    entries = [Patch(color=COLORS[kind], label=f"{kind} {MEANING[kind]}") for kind in kinds]
    if pale:
        entries.append(Patch(facecolor=_color("F", True), edgecolor=GREY, lw=0.5, label=f"pale: {pale}"))
    fig.legend(handles=entries, loc="outside upper left", ncols=len(entries), fontsize=7.5, handlelength=1.0,
               handleheight=0.9, columnspacing=1.1, handletextpad=0.4, borderpad=0.1)  # fmt: skip


# --- what it shows --------------------------------------------------------------------------------------------------


def _homes(timeline: Timeline) -> dict[tuple[int, int], int]:
    """(stage, micro-batch) -> the rank of its forward."""
    return {
        (part.stage, part.microbatch): span.rank
        for mine in timeline.spans
        for span in mine
        for part in span.action.parts
        if part.kind == "F"
    }


def _is_two_way(homes: dict[tuple[int, int], int]) -> bool:
    return len({rank for (stage, _), rank in homes.items() if stage == 0}) > 1


def _second_way(timeline: Timeline) -> set[tuple[int, int]]:
    """The chunks to draw pale."""
    homes = _homes(timeline)
    if _is_two_way(homes):
        first = min(rank for (stage, _), rank in homes.items() if stage == 0)
        entered_first = {m for (stage, m), rank in homes.items() if stage == 0 and rank == first}
        return {chunk for chunk in homes if chunk[1] not in entered_first}
    lowest: dict[int, int] = {}
    for (stage, _), rank in homes.items():
        lowest[rank] = min(stage, lowest.get(rank, stage))
    return {(stage, m) for (stage, m), rank in homes.items() if stage > lowest[rank]}


def _what_pale_means(timeline: Timeline) -> str:
    homes = _homes(timeline)
    if not _is_two_way(homes):
        return "a rank's later stages"
    return f"entered at rank {max(rank for (stage, _), rank in homes.items() if stage == 0)}"


def _alt(timeline: Timeline, unit: str, end: float) -> str:
    bubble, held = timeline.bubble, timeline.peak_activations
    numbers = {part.microbatch for mine in timeline.spans for span in mine for part in span.action.parts}
    runs = [
        kind if (length := len(list(run))) == 1 else f"{length} {kind}"
        for kind, run in groupby(span.action.kind for span in (timeline.spans[0] if timeline.spans else []))
    ]
    rows = ", ".join(runs[:24]) + (", and so on" if len(runs) > 24 else "")
    shown = f" The figure ends at {end:.4g}." if end < timeline.makespan else ""
    pairs = sum(span.action.kind == "FB" for mine in timeline.spans for span in mine)
    least, most = f"{min(bubble):.4g}", f"{max(bubble):.4g}"
    return (
        f"Gantt chart of the schedule {timeline.name}: {timeline.num_ranks} rows, one a rank, {len(numbers)} "
        f"micro-batches, time to the right up to {timeline.makespan:.4g}{f' ({unit})' if unit else ''}.{shown} "
        f"A rank waits {most if least == most else f'between {least} and {most}'} of that, and holds at most "
        f"{max(held)} activations. "
        f"{f'{pairs} boxes are overlapped pairs of a forward and a backward. ' if pairs else ''}"
        f"Rank 0 does in turn: {rows}."
    )
