"""Schedules as data: the released order, who holds and sends what, words to actions, errors that help."""

import pickle
from dataclasses import replace

import pytest
import released

from dsv3_book.pipeline.schedule import SCHEDULES, Action, Pair, Schedule, Transfer, make_schedule, spell


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_dualpipe_follows_the_released_order_action_for_action(num_ranks: int) -> None:
    for num_microbatches in [2 * num_ranks, 2 * num_ranks + 2, 2 * num_ranks + 4, 5 * num_ranks]:
        schedule = make_schedule("dualpipe", num_ranks, num_microbatches)
        for rank in range(num_ranks):
            assert [str(a) for a in schedule.actions[rank]] == released.dualpipe(num_ranks, rank, num_microbatches)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_dualpipev_follows_the_released_order_action_for_action(num_ranks: int) -> None:
    for num_microbatches in [2 * num_ranks, 2 * num_ranks + 1, 3 * num_ranks + 2]:
        schedule = make_schedule("dualpipev", num_ranks, num_microbatches)
        assert schedule.num_stages == 2 * num_ranks
        for rank in range(num_ranks):
            assert [str(a) for a in schedule.actions[rank]] == released.dualpipev(num_ranks, rank, num_microbatches)


def test_the_small_ones_by_hand() -> None:
    assert str(make_schedule("1f1b", 2, 3)) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF1.0 B1.0 F1.1 B1.1 F1.2 B1.2"
    assert str(make_schedule("1f1b", 3, 1)) == "F0.0 B0.0\nF1.0 B1.0\nF2.0 B2.0"
    assert str(make_schedule("zb1p", 2, 3)) == (
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2\n"  # rank 0 owes no weight gradient,
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"  # rank 1 always one
    )
    # Chimera's figure for four stages and four micro-batches, which all four ranks finish in ten slots.
    assert str(make_schedule("chimera", 4, 4)) == (
        "F0.0 F0.1 F3.2 B3.2 F3.3 B3.3 B0.0 B0.1\n"
        "F1.0 F2.2 F1.1 F2.3 B2.2 B1.0 B2.3 B1.1\n"
        "F1.2 F2.0 F1.3 F2.1 B2.0 B1.2 B2.1 B1.3\n"
        "F0.2 F0.3 F3.0 B3.0 F3.1 B3.1 B0.2 B0.3"
    )
    # The released README's picture begins like this: rank 0 of 8, 20 micro-batches.
    assert [str(a) for a in make_schedule("dualpipe", 8, 20).actions[0]][:10] == (
        ["F0.0", "F0.1", "F0.2", "F0.3", "F0.4", "F0.5", "F0.6", "F7.10", "I7.10", "W7.10"]
    )


def test_the_middle_ranks_first_forward_and_backward_are_apart() -> None:
    for rank in (1, 2):
        kinds = [action.kind for action in make_schedule("dualpipe", 4, 8).actions[rank]]
        assert kinds[4:7] == ["F", "B", "FB"]
    assert [a.kind for a in make_schedule("dualpipe", 4, 8).actions[0]].count("FB") == 3


def test_a_rank_and_its_mirror_do_the_same_for_opposite_micro_batches() -> None:
    for name in ("chimera", "dualpipe"):
        schedule = make_schedule(name, 6, 18)
        for rank in range(6):
            assert schedule.stages(rank) == sorted({rank, 5 - rank})
            for mine, theirs in zip(schedule.actions[rank], schedule.actions[5 - rank], strict=True):
                for a, b in zip(mine.parts, theirs.parts, strict=True):
                    assert (a.kind, a.stage, (a.microbatch + 9) % 18) == (b.kind, b.stage, b.microbatch)


def test_which_end_a_micro_batch_enters_at() -> None:
    schedule = make_schedule("dualpipe", 4, 10)
    assert [schedule.where("F", 0, m)[0] for m in range(10)] == [0] * 5 + [3] * 5
    assert [schedule.where("F", 3, m)[0] for m in range(10)] == [3] * 5 + [0] * 5
    assert [make_schedule("dualpipev", 2, 5).where("F", s, 4)[0] for s in range(4)] == [0, 1, 1, 0]


def test_where_finds_halves_and_wholes() -> None:
    schedule = Schedule.from_text("F0.0 I0.0 F0.1 W0.0 B0.1")
    assert schedule.where("B", 0, 0) == (0, 1) and schedule.where("W", 0, 0) == (0, 3)
    assert schedule.where("B", 0, 1) == schedule.where("W", 0, 1) == (0, 4)
    with pytest.raises(ValueError, match=r"no rank does F of micro-batch 2 at stage 0 .*micro-batches 0 to 1"):
        schedule.where("F", 0, 2)


def test_transfers_follow_from_the_list() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    assert schedule.sends(0) == [Transfer("F", 0, 0, 0, 1), Transfer("F", 0, 1, 0, 1)]
    assert schedule.sends(1) == [Transfer("B", 1, 0, 1, 0), Transfer("B", 1, 1, 1, 0)]
    # At the fold of a V, stage 0 hands to stage 1 on the same rank: nothing travels.
    assert make_schedule("dualpipev", 1, 2).sends(0) == []
    # A pair sends its forward's, then its backward's.
    pair = "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2\nF1.0 B1.0 F1.1 B1.1 F1.2 B1.2\nF2.0 B2.0 F2.1+B2.1 F2.2 B2.2"
    middle = Schedule.from_text(pair.replace("B1.0 F1.1", "F1.1+B1.0"))
    assert [(t.kind, t.microbatch, t.target) for t in middle.sends(1)][1:3] == [("F", 1, 2), ("B", 0, 0)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_sent_is_what_crosses_ranks(name: str) -> None:
    schedule = make_schedule(name, 4, 8)
    sent = [t for rank in range(4) for t in schedule.sends(rank)]
    assert len(set(sent)) == len(sent)
    crossing = 3 if name != "dualpipev" else 6  # of a V's seven borders the fold is inside a rank
    assert len(sent) == 8 * 2 * crossing
    for t in sent:
        assert schedule.where(t.kind, t.stage, t.microbatch)[0] == t.source != t.target
        assert schedule.where(t.kind, t.stage + (1 if t.kind == "F" else -1), t.microbatch)[0] == t.target


def test_actions_and_pairs() -> None:
    f, b = Action("F", 3, 0), Action("B", 1, 2)
    assert f.parts == (f,) and Pair(f, b).parts == (f, b) and Pair(f, b).kind == Pair.kind == "FB"
    assert str(Pair(f, b)) == "F3.0+B1.2" and len({f, Action("F", 3, 0), Pair(f, b)}) == 2
    with pytest.raises(ValueError, match="kind is F, I, W or B, not 'FB'"):
        Action("FB", 0, 0)
    schedule = make_schedule("dualpipe", 2, 4)
    assert pickle.loads(pickle.dumps(schedule)).actions == schedule.actions


def test_a_schedule_written_by_hand() -> None:
    for name in SCHEDULES:
        made = make_schedule(name, 4, 8)
        read = Schedule.from_text(str(made), name)
        assert read.actions == made.actions
        assert (read.num_ranks, read.num_stages, read.num_microbatches) == (4, made.num_stages, 8)
    for word in ("F0", "X0.1", "F0.x", "F0.0+B0.1+W0.0", "."):
        with pytest.raises(ValueError, match=r"rank 1: '.*' is not an action; write F0.1"):
            Schedule.from_text(f"F0.0\n{word}")
    with pytest.raises(ValueError, match="holds no action"):
        Schedule.from_text("\n")


def test_a_changed_copy_forgets_where_things_were() -> None:
    schedule = make_schedule("1f1b", 1, 2)
    assert schedule.where("F", 0, 1) == (0, 2)
    assert replace(schedule, actions=[list(reversed(schedule.actions[0]))]).where("F", 0, 1) == (0, 1)


def test_words() -> None:
    lanes = [(0, [5, 6]), (3, [7])]
    assert [str(a) for a in spell(["F0", "F1", "I0", "F0B1", "I0", "W", "W"], lanes)] == (
        ["F0.5", "F3.7", "I0.5", "F0.6+B3.7", "I0.6", "W0.5", "W0.6"]
    )
    for word in ("FB", "W0", "X0", "F0I1", "F"):
        with pytest.raises(ValueError, match=f"word 2, '{word}', is none: there are F0"):
            spell(["F0", word], lanes)
    for words in (["W"], ["B1", "B1"], ["F2"]):
        with pytest.raises(ValueError, match="no micro-batch of its lane is left"):
            spell(words, lanes)


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "message"),
    [
        ("gpipe", 2, 4, "no schedule is called 'gpipe'; there are 1f1b, zb1p, chimera, dualpipe, dualpipev"),
        ("1f1b", 0, 4, "1f1b with 0 ranks and 4 micro-batches: both must be at least 1"),
        ("zb1p", 2, 0, "zb1p with 2 ranks and 0 micro-batches"),
        ("chimera", 3, 6, "even number of ranks: take 4, or dualpipev"),
        ("chimera", 4, 10, "divisible by the 4 stages: take 12"),
        ("chimera", 4, 2, "divisible by the 4 stages: take 4"),
        ("dualpipe", 5, 10, "even number of ranks: take 6, or dualpipev"),
        ("dualpipe", 1, 2, "even number of ranks: take 2, or dualpipev"),
        ("dualpipe", 4, 11, "take an even number, 12"),
        ("dualpipe", 4, 3, "take an even number, 8"),
        ("dualpipe", 4, 6, "needs 2 × 4 = 8 micro-batches or more to fill: take 8, or fewer ranks"),
        ("dualpipev", 3, 5, "2 × 3 = 6 micro-batches or more"),
    ],
)
def test_numbers_that_dont_fit_are_named_with_a_remedy(
    name: str, num_ranks: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(name, num_ranks, num_microbatches)
