"""DualPipe's bubble at any durations (chapter 13 derives it), and what the split of a backward is worth."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.pipeline.schedule import Action, make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate
from dsv3_book.pipeline.validate import validate

duration = st.floats(0.1, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), duration, duration, duration)
def test_dualpipes_bubble_at_any_durations(half: int, more: int, f: float, i: float, w: float) -> None:
    """h hops to the fold: the first gradient climbs them at I (one F of it is free) or waits for F; each costs an F
    where nothing is left to pair with, and at the end what of an I is not filled with an owed W."""
    P, h = 2 * half, half - 1
    bubble = simulate(make_schedule("dualpipe", P, 2 * P + 2 * more), Costs(f, i, w)).bubble
    expected = (max(h * f, h * i - f) + h * f + h * max(0, i - w)) if h else 0
    assert bubble == pytest.approx([expected] * P, abs=1e-9)


def test_each_w_saved_has_its_place() -> None:
    """Three hops, all durations 1: idle W's cost 3, no split in the drain 6, none in step 3 costs 3 less an F."""
    dual = make_schedule("dualpipe", 8, 20)

    def whole(mine: list, start: bool) -> list:
        first = next(n for n, a in enumerate(mine) if a.kind == "FB")
        cut = {(a.stage, a.microbatch) for n, a in enumerate(mine) if a.kind == "I" and (n < first) == start}
        owed = [a.kind in "IW" and (a.stage, a.microbatch) in cut for a in mine]
        kept = [(a, o) for a, o in zip(mine, owed, strict=True) if not (o and a.kind == "W")]
        return [Action("B", a.stage, a.microbatch) if o else a for a, o in kept]

    def late(mine: list) -> list:
        last = 1 + max(n for n, a in enumerate(mine) if a.kind == "FB")
        return mine[:last] + sorted(mine[last:], key=lambda a: a.kind == "W")

    for change, bubble in (
        (lambda mine: mine, 6),
        (late, 9),
        (lambda mine: whole(mine, False), 12),
        (lambda mine: whole(mine, True), 8),
    ):
        changed = replace(dual, actions=[change(mine) for mine in dual.actions])
        assert validate(changed) == []
        assert max(simulate(changed).bubble) == bubble
