"""A measured pair becomes the streams that a simulated one is, and both can be drawn."""

import pytest

from dsv3_book.parallel.transport import Event as Message
from dsv3_book.parallel.transport import Label
from dsv3_book.pipeline.draw_pair import draw_pair
from dsv3_book.pipeline.measured import measured_pairs
from dsv3_book.pipeline.overlap import Event


def message(journey: str, part: str, issued: float, waited_until: float = float("nan")) -> Message:
    return Message(Label(journey, part), 8, issued, wait_ended=waited_until)


def test_pairs_are_cut_apart_and_their_messages_found() -> None:
    events = [
        Event("F", 0, 0, "attention", 0.0, 1.0, False),
        Event("B", 1, 0, "combine", 2.0, 2.1, True),
        Event("F", 0, 1, "attention", 2.1, 3.0, True),
        Event("B", 1, 0, "mlp", 3.0, 4.0, True),
        Event("F", 1, 1, "attention", 5.0, 6.0, True),  # the next pair: the other chunk of micro-batch 1
        Event("B", 0, 0, "mlp W", 6.0, 6.5, True),
        Event("F", 1, 1, "attention", 6.5, 7.0, True),
    ]
    messages = [
        message("dispatch F", "rows", 0.5),  # of a chunk alone
        message("combine B", "counts", 2.0),
        message("combine B", "rows", 2.05, waited_until=3.2),
        message("combine F", "rows", 6.9),
    ]
    first, second = measured_pairs(events, messages, delay=0.5)
    assert [(p.name, p.layer) for p in first.parts] == [("combine(B)", 0), ("attention(F)", 0), ("mlp(B)", 0)]
    assert first.parts[0].start == pytest.approx(50)  # ms from the pair's start
    assert first.communication == pytest.approx(500)
    assert first.hidden == pytest.approx(450)  # from 2.1 on
    assert first.parts[2].start == pytest.approx(1200)  # mlp(B) waited for its rows until 3.2
    assert [(p.name, p.layer) for p in second.parts][-2:] == [("attention(F)", 1), ("combine(F)", 0)]
    picture = draw_pair({"one": first, "other": second}, caption="Two pairs.")
    assert "500 communicating, of which 450 lie under computation" in picture.alt


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no rows"):
        draw_pair({})
