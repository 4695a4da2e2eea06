"""Figures carry alt text, labelled axes, and colours that stand apart for everybody."""

import itertools
import re

import numpy as np
import pytest

from dsv3_book import plot

ALT = "Line chart: cache over context, a straight line from nought to two gigabytes."


def _figure():
    fig, ax = plot.figure(height=2)
    ax.plot([0, 1], [0, 2])
    return fig, ax


def test_alt_text_and_caption_reach_the_html():
    fig, ax = _figure()
    ax.set(xlabel="context (tokens)", ylabel="cache (GB)")
    page = plot.finish(fig, alt=ALT + ' "<"', caption="See `x` & *rise*.", name="fig-a")._repr_html_()
    assert re.search(r'<img [^>]*alt="Line chart: cache[^"<]*&quot;&lt;&quot;"', page)
    assert "<figcaption" in page
    assert "<code>x</code> &amp; <em>rise</em>" in page
    assert '<figure id="fig-a"' in page


def test_what_is_missing_is_asked_for():
    fig, ax = _figure()
    with pytest.raises(ValueError, match="too short"):
        plot.finish(fig, alt="a plot")
    ax.set(xlabel="context (tokens)")
    with pytest.raises(ValueError, match="axes 0 shows ticks on y but no label"):
        plot.finish(fig, alt=ALT)


def test_machine_knows_its_parts():
    for key in plot.PARTS:
        assert f"Highlighted: {plot.PARTS[key][4]}".replace("\n", " ") in plot.machine(key).alt
    with pytest.raises(ValueError, match="called mlp; there are data, embedding"):
        plot.machine("mlp")


# Machado, Oliveira and Fernandes (2009): how linear RGB looks with no red, green or blue cones.
CONES = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _linear(color: str, cones: str = "full") -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.clip(np.array(CONES[cones]) @ linear, 0, 1)


def _lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x, y, z = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _luminance(color: str) -> float:
    return float(_linear(color) @ np.array([0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("cones", CONES)
def test_colours_stand_apart_with_colour_blindness(cones):
    for one, other in itertools.combinations(plot.PALETTE, 2):
        gap = np.linalg.norm(_lab(_linear(one, cones)) - _lab(_linear(other, cones)))
        assert gap > 15, f"{one} and {other} look alike ({cones}): {gap:.0f}"


def test_colours_stand_out_from_the_card():
    for color in (*plot.PALETTE, plot.INK):
        contrast = (_luminance(plot.CARD) + 0.05) / (_luminance(color) + 0.05)
        assert contrast > 2.1, f"{color} is pale on {plot.CARD}: {contrast:.2f}"
