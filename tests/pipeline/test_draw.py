"""The figure of a schedule shows every chunk, in its place, legibly, and says in words what it shows."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dsv3_book.pipeline import draw as module
from dsv3_book.pipeline.draw import draw
from dsv3_book.pipeline.schedule import SCHEDULES, Schedule, make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list:
    """The matplotlib figures that were drawn."""
    figures: list = []
    finish = module.finish
    monkeypatch.setattr(module, "finish", lambda fig, **words: (figures.append(fig), finish(fig, **words))[1])
    return figures


def boxes(fig) -> list[tuple[float, float, float, float]]:
    (collection,) = fig.axes[0].collections
    corners = [path.vertices for path in collection.get_paths()]
    return [(*np.min(c, axis=0), *np.max(c, axis=0)) for c in corners]


def numbers(fig) -> list:
    return [text for text in fig.axes[0].texts if text.get_text().isdigit()]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_chunk_has_a_box_with_its_number_where_it_happens(name: str, seen: list) -> None:
    schedule = make_schedule(name, 4, 8)
    draw(schedule)
    timeline = simulate(schedule)
    expected = []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            for i, part in enumerate(span.action.parts):
                height = 0.86 / len(span.action.parts)
                top = rank - 0.43 + i * height
                expected.append(((span.start, top, span.end, top + height), str(part.microbatch)))
    assert len(expected) == 3 * 4 * 8 if name == "zb1p" else len(expected) > 32
    for drawn, text, (where, number) in zip(boxes(seen[0]), numbers(seen[0]), expected, strict=True):
        assert drawn == pytest.approx(where)
        assert text.get_text() == number
        assert where[0] < text.get_position()[0] < where[2] and where[1] < text.get_position()[1] < where[3]


def test_the_reports_figure_is_legible(seen: list) -> None:
    """8 ranks, 20 micro-batches, in a column's width: every number inside its box, none smaller than 4.5 points."""
    draw(make_schedule("dualpipe", 8, 20))
    (fig,) = seen
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    parts = [part for mine in make_schedule("dualpipe", 8, 20).actions for action in mine for part in action.parts]
    assert len(numbers(fig)) == len(parts)
    for (left, _, right, _), text in zip(boxes(fig), numbers(fig), strict=True):
        assert text.get_fontsize() >= 4.5
        extent = text.get_window_extent(renderer).transformed(fig.axes[0].transData.inverted())
        assert left < extent.x0 and extent.x1 < right
    ax = fig.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [str(rank) for rank in range(8)]


def test_colours_tell_kinds_and_directions(seen: list) -> None:
    draw(make_schedule("dualpipe", 4, 8))
    (fig,) = seen
    (collection,) = fig.axes[0].collections
    colors = {}
    parts = [part for mine in make_schedule("dualpipe", 4, 8).actions for action in mine for part in action.parts]
    for part, color in zip(parts, collection.get_facecolors(), strict=True):
        colors.setdefault((part.kind, part.microbatch >= 4), set()).add(tuple(color))
    assert len(colors) == 8 and all(len(them) == 1 for them in colors.values())
    assert len(set().union(*colors.values())) == 8
    for kind in "FIWB":  # the second direction is the paler one
        assert sum(*colors[kind, True]) > sum(*colors[kind, False]) + 0.3
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words[0] == "F forward" and words[-1] == "pale: entered at rank 3"
    draw(make_schedule("dualpipev", 2, 4))
    assert seen[1].legends[0].get_texts()[-1].get_text() == "pale: a rank's later stages"
    draw(make_schedule("1f1b", 2, 4))
    assert [text.get_text() for text in seen[2].legends[0].get_texts()] == ["F forward", "B backward, whole"]


def test_the_words_say_what_is_counted() -> None:
    picture = draw(make_schedule("dualpipe", 8, 20), caption="See *it*.", name="fig-5")
    assert picture.alt == (
        "Gantt chart of the schedule dualpipe: 8 rows, one a rank, 20 micro-batches, time to the right up to 66 "
        "(F = I = W = 1). A rank waits 6 of that, and holds at most 9 activations. 82 boxes are overlapped pairs of a "
        "forward and a backward. Rank 0 does in turn: 8 F, I, W, F, I, W, F, I, W, F, 6 FB, B, FB, B, FB, B, FB, B, I, "
        "W, I, W, I, W, and so on."
    )
    assert (picture.caption, picture.name) == ("See *it*.", "fig-5")
    uneven = draw(make_schedule("1f1b", 2, 2), Costs(forward=lambda stage: 1.0 + stage), unit="ms")
    assert "up to 11 (ms). A rank waits between 3 and 5 of that" in uneven.alt


def test_a_timeline_is_drawn_as_it_is(seen: list) -> None:
    schedule = make_schedule("1f1b", 2, 2)
    timeline = simulate(schedule, Costs(hop=0.5))
    picture = draw(timeline, counts=True)
    assert [box[0] for box in boxes(seen[0])] == [span.start for spans in timeline.spans for span in spans]
    assert f"up to {timeline.makespan:.4g}." in picture.alt
    words = [text.get_text() for text in seen[0].axes[0].texts]
    assert {"bubble", "held", f"{timeline.bubble[1]:.4g}"} <= set(words)
    with pytest.raises(ValueError, match="a timeline has its durations already"):
        draw(timeline, Costs())


def test_a_part_of_the_time_and_numbers_too_small_to_read(seen: list) -> None:
    picture = draw(make_schedule("1f1b", 2, 8), until=6.0)
    assert "The figure ends at 6." in picture.alt and max(box[2] for box in boxes(seen[0])) <= 6
    draw(make_schedule("zb1p", 2, 100))
    assert numbers(seen[1]) == [] and len(boxes(seen[1])) == 600
    draw(make_schedule("1f1b", 2, 30))  # backwards have room for two digits, forwards for one
    assert len(boxes(seen[2])) == 120 and len(numbers(seen[2])) == 60 + 2 * 10


def test_what_cannot_run_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="can't go on"):
        draw(Schedule.from_text("B0.0 F0.0"))
