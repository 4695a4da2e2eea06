"""How evenly experts are used, as heat maps: the load of every router's experts over its mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real, UInt8

from dsv3_book.plot import figure

TOP = 2.0  # the colours' end: twice a router's mean load or more


def relative(load: Real[np.ndarray, "*l E"]) -> Float[np.ndarray, "*l E"]:
    """Loads over the mean load of their router: 1 is perfect balance. A router that saw nothing counts as balanced."""
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.ones(load.shape), where=mean > 0)


def label(router: str) -> str:
    """ "layers.3.mlp.gate" → "layer 3"."""
    parts = router.split(".")
    return f"layer {parts[1]}" if parts[0] == "layers" and len(parts) > 1 else router


def heat(fig: Any, ax: Any, values: Float[np.ndarray, "rows columns"], extent: tuple[float, ...] | None = None) -> None:
    """Draws relative loads into `ax`, with a bar of colours from 0 to `TOP` (always the same, so that maps compare)."""
    image = ax.imshow(values, aspect="auto", interpolation="nearest", vmin=0, vmax=TOP, extent=extent)
    ax.grid(False)
    thin = 7 * fig.get_size_inches()[1]
    fig.colorbar(image, ax=ax, extend="max", label="load over mean", pad=0.02, aspect=thin, extendfrac=0.5 / thin)


def load_figure(load: Real[np.ndarray, "routers E"], routers: Sequence[str]) -> Any:
    """A matplotlib figure of one step's load: routers by experts."""
    rows = len(routers)
    fig, ax = figure(6.4, 1.1 + min(0.24 * max(rows, 3), 7))
    heat(fig, ax, relative(load))
    every = -(-rows // 30)
    ax.set(xlabel="expert", yticks=range(0, rows, every), yticklabels=routers[::every])
    return fig


def pixels(fig: Any) -> UInt8[np.ndarray, "height width 3"]:
    """The figure as bytes of red, green and blue."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
