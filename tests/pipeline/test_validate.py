"""The validator: good schedules pass, every kind of mistake is explained, and nothing broken slips through."""

from dataclasses import replace

import brute
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.pipeline.schedule import SCHEDULES, Action, Pair, Schedule, make_schedule
from dsv3_book.pipeline.validate import check, validate

Lists = list[list[Action | Pair]]


def possible(name: str, most_ranks: int = 16) -> list[tuple[int, int]]:
    """Ranks and micro-batches that `name` can do, many of each."""
    sizes = []
    for P in range(1, most_ranks + 1):
        for M in {2 * P, 2 * P + 1} | ({1, P, 2 * P + 2, 4 * P} if P <= 8 else set()):
            try:
                make_schedule(name, P, M)
            except ValueError:
                continue
            sizes.append((P, M))
    return sizes


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_right(name: str) -> None:
    sizes = possible(name)
    assert len(sizes) >= 14
    for P, M in sizes:
        schedule = make_schedule(name, P, M)
        assert validate(schedule) == []
        check(schedule)
        if P <= 4:
            assert brute.runs(schedule), (P, M)


# --- one mistake of each kind, and what is said of it ---------------------------------------------------------------

GOOD = "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF1.0 B1.0 F1.1 B1.1 F1.2 B1.2"  # 1f1b, two ranks, three micro-batches


@pytest.mark.parametrize(
    ("right", "wrong", "sentences"),
    [
        ("F0.2 B0.1", "B0.1", ["Nobody does the forward (F) of micro-batch 2 at stage 0."]),
        ("B1.1", "I1.1", ["Nobody does the weight gradient (W or B) of micro-batch 1 at stage 1."]),
        ("F1.1 B1.1 F1.2 B1.2", "F1.1 F1.2", [
            "Nobody does the input gradient (I or B) of micro-batches 1–2 at stage 1.",
            "Nobody does the weight gradient (W or B) of micro-batches 1–2 at stage 1.",
        ]),
        ("B1.1", "B1.1 W1.1", [
            "The weight gradient of micro-batch 1 at stage 1 is done twice: by rank 1's 4th action (B1.1) and rank 1's "
            "5th action (W1.1).",
        ]),
        ("B0.1 B0.2\nF1.0", "B0.1\nB0.2 F1.0", [
            "Micro-batch 2 goes forward through stage 0 on rank 0, which keeps its activations, but the input "
            "gradient is on rank 1.",
            "Micro-batch 2 goes forward through stage 0 on rank 0, which keeps its activations, but the weight "
            "gradient is on rank 1.",
        ]),
        ("F1.0 B1.0", "B1.0 F1.0", [
            "Rank 1's 1st action, B1.0, needs the forward of micro-batch 0 at stage 1 first; that is only the 2nd, "
            "F1.0.",
        ]),
        ("B1.1", "W1.1 I1.1", [
            "Rank 1's 4th action, W1.1, needs the input gradient of micro-batch 1 at stage 1 first; that is only "
            "the 5th, I1.1.",
        ]),
        ("F0.1 B0.0", "B0.0 F0.1", None),  # right too, only slower
        ("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF1.0 B1.0 F1.1 B1.1", "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2\nF1.1 B1.1 F1.0 B1.0", [
            "Deadlock: rank 0 stops at its 2nd action, B0.0, and waits for B1.0, rank 1's 4th; but rank 1 itself stops "
            "at its 1st, F1.1.",
            "Deadlock: rank 1 stops at its 1st action, F1.1, and waits for F0.1, rank 0's 3rd; but rank 0 itself stops "
            "at its 2nd, B0.0.",
        ]),
        ("F1.1 B1.1", "F1.1+B1.1", [
            "The 3rd action of rank 1 is the pair F1.1+B1.1: a backward can't run beside the forward of its own chunk.",
        ]),
        ("B1.0 F1.1", "F1.1+B1.0", None),
        ("B1.0 F1.1", "W1.0+F1.1", [
            "The 2nd action of rank 1 is the pair W1.0+F1.1, whose first half is not a forward (F) but W.",
            "The 2nd action of rank 1 is the pair W1.0+F1.1, whose second half is not a whole backward (B) but F.",
        ]),
        ("B1.0 F1.1", "F1.1+I1.0 W1.0", [
            "The 2nd action of rank 1 is the pair F1.1+I1.0, whose second half is not a whole backward (B) but I.",
        ]),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(right: str, wrong: str, sentences: list[str] | None) -> None:
    assert GOOD.count(right) == 1
    schedule = Schedule.from_text(GOOD.replace(right, wrong))
    schedule = replace(schedule, num_microbatches=3, num_stages=2)
    assert validate(schedule) == (sentences or [])
    assert brute.runs(schedule) == (sentences is None)
    if sentences:
        with pytest.raises(ValueError, match=r"the schedule 'own' can't be run:\n- ") as error:
            check(schedule)
        assert all(sentence in str(error.value) for sentence in sentences)


def test_a_number_far_too_large_is_told_at_once() -> None:
    assert validate(Schedule.from_text("F0.0 F99999999.0 B0.0")) == [
        "100000000 stages and 1 micro-batches in 3 actions can't be: are both counted from 0, by ones?"
    ]


def test_numbers_that_dont_exist() -> None:
    good = Schedule.from_text(GOOD)
    assert validate(replace(good, num_microbatches=2)) == [
        f"The {where}, {what}, names stage {stage} and micro-batch 2; stages count from 0 to 1, micro-batches from 0 "
        "to 1."
        for stage, where, what in [
            (0, "4th action of rank 0", "F0.2"),
            (0, "6th action of rank 0", "B0.2"),
            (1, "5th action of rank 1", "F1.2"),
            (1, "6th action of rank 1", "B1.2"),
        ]
    ]
    assert validate(replace(good, num_ranks=3)) == ["There are 2 lists of actions for 3 ranks; each rank needs one."]
    assert "it has 0 stages; there must be at least one" in validate(replace(good, num_stages=0))[0]
    lists: list = [[*good.actions[0], "F0.3"], good.actions[1]]
    object.__setattr__(good, "actions", lists)  # past the tests' own type checker
    assert validate(good) == ["The 7th action of rank 0 is 'F0.3', which is neither an Action nor a Pair."]


def renamed(schedule: Schedule, new: dict[int, int], stages: set[int]) -> Schedule:
    """The same with other micro-batch numbers at some stages."""

    def one(action: Action) -> Action:
        return (
            replace(action, microbatch=new.get(action.microbatch, action.microbatch))
            if action.stage in stages
            else action
        )

    lists: Lists = [
        [Pair(*map(one, a.parts)) if isinstance(a, Pair) else one(a) for a in mine] for mine in schedule.actions
    ]
    return replace(schedule, actions=lists)


def test_mirrors() -> None:
    good = make_schedule("chimera", 4, 4)
    swapped = {0: 2, 2: 0}
    assert validate(renamed(good, swapped, {0, 1, 2, 3})) == [
        f"Stage {s} is run by {a} and {b}. Of a stage held twice, one copy runs the first half of the 4 micro-batches, "
        "its mirror the second half."
        for s, (a, b) in enumerate(
            [
                ("rank 3 for micro-batches 0 and 3", "rank 0 for micro-batches 1–2"),
                ("rank 2 for micro-batches 0 and 3", "rank 1 for micro-batches 1–2"),
                ("rank 1 for micro-batches 0 and 3", "rank 2 for micro-batches 1–2"),
                ("rank 0 for micro-batches 0 and 3", "rank 3 for micro-batches 1–2"),
            ]
        )
    ]
    upside_down = replace(good, actions=good.actions[::-1])
    assert validate(upside_down) == [
        "Stage 0 is run by rank 3 for micro-batches 0–1 and rank 0 for micro-batches 2–3. The first half of the "
        "micro-batches enters at the copy on the lower rank."
    ]
    elsewhere = replace(good, actions=[good.actions[i] for i in (1, 0, 2, 3)])
    assert validate(elsewhere)[0] == (
        "Stage 0 is run by rank 1 for micro-batches 0–1 and rank 3 for micro-batches 2–3. A stage belongs to one rank, "
        "or in a two-way pipeline to rank r and its mirror 3 − r."
    )
    assert not any(brute.runs(s) for s in (renamed(good, swapped, {0, 1, 2, 3}), upside_down, elsewhere))


def test_a_long_list_of_mistakes_is_cut_short() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    backwards = replace(schedule, actions=[mine[::-1] for mine in schedule.actions])
    assert len(validate(backwards)) == 32
    with pytest.raises(ValueError, match=r"and 22 sentences more, from validate\(schedule\)$"):
        check(backwards)


def test_who_waits_behind_a_deadlock() -> None:
    schedule = Schedule.from_text("F0.0 B0.0 F0.1 B0.1\nF1.1 B1.1 F1.0 B1.0\nF2.1 B2.1 F2.0 B2.0\nF3.0 B3.0 F3.1 B3.1")
    sentences = validate(schedule)
    assert [s.split(",")[0] for s in sentences[:2]] == [
        "Deadlock: rank 0 stops at its 2nd action",
        "Deadlock: rank 1 stops at its 1st action",
    ]
    assert sentences[2:] == ["Behind them rank 2 and rank 3 wait too."]


# --- nothing broken slips through, nothing good is blamed -------------------------------------------------------------


def mutate(draw: st.DrawFn, lists: Lists, schedule: Schedule) -> None:
    rank = draw(st.integers(0, len(lists) - 1))
    mine = lists[rank]
    if not mine:
        return
    i = draw(st.integers(0, len(mine) - 1))
    action = mine[i]
    how = draw(
        st.sampled_from(
            ["swap", "near", "drop", "twice", "move", "rename", "restage", "split", "merge", "pair", "kind", "ranks"]
        )
    )
    if how in ("swap", "near"):
        j = draw(st.integers(0, len(mine) - 1)) if how == "swap" else min(i + 1, len(mine) - 1)
        mine[i], mine[j] = mine[j], mine[i]
    elif how == "drop":
        del mine[i]
    elif how == "twice":
        mine.insert(draw(st.integers(0, len(mine))), action)
    elif how == "move":
        other = lists[draw(st.integers(0, len(lists) - 1))]
        other.insert(draw(st.integers(0, len(other))), mine.pop(i))
    elif how == "ranks":
        j = draw(st.integers(0, len(lists) - 1))
        lists[rank], lists[j] = lists[j], lists[rank]
    elif isinstance(action, Pair):
        if how == "split":
            mine[i : i + 1] = draw(st.permutations(action.parts))
    elif how == "rename":
        mine[i] = replace(action, microbatch=draw(st.integers(0, schedule.num_microbatches)))
    elif how == "restage":
        mine[i] = replace(action, stage=draw(st.integers(0, schedule.num_stages)))
    elif how == "kind":
        mine[i] = replace(action, kind=draw(st.sampled_from("FIWB")))
    elif how == "split" and action.kind == "B":
        mine[i] = replace(action, kind="I")
        mine.insert(draw(st.integers(0, len(mine))), replace(action, kind="W"))
    elif how == "merge" and i + 1 < len(mine) and (action.kind, mine[i + 1].kind) == ("I", "W"):
        mine[i : i + 2] = [replace(action, kind="B")]
    elif how == "pair" and i + 1 < len(mine) and isinstance(mine[i + 1], Action):
        mine[i : i + 2] = [Pair(*draw(st.permutations([action, mine[i + 1]])))]


@given(data=st.data())
def test_the_validator_complains_exactly_when_the_schedule_cannot_run(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SCHEDULES))
    P = data.draw(st.sampled_from([2, 4] if name in ("chimera", "dualpipe") else [1, 2, 3]))
    schedule = make_schedule(name, P, data.draw(st.sampled_from([2 * P, 4 * P])))
    lists: Lists = [list(mine) for mine in schedule.actions]
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data.draw, lists, schedule)
    changed = replace(schedule, actions=lists)
    wrong = validate(changed)
    assert (wrong == []) == brute.runs(changed), wrong
    assert all(sentence.endswith(".") for sentence in wrong)


@given(data=st.data())
def test_a_deadlock_is_seen_whatever_the_order(data: st.DataObject) -> None:
    """Each rank works in any order in which the F, I and W of a chunk follow each other: often in a circle."""
    P, M = data.draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2)]))
    lists: Lists = []
    for rank in range(P):
        order = data.draw(st.permutations([m for m in range(M) for _ in "FIW"]))
        todo = {m: iter("FIW") for m in range(M)}
        lists.append([Action(next(todo[m]), rank, m) for m in order])
    wrong = validate(Schedule("shuffled", P, M, P, lists))
    assert (wrong == []) == brute.runs(Schedule("shuffled", P, M, P, lists))
    assert all(sentence.startswith(("Deadlock", "Behind")) for sentence in wrong)
