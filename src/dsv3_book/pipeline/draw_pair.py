"""A pair as two rows, what is computed above what travels: simulated and measured ones alike."""

from __future__ import annotations

from dsv3_book.pipeline.pair import Streams
from dsv3_book.plot import BLUE, CARD, GREEN, INK, LIGHT, ORANGE, Picture, figure, finish

WIDTH = 5.4  # inches
SHORT = {"attention": "attn", "dispatch": "disp", "combine": "comb"}


def draw_pair(
    rows: dict[str, Streams], *, caption: str = "", name: str = "", unit: str = "ms", until: float | None = None
) -> Picture:
    """Two lines a row: what the GPU computes and, below, what is under way to and from the experts.

    Blue is the forward chunk, orange the backward's input gradients, green its weight gradients; forward transfers are
    pale blue, backward ones pale orange. rows: what to call each, and what to draw; one time axis serves all.

    Raises:
        ValueError: nothing to draw.
    """
    if not rows:
        raise ValueError("draw_pair got no rows: give it a dictionary of names and streams")
    end = until or max(streams.span for streams in rows.values())
    fig, ax = figure(WIDTH, 0.7 + 0.8 * len(rows))  # narrower than the column: letters are larger, on a phone, too
    ax.set(xlim=(0, end), ylim=(len(rows), 0), xlabel=f"time ({unit})" if unit else "time")
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ticks, labels = [], []
    for i, (title, streams) in enumerate(rows.items()):
        for part in streams.parts:
            top = i + (0.5 if part.communicates else 0.08)
            if part.start < end:
                _box(ax, part.name, part.communicates, part.start, min(part.end, end), top, end)
        ax.axhline(i + 0.49, color=LIGHT, lw=0.8, zorder=1)
        ticks += [i + 0.28, i + 0.7]
        labels += [f"{title}\ncomputes", "travels"]
    ax.set_yticks(ticks, labels, fontsize=7.5)
    ax.set_ylabel("")
    ax.yaxis.set_label_text(" ")
    return finish(fig, alt=_alt(rows, unit), caption=caption, name=name)


def _box(ax: object, name: str, travels: bool, start: float, end: float, top: float, whole: float) -> None:
    kind = name[-2]
    color = {"F": BLUE, "B": ORANGE, "W": GREEN}[kind]
    what = name[:-3]
    ax.barh(  # type: ignore[attr-defined]
        top + 0.2, end - start, left=start, height=0.4, color=color, alpha=0.35 if travels else 1.0,
        edgecolor=CARD, lw=0.6, zorder=2,
    )  # fmt: skip
    word = SHORT.get(what, what)
    size = min(7.5, 62 * WIDTH * (end - start) / whole / (0.7 * len(word)))
    if size >= 3.6:
        ink = INK if travels or kind == "B" else "white"
        ax.text(  # type: ignore[attr-defined]
            (start + end) / 2, top + 0.2, f"{word}\n{kind}", ha="center", va="center", fontsize=size,
            linespacing=0.95, color=ink, zorder=3,
        )  # fmt: skip


def _alt(rows: dict[str, Streams], unit: str) -> str:
    said = [
        f"{title}: {streams.span:.3g} {unit} long, {streams.compute:.3g} computing and {streams.communication:.3g} "
        f"communicating, of which {streams.hidden:.3g} lie under computation"
        for title, streams in rows.items()
    ]
    return "Gantt chart of two streams each, computation above communication, over time. " + ". ".join(said) + "."
