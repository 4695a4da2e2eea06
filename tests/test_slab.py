"""Boxes of tensors: what is left of one, who writes which, and what can't be a checkpoint."""

from pathlib import Path

import pytest
import torch
from checkpointkit import blank, deal, part, same
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.checkpoint import CheckpointError, SaveError, load, save
from dsv3_book.parallel import DataParallel
from dsv3_book.slab import Box, Slab, Writing, slabs, spread, uncovered

ALONE = DataParallel()


def boxes_within(shape: tuple[int, ...]):
    axis = lambda n: st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: (min(p), max(p) - min(p)))
    return st.tuples(*map(axis, shape)).map(lambda pairs: Box(tuple(o for o, _ in pairs), tuple(n for _, n in pairs)))


def mark(shape: tuple[int, ...], *boxes: Box) -> torch.Tensor:
    found = torch.zeros(shape, dtype=torch.int32)
    for box in boxes:
        part(found, box.offset, box.sizes).add_(1)
    return found


@given(st.sampled_from([(9,), (4, 5), (3, 4, 2)]).flatmap(lambda s: st.tuples(st.just(s), st.lists(boxes_within(s)))))
def test_what_is_uncovered_is_what_no_box_marks(drawn) -> None:
    shape, boxes = drawn
    whole = Box((0,) * len(shape), shape)
    left = uncovered(whole, boxes)
    marks = mark(shape, *left)
    assert marks.max() <= 1  # the rest is told once
    assert torch.equal(marks == 1, mark(shape, *boxes) == 0)


def test_a_scalar_and_an_empty_tensor_are_boxes_too(tmp_path: Path) -> None:
    values = {"step": torch.tensor(3.0), "nothing": torch.zeros(0, 4)}
    path = save(tmp_path, 1, values, {}, ALONE)
    back = {"step": torch.tensor(0.0), "nothing": torch.zeros(0, 4)}
    load(path, back)
    assert back["step"] == 3
    assert uncovered(Box((), ()), [Box((), ())]) == [] != uncovered(Box((), ()), [])
    assert slabs(Slab(torch.zeros(0), (4,), (4,))) == []  # a rank without a share


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_any_boxes_are_filled_from_any_others(tmp_path_factory: pytest.TempPathFactory, out: int, back: int) -> None:
    """One process that holds all boxes of a cut, and then some boxes of another."""
    path = save(tmp_path_factory.mktemp("any"), 1, deal(0, 1, out), {}, ALONE)
    for rank in range(2):
        held = deal(rank, 2, back)
        expected = deal(rank, 2, back)
        load(path, blank(held))
        assert same(held, expected)


@pytest.mark.parametrize(
    ("tensor", "shape", "offset"),
    [((3,), (4,), (2,)), ((3,), (4,), (-1,)), ((3,), (4, 1), (0,)), ((3,), (4,), (0, 0))],
)
def test_a_box_lies_in_its_whole(tensor, shape, offset) -> None:
    with pytest.raises(ValueError, match=r"a box of shape \(3,\) at .* does not lie in a tensor of shape"):
        Slab(torch.zeros(tensor), shape, offset)


def plan(values) -> object:
    planner = Writing()
    planner.set_up_planner(values)
    return planner.create_local_plan()


def test_shared_boxes_are_spread_and_written_once() -> None:
    shared = {f"w{i}": torch.zeros(10) for i in range(6)}
    plans = spread([plan(shared | {"own": torch.zeros(25)}), plan(shared), plan(shared)])
    written = [[item.index.fqn for item in p.items] for p in plans]
    assert sorted(name for names in written for name in names) == ["own", *shared]
    assert [len(names) for names in written] == [1, 3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"w": Slab(torch.zeros(3), (5,), (0,))}], r"no rank holds \[3:5\] of w \[5\]: it could not be loaded again"),
        (
            [{"w": Slab(torch.zeros(3), (5,), (0,))}, {"w": Slab(torch.zeros(3), (5,), (2,))}],
            r"boxes of w \[5\] overlap: \[0:3\], \[2:5\]",
        ),
        (
            [{"w": Slab(torch.zeros(3), (5,), (0,))}, {"w": torch.zeros(5)}],  # they begin at the same place
            r"boxes of w \[5\] overlap: \[0:3\], \[0:5\]",
        ),
        ([{"w": torch.zeros(3)}, {"w": torch.zeros(4)}], r"the ranks disagree about w: .*\(3,\).*\(4,\)"),
        ([{"w": torch.zeros(3)}, {"w": torch.zeros(3).bfloat16()}], r"the ranks disagree about w: .*bfloat16.*float32"),
    ],
)
def test_what_is_no_whole_tensor_is_not_saved(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Writing().create_global_plan([plan(v) for v in values])


def test_two_boxes_at_one_place_are_a_mistake(tmp_path: Path) -> None:
    twice = {"w": [Slab(torch.zeros(3), (3,), (0,)), Slab(torch.zeros(3), (3,), (0,))]}
    with pytest.raises(SaveError, match=r"two boxes of w begin at \(0,\) on one rank"):
        save(tmp_path, 1, twice, {}, ALONE)


def test_a_part_that_no_file_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_book.slab.require_whole", lambda plans: None)  # as another program might write it
    path = save(tmp_path, 1, {"w": Slab(torch.ones(3, 2), (8, 2), (2, 0))}, {}, ALONE)
    inside = torch.zeros(2, 2)
    load(path, {"w": Slab(inside, (8, 2), (3, 0))})
    assert inside.sum() == 4
    with pytest.raises(CheckpointError, match=r"parts that no file holds: \['w \[5:6, 0:2\]'\]"):
        load(path, {"w": Slab(torch.zeros(2, 2), (8, 2), (4, 0))})
    with pytest.raises(CheckpointError, match=r"other shapes: \['w \(8, 2\) \(here \(9, 2\)"):
        load(path, {"w": Slab(torch.zeros(2, 2), (9, 2), (4, 0))})
    with pytest.raises(CheckpointError, match=r"other dtypes: \['w torch.float32 \(here torch.bfloat16"):
        load(path, {"w": Slab(torch.zeros(2, 2).bfloat16(), (8, 2), (3, 0))})
