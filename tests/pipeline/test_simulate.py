"""simulate: cases worked by hand, what must hold for any costs, and messages of schedules that can't run."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.pipeline.queues import Stuck, play
from dsv3_book.pipeline.schedule import Schedule, make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate

LINE = Schedule.from_text("F0.0 F0.1 B0.0 B0.1\nF1.0 B1.0 F1.1 B1.1")
PAIR = Schedule.from_text("F0.0 F0.1+B0.0 B0.1\nF1.0 B1.0 F1.1 B1.1", name="with a pair")
SPLIT = Schedule.from_text("F0.0 F0.1 I0.0 W0.0 I0.1 W0.1\nF1.0 I1.0 F1.1 W1.0 I1.1 W1.1")


def intervals(timeline):
    return {str(span.action): (span.start, span.end) for spans in timeline.spans for span in spans}


def test_two_stages_by_hand():
    timeline = simulate(LINE, Costs(forward=1, input_grad=2, weight_grad=1))
    assert intervals(timeline) == {
        "F0.0": (0, 1), "F0.1": (1, 2), "B0.0": (5, 8), "B0.1": (9, 12),
        "F1.0": (1, 2), "B1.0": (2, 5), "F1.1": (5, 6), "B1.1": (6, 9),
    }  # fmt: skip
    assert timeline.makespan == 12
    assert timeline.busy == [8, 8]
    assert timeline.bubble == [4, 4]
    assert timeline.peak_activations == [2, 1]


def test_a_hop_delays_other_ranks_only():
    costs = Costs(forward=1, input_grad=2, weight_grad=1, hop=0.5)
    assert intervals(simulate(LINE, costs)) == {
        "F0.0": (0, 1), "F0.1": (1, 2), "B0.0": (6, 9), "B0.1": (10, 13),
        "F1.0": (1.5, 2.5), "B1.0": (2.5, 5.5), "F1.1": (5.5, 6.5), "B1.1": (6.5, 9.5),
    }  # fmt: skip
    both = Schedule.from_text("F0.0 F1.0 B1.0 B0.0")  # two stages on one rank: nothing travels
    assert simulate(both, costs).makespan == simulate(both).makespan + 2  # = the longer input gradients
    assert simulate(both, costs).flights == []


def test_a_hop_may_depend_on_the_link():
    there, back = (
        simulate(LINE, Costs(hop=lambda a, b, slow=slow: 5.0 * ((a, b) == slow))) for slow in ((0, 1), (1, 0))
    )
    assert intervals(there)["F1.0"] == (6, 7) and intervals(back)["F1.0"] == (1, 2)
    assert intervals(back)["B0.0"][0] == intervals(back)["B1.0"][1] + 5


def test_a_busy_link_carries_one_tensor_at_a_time():
    schedule = Schedule.from_text("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2\nF1.0 F1.1 F1.2 B1.0 B1.1 B1.2")
    costs = Costs(forward=1, hop=3)
    free, busy = simulate(schedule, costs), simulate(schedule, costs, busy_links=True)
    assert [flight.start for flight in free.flights if flight.transfer.source == 0] == [1, 2, 3]
    assert [flight.start for flight in busy.flights if flight.transfer.source == 0] == [1, 4, 7]
    assert intervals(free)["F1.2"] == (6, 7) and intervals(busy)["F1.2"] == (10, 11)


def test_input_gradients_go_up_before_weight_gradients_are_done():
    spans = intervals(simulate(SPLIT))
    assert spans["I1.0"] == (2, 3) and spans["I0.0"] == (3, 4)
    assert spans["W1.0"] == (4, 5)
    assert (
        simulate(LINE).makespan
        > simulate(Schedule.from_text("F0.0 F0.1 I0.0 W0.0 I0.1 W0.1\nF1.0 I1.0 W1.0 F1.1 I1.1 W1.1")).makespan
    )


def test_an_activation_lives_to_the_end_of_its_input_gradient():
    line = Schedule.from_text("F0.0 I0.0 F0.1 W0.0 I0.1 W0.1")
    timeline = simulate(line)
    assert timeline.held(0) == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 1),
        (2, 0),
        (2, 1),
        (3, 1),
        (3, 1),
        (4, 1),
        (4, 1),
        (5, 0),
        (5, 0),
        (6, 0),
    ]
    assert timeline.peak_activations == [1]


def test_a_pair_holds_both_and_takes_what_it_is_said_to():
    assert simulate(PAIR).peak_activations == [2, 1]
    assert intervals(simulate(PAIR))["F0.1+B0.0"] == (4, 7)  # nothing gained: F + I + W
    assert intervals(simulate(PAIR, Costs(overlapped=2)))["F0.1+B0.0"] == (4, 6)
    costs = Costs(forward=lambda s: 10 + s, input_grad=lambda s: 20 + s, weight_grad=lambda s: 30 + s)
    crossed = make_schedule("dualpipe", 4, 8)
    for spans in simulate(crossed, costs).spans:
        for span in spans:
            if span.action.kind == "FB":
                ahead, back = (part.stage for part in span.action.parts)
                assert span.end - span.start == pytest.approx(60 + ahead + 2 * back)
    named = simulate(crossed, Costs(overlapped=lambda ahead, back: 100.0 * ahead + back))
    pairs = {str(s.action)[:2] + str(s.action)[5:7]: s.end - s.start for s in named.spans[1] if s.action.kind == "FB"}
    assert pairs == {"F1B2": pytest.approx(102), "F2B1": pytest.approx(201)}


def test_timeline_says_what_flew():
    flights = simulate(LINE, Costs(hop=1)).flights
    assert [(f.transfer.kind, f.transfer.source, f.transfer.target, f.start, f.end) for f in flights] == [
        ("F", 0, 1, 1, 2), ("F", 0, 1, 2, 3), ("B", 1, 0, 5, 6), ("B", 1, 0, 8, 9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F0.0 B0.0\nB1.0 F1.0", "rank 1 stops at B1.0 (number 0) and waits for F1.0, number 1 of rank 1's list"),
        (
            "F0.0 F0.1 B0.0 B0.1\nF1.1 F1.0 B1.0",
            "rank 0 stops at B0.1 (number 3) and waits for B1.1, which no rank runs",
        ),
        ("F0.0 F0.1+B0.1\nF1.0 F1.1 B1.1", "waits for F0.1+B0.1, number 1 of rank 0's list (itself)"),
        ("F0.0 B0.0\nF1.0 I1.0 W1.1", "rank 1 stops at W1.1 (number 2) and waits for B1.1, which no rank runs"),
    ],
)
def test_a_deadlock_names_who_waits_for_what(text, words):
    with pytest.raises(ValueError, match="can't go on") as said:
        simulate(Schedule.from_text(text))
    assert words in str(said.value)


def test_every_rank_of_a_circle_is_named():
    with pytest.raises(ValueError, match="can't go on") as said:
        simulate(Schedule.from_text("B0.0 F0.0\nF1.0 B1.0", name="circle"))
    assert "schedule 'circle'" in str(said.value)
    assert "rank 0 stops at B0.0" in str(said.value) and "rank 1 stops at F1.0" in str(said.value)


def test_work_done_twice_is_refused():
    with pytest.raises(ValueError, match=r"F1.0 on rank 1 does again what rank 1 does"):
        simulate(Schedule.from_text("F0.0 B0.0\nF1.0 F1.0 B1.0"))
    with pytest.raises(ValueError, match=r"W0.0 on rank 0 does again"):
        simulate(Schedule.from_text("F0.0 B0.0 W0.0"))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_costs_are_refused(bad):
    for costs in (
        Costs(forward=bad),
        Costs(weight_grad=lambda s: bad),
        Costs(hop=lambda a, b: bad),
        Costs(overlapped=bad),
    ):
        with pytest.raises(ValueError, match="a duration must be a finite number"):
            simulate(PAIR, costs)


# What holds for any costs --------------------------------------------------------------------------------------------
durations = st.floats(0, 10)
schedules = st.sampled_from(
    [make_schedule(n, p, m) for n, p, m in [
        ("1f1b", 1, 3), ("1f1b", 3, 5), ("zb1p", 4, 8), ("chimera", 4, 8), ("dualpipe", 2, 4), ("dualpipe", 4, 10),
        ("dualpipev", 1, 2), ("dualpipev", 3, 7),
    ]]
)  # fmt: skip


@st.composite
def cost_sets(draw):
    """Costs that differ by stage, by pair and by link."""
    f, i, w = (draw(st.lists(durations, min_size=8, max_size=8)) for _ in range(3))
    shrink = draw(st.none() | st.floats(0.5, 1))
    hops = draw(st.lists(durations, min_size=4, max_size=4))
    whole = lambda a, b: shrink * (f[a] + i[b] + w[b])
    return Costs(
        f.__getitem__, i.__getitem__, w.__getitem__, whole if shrink else None, lambda a, b: hops[(a + 2 * b) % 4]
    )


@given(schedules, cost_sets(), st.booleans())
@settings(max_examples=60)
def test_invariants(schedule, costs, busy):
    timeline = simulate(schedule, costs, busy_links=busy)
    assert timeline.makespan >= max(timeline.busy) - 1e-9
    assert all(bubble >= -1e-9 for bubble in timeline.bubble)
    for rank, spans in enumerate(timeline.spans):
        assert [span.action for span in spans] == schedule.actions[rank]
        assert all(a.end <= b.start for a, b in pairwise(spans))
        assert timeline.busy[rank] == pytest.approx(sum(costs.of(action) for action in schedule.actions[rank]))
        assert timeline.held(rank)[-1][1] == 0
    # what a flight carries was made before it and used after it
    spans = intervals(timeline)
    parts = {str(part): spans[name] for name in spans for part in Schedule.from_text(name).actions[0][0].parts}
    for flight in timeline.flights:
        t = flight.transfer
        made = parts.get(f"{t.kind}{t.stage}.{t.microbatch}") or parts[f"I{t.stage}.{t.microbatch}"]
        there = t.stage + (1 if t.kind == "F" else -1)
        used = parts.get(f"{t.kind}{there}.{t.microbatch}") or parts[f"I{there}.{t.microbatch}"]
        assert made[1] <= flight.start and flight.end <= used[0]
        assert flight.end - flight.start == pytest.approx(costs.between(t.source, t.target))


@given(schedules, cost_sets(), st.floats(0, 5))
@settings(max_examples=40)
def test_slower_links_never_help(schedule, costs, more):
    slower = Costs(
        costs.forward, costs.input_grad, costs.weight_grad, costs.overlapped, lambda a, b: costs.hop(a, b) + more
    )
    base = simulate(schedule, costs)
    assert simulate(schedule, slower).makespan >= base.makespan
    assert simulate(schedule, costs, busy_links=True).makespan >= base.makespan
    assert simulate(schedule, slower).peak_activations == base.peak_activations  # the order of a list decides, not time


@given(schedules, st.tuples(durations, durations, durations, durations, durations), st.booleans())
@settings(max_examples=40)
def test_twice_the_costs_is_twice_the_time(schedule, numbers, busy):
    once, twice = (simulate(schedule, Costs(*(k * n for n in numbers)), busy_links=busy) for k in (1, 2))
    assert twice.makespan == pytest.approx(2 * once.makespan)
    assert twice.bubble == pytest.approx([2 * bubble for bubble in once.bubble])


@given(
    schedules, st.tuples(durations, durations, durations, durations, durations), st.integers(0, 3), st.integers(0, 7)
)
@settings(max_examples=40)
def test_a_slower_stage_never_helps(schedule, numbers, which, stage):
    forward, *rest = numbers
    base = simulate(schedule, Costs(forward, *rest))
    slow = simulate(schedule, Costs(lambda s: forward + (s == stage), *rest))
    assert slow.makespan >= base.makespan


# Queues --------------------------------------------------------------------------------------------------------------
def test_queues_wait_for_each_other():
    needs = {"b": ["x"], "y": ["a", "b"]}
    times = play([["a", "b"], ["x", "y"]], {"a": 1, "b": 2, "x": 5, "y": 1}, needs)
    assert times == {"a": (0, 1), "x": (0, 5), "b": (5, 7), "y": (7, 8)}
    assert play([], {}, {}) == {}


def test_stuck_queues_say_where():
    with pytest.raises(Stuck) as said:
        play([["a", "b"], ["x"]], dict.fromkeys("abx", 1), {"a": ["x"], "x": ["b"]})
    assert said.value.waits == [(0, "a", "x"), (1, "x", "b")]


def test_no_torch_is_needed():
    names = ", ".join(
        f"dsv3_book.pipeline.{name}" for name in ("simulate", "pair", "table", "trace", "cluster", "scaling")
    )
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
