"""Traces: the JSON that Perfetto and chrome://tracing open, one track a rank, a link, a stream."""

import json

import pytest

from dsv3_book.pipeline.pair import PROFILE, pair
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate
from dsv3_book.pipeline.trace import save_perfetto, to_perfetto


def check_format(trace):
    """Chrome's trace event format, as far as we use it; events of one track follow each other."""
    assert json.loads(json.dumps(trace)) == trace
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}
    tracks = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in "XM" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["args"]["name"]
            continue
        assert event["pid"] in processes and (event["pid"], event["tid"]) in named
        assert event["name"] and event["cat"] and event["dur"] >= 0 and event["ts"] >= 0
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-6 for a, b in zip(spans, spans[1:]))  # noqa: RUF007
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("busy", [False, True])
def test_a_step(busy):
    schedule = make_schedule("dualpipe", 4, 8)
    timeline = simulate(schedule, Costs(forward=1, hop=2.5), busy_links=busy)
    events = check_format(to_perfetto(timeline))
    actions = [event for event in events if event["tid"] == 0]
    assert [event["name"] for event in actions if event["pid"] == 2] == [str(action) for action in schedule.actions[2]]
    assert len(events) - len(actions) == len(timeline.flights) > 0
    last = max(event["ts"] + event["dur"] for event in actions)
    assert last == pytest.approx(timeline.makespan * 1000)  # milliseconds to microseconds
    pairs = [event for event in actions if event["cat"] == "FB"]
    assert pairs and all(set(event["args"]) == {"F", "B"} for event in pairs)
    assert {event["args"]["to"] for event in events if event["cat"] == "hop" and event["pid"] == 1} == {0, 2}


def test_without_hops_there_are_no_links():
    events = check_format(to_perfetto(simulate(make_schedule("1f1b", 2, 4)), unit=1.0))
    assert {event["tid"] for event in events} == {0}
    assert max(event["ts"] for event in events) == 13e6  # the last B starts at 13 s


def test_a_pair(tmp_path):
    path = save_perfetto(pair([PROFILE] * 4, [PROFILE] * 4), tmp_path / "pair.json")
    trace = json.loads(path.read_text())
    events = check_format(trace)
    assert len(events) == 40
    assert {event["name"] for event in events if event["tid"] == 1} == {
        "combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)",
    }  # fmt: skip
    assert [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"] == [
        "one GPU",
        "compute",
        "communication",
    ]
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(130_930)
