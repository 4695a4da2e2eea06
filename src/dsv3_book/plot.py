"""One look for every figure: a palette that survives colour-blindness, a card that is legible in light and dark themes.

A figure is made by :func:`figure`, drawn with matplotlib's own methods, and handed back by :func:`finish`, which asks
for what a reader who can't see it needs: a text that says what it shows. matplotlib is imported when a figure is made.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# After Okabe and Ito: told apart with every common kind of colour-blindness (a test holds them to it), seen on CARD.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0A5CA8", "#DB9600", "#0F8F5F", "#BC4412", "#D081B5", "#5BB8EC"
GREY, LIGHT, INK, CARD = "#5A5E64", "#D9DBDE", "#22262B", "#FBFAF7"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # colour is never the only difference

_STYLE: dict[Any, Any] = {
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "savefig.facecolor": CARD,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "image.cmap": "cividis",
}


def figure(width: float = 7.2, height: float = 3.2, rows: int = 1, cols: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure in the book's style and its axes (one, or an array as ``matplotlib.pyplot.subplots`` gives).

    Args:
        width, height: in inches; 7.2 fills the page's column.
        options: passed on to ``Figure.subplots`` (``sharex``, ``gridspec_kw`` …).
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    # Set for good: matplotlib reads some of these only when a title, a legend or a tick is drawn, after we return.
    matplotlib.rcParams.update({**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)})
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, cols, **options)


@dataclass(frozen=True)
class Picture:
    """A finished figure. Displays as an ``<img>`` with its alt text, and its caption below."""

    png: bytes
    width: int
    alt: str
    caption: str
    name: str

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        anchor = f' id="{html.escape(self.name)}"' if self.name else ""
        # "dark-light" tells the book's theme that the picture looks right in both: no filter, no white box.
        image = (
            f'<img class="dark-light" alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}" '
            f'style="width:{self.width}px;max-width:100%;height:auto;border-radius:6px;">'
        )
        style = "margin:0.8em 0 1.2em;text-align:center"
        words = f'<figcaption style="font-size:0.9em;margin-top:0.4em">{_inline(self.caption)}</figcaption>'
        return f'<figure{anchor} style="{style}">{image}{words if self.caption else ""}</figure>'

    def __repr__(self) -> str:
        return f"[Figure: {self.alt}]"


def finish(fig: Any, *, alt: str, caption: str = "", name: str = "") -> Picture:
    """Turn a figure into what a cell displays: put it on the cell's last line.

    Args:
        alt: what the figure shows, for someone who can't see it: kind of chart, axes, the shape of the curves.
        caption: what to see in it, in a sentence or two. ``code`` in backticks and *emphasis* work.
        name: an id, so that prose can link to it: ``<a href="#name">``.

    Raises:
        ValueError: the alt text says nothing, or a visible axis has no label.
    """
    alt = " ".join(alt.split())
    if len(alt) < 20:
        raise ValueError(
            f"alt={alt!r} is too short to tell what the figure shows: name the chart, its axes, what they show"
        )
    for number, ax in enumerate(fig.axes):
        _check_axis(ax, number)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return Picture(buffer.getvalue(), round(fig.get_size_inches()[0] * 100), alt, " ".join(caption.split()), name)


# For pages that follow the reader's choice of light or dark: each colour's name in CSS, and what it is in the dark.
_DARK = {
    BLUE: ("blue", "#5AA5F0"),
    ORANGE: ("orange", "#E8A317"),
    GREEN: ("green", "#3DBB88"),
    RED: ("red", "#EE7B55"),
    PURPLE: ("purple", "#D99AC3"),
    SKY: ("sky", "#86CDF5"),
    GREY: ("grey", "#A3A9B1"),
    LIGHT: ("light", "#3A4048"),
    INK: ("ink", "#E6E8EB"),
    CARD: ("card", "#1D2126"),
}


def theme() -> str:
    """CSS that gives the colours in what :func:`svg` makes (``--ink``, ``--card`` …) their values, light and dark."""
    light = "".join(f"--{name}:{color};" for color, (name, _) in _DARK.items())
    dark = "".join(f"--{name}:{color};" for name, color in _DARK.values())
    return (
        f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        ".figure{width:100%;height:auto;background:var(--card);border-radius:6px;padding:.4em .5em}"
        ".figure *{stroke-linejoin:round;stroke-linecap:butt}"
    )


def svg(fig: Any, *, alt: str, name: str) -> str:
    """A figure as an ``<svg>`` to be put into a page beside :func:`theme`: lines and letters, in the page's colours.

    Args:
        alt: what it shows, as for :func:`finish`.
        name: unlike that of any other figure on the page.

    Raises:
        ValueError: as :func:`finish`.
    """
    import re

    import matplotlib

    for number, ax in enumerate(fig.axes):
        _check_axis(ax, number)
    if len(alt) < 20:
        raise ValueError(f"alt={alt!r} is too short to tell what the figure shows")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(buffer, format="svg", dpi=200, facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, (css, _) in _DARK.items():
        text = re.sub(rf"{color}\b", f"var(--{css})", text, flags=re.IGNORECASE)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans',Verdana,sans-serif")
    size = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg class="figure" role="img" aria-label="{html.escape(alt)}" {size[0] if size else ""} '
    return head + 'xmlns:xlink="http://www.w3.org/1999/xlink">' + text[text.index(">") + 1 :].strip()


def _check_axis(ax: Any, number: int) -> None:
    if not ax.axison or ax.get_label() == "<colorbar>":
        return
    for which, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        ticks = axis.get_visible() and any(label.get_visible() and label.get_text() for label in axis.get_ticklabels())
        if ticks and not axis.get_label_text():
            raise ValueError(
                f"axes {number} shows ticks on {which} but no label: set_{which}label('what it is (unit)')"
            )


def _inline(text: str) -> str:
    """Backticks and asterisks to HTML; everything else is escaped."""
    import re

    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def annotate_bars(ax: Any, bars: Iterable[Any], labels: Sequence[str]) -> None:
    """Write `labels` at the ends of bars (of ``ax.bar`` or ``ax.barh``), so that nobody must read them off the axis."""
    ax.bar_label(bars, labels=list(labels), padding=3, fontsize=8.5, color=INK)


def box(ax: Any, x: float, y: float, w: float, h: float, text: str, color: str = GREY, filled: bool = False) -> None:
    """A rounded box with `text` in it, lower left corner at (x, y); `filled` makes it stand out."""
    from matplotlib.patches import FancyBboxPatch

    face, ink = (color, "white") if filled else ("white", INK)
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, fc=face, ec=color, lw=1.6 if filled else 1.1, zorder=3))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=ink, zorder=4, linespacing=1.15,
            fontsize=8.5, fontweight="bold" if filled else "normal")  # fmt: skip


def arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], color: str = GREY, dashed: bool = False
) -> None:
    """An arrow from `start` to `end`, between boxes."""
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "lw": 1.2,
        "ls": (0, (3, 2)) if dashed else "-",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=2)


def canvas(width: float, height: float, scale: float = 1.0) -> tuple[Any, Any]:
    """A figure with no axes for boxes and arrows; one unit is `scale` inches, y grows upward."""
    fig, ax = figure(width * scale, height * scale)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()
    return fig, ax


# The parts of the training system: key -> (x, y, width, height, text). See `machine`.
PARTS: dict[str, tuple[float, float, float, float, str]] = {
    "data": (0.15, 2.75, 1.15, 0.55, "text → tokens"),
    "embedding": (1.6, 2.75, 1.05, 0.55, "embedding"),
    "mla": (3.0, 2.75, 1.0, 0.55, "attention\n(MLA)"),
    "router": (4.15, 2.75, 0.85, 0.55, "router"),
    "experts": (5.15, 2.75, 0.9, 0.55, "experts"),
    "head": (6.5, 2.75, 0.85, 0.55, "head\n& loss"),
    "balance": (4.15, 1.8, 0.85, 0.5, "balance"),
    "mtp": (6.5, 1.8, 0.85, 0.5, "MTP"),
    "fp8": (0.15, 0.2, 1.25, 0.5, "FP8 GEMMs"),
    "processes": (1.55, 0.2, 1.35, 0.5, "data parallel,\nZeRO-1"),
    "dispatch": (3.05, 0.2, 1.35, 0.5, "experts across\nnodes"),
    "pipeline": (4.55, 0.2, 1.35, 0.5, "DualPipe,\noverlap"),
    "optimizer": (6.05, 0.2, 1.3, 0.5, "AdamW and\nthe recipe"),
    "context": (0.15, 1.3, 1.25, 0.5, "long context\n(YaRN)"),
    "inference": (1.55, 1.3, 1.35, 0.5, "generating,\nserving"),
}


def machine(highlight: str | Sequence[str] = ()) -> Picture:
    """The training system of V3 as a map, with the parts named in `highlight` filled: "where we are" in a chapter.

    Args:
        highlight: one key of :data:`PARTS`, or several.

    Raises:
        ValueError: an unknown part (the message lists the known ones).
    """
    lit = [highlight] if isinstance(highlight, str) else list(highlight)
    if unknown := [key for key in lit if key not in PARTS]:
        raise ValueError(f"no part of the machine is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    fig, ax = canvas(7.5, 3.9, scale=0.96)
    from matplotlib.patches import FancyBboxPatch

    frame: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.1",
        "fc": "none",
        "ec": GREY,
        "ls": (0, (4, 3)),
        "lw": 1.0,
    }
    ax.add_patch(FancyBboxPatch((2.87, 2.6), 3.31, 0.86, **frame))
    ax.text(4.52, 3.58, "a block, 61 times", ha="center", va="center", fontsize=8.5, color=INK)
    ax.text(0.15, 0.88, "how it is trained", fontsize=8.5, color=INK)
    ax.text(0.15, 1.98, "how it is used", fontsize=8.5, color=INK)
    ax.text(0.15, 3.58, "the model", fontsize=8.5, color=INK)
    middle = 3.025
    for left, right in (
        ("data", "embedding"),
        ("embedding", "mla"),
        ("mla", "router"),
        ("router", "experts"),
        ("experts", "head"),
    ):
        x, _, w, _, _ = PARTS[left]
        arrow(ax, (x + w, middle), (PARTS[right][0], middle))
    arrow(ax, (4.45, 2.75), (4.45, 2.3), dashed=True)  # loads down
    arrow(ax, (4.7, 2.3), (4.7, 2.75), dashed=True)  # biases up
    ax.plot([6.26, 6.26], [middle, 2.05], color=GREY, lw=1.2, zorder=2)  # the hidden state goes to MTP too,
    arrow(ax, (6.25, 2.05), (6.5, 2.05))
    arrow(ax, (6.925, 2.3), (6.925, 2.75))  # which uses the model's own head
    for key, (x, y, w, h, text) in PARTS.items():
        box(ax, x, y, w, h, text, color=BLUE if key in lit else GREY, filled=key in lit)
    here = ", ".join(PARTS[key][4].replace("\n", " ") for key in lit)
    alt = (
        "Map of the training system. Top row, left to right: text to tokens, embedding, a block repeated 61 times "
        "(attention, router, experts), head and loss; the balance loop hangs below the router, MTP below the head that "
        "it shares. "
        "Below: how it is used (long context, serving) and how it is trained (FP8, data parallel, experts across "
        f"nodes, pipeline, optimiser). {f'Highlighted: {here}.' if here else 'Nothing is highlighted.'}"
    )
    return finish(fig, alt=alt, caption="*Where we are in the machine.*")
