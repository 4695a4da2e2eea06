"""Traces made of records: what nests, and what a record must be. Real steps: tests/distributed/test_traced_step.py."""

from __future__ import annotations

import json

import pytest
from tracekit import slices

from dsv3_book.parallel.transport import Event as Message
from dsv3_book.parallel.transport import Label
from dsv3_book.pipeline.executor import Watch
from dsv3_book.pipeline.overlap import Event
from dsv3_book.pipeline.schedule import Action, Pair
from dsv3_book.train import profile
from dsv3_book.train.profile import Recorded, step_trace, write_profile

PAIR = Pair(Action("F", 0, 1), Action("B", 1, 0))
PARTS = [Event("F", 0, 1, "attention", 5.0, 5.2, True), Event("B", 1, 0, "mlp W", 5.2, 5.3, True)]


def test_one_process_sends_nothing_and_replaces_the_file(tmp_path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    write_profile(path, "", [PAIR], Watch(events=PARTS))
    found = slices(json.loads(path.read_text()))
    assert [(e["name"], e["cat"], e["ts"], e["dur"]) for e in found] == [
        ("F0.1+B1.0", "FB", 0, pytest.approx(300_000, abs=1)),
        ("F0.1 attention", "F", 0, pytest.approx(200_000, abs=1)),
        ("B1.0 mlp W", "W", pytest.approx(200_000, abs=1), pytest.approx(100_000, abs=1)),
    ]
    assert found[0]["args"] == {"F": {"stage": 0, "microbatch": 1}, "B": {"stage": 1, "microbatch": 0}}


def test_messages_side_by_side_and_one_that_nobody_awaited() -> None:
    label = Label("dispatch F", "rows")
    messages = [Message(label, 8, 5.0, 5.1, 5.2), Message(label, 8, 5.1, 5.2, 5.3), Message(label, 8, 5.25)]
    trace = step_trace([Recorded("", 0.0, [PAIR], PARTS, messages)])
    sent = [e for e in slices(trace) if e["cat"] == "all-to-all"]
    assert [e["tid"] for e in sent] == [1, 2, 1] and sent[2]["dur"] == 0
    assert [e["args"]["waited_for_us"] for e in sent] == [pytest.approx(100_000, abs=1)] * 2 + [0]


def test_actions_of_another_step() -> None:
    with pytest.raises(ValueError, match=r"of no action in its turn: give the actions of the step that was watched"):
        step_trace([Recorded("", 0.0, [Action("F", 0, 1)], PARTS)])


def test_the_clock_is_that_of_day(monkeypatch) -> None:
    assert profile.clock_offset() == pytest.approx(profile.time.time() - profile.time.perf_counter(), abs=0.5)
    readings = iter([x for i in range(10) for x in (i, i + (0.5 if i == 3 else 0.9))])  # the fourth try is quickest
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(readings))
    monkeypatch.setattr(profile.time, "time", lambda: 1000.0)
    assert profile.clock_offset() == 1000 - 3.25
