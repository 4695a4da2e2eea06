"""Ranks, nodes and groups, as arithmetic."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.parallel.mesh import GROUPS, Layout, link, make_mesh


@st.composite
def layouts(draw):
    inside, across = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    per_node = inside if across > 1 else inside * draw(st.integers(1, 3))
    return Layout(draw(st.integers(1, 4)), draw(st.integers(1, 3)) * inside * across, inside * across, per_node)


@given(layouts())
def test_every_group_splits_all_ranks(layout):
    for group in GROUPS:
        parts = layout.partition(group)
        assert sorted(itertools.chain(*parts)) == list(range(layout.world))
        assert all(part == sorted(part) and len(part) == len(parts[0]) for part in parts)
    sizes = {group: len(layout.partition(group)[0]) for group in GROUPS}
    assert sizes["pp"] == layout.pp
    assert sizes["dp"] == layout.dp
    assert sizes["ep"] == layout.ep == sizes["across"] * sizes["inside"]
    assert sizes["edp"] * layout.ep == layout.dp


@given(layouts())
def test_nodes_are_what_the_two_hops_need(layout):
    for rank in range(layout.world):
        assert len({layout.node(r) for r in layout.ranks("inside", rank)}) == 1
        across = layout.ranks("across", rank)
        assert len({layout.node(r) for r in across}) == len(across)
        # the index in the expert group is node by node, then inside the node
        assert layout.index("ep", rank) == layout.index("across", rank) * layout.axes["inside"] + layout.index(
            "inside", rank
        )
        assert {r % layout.ranks_per_node for r in across} == {rank % layout.ranks_per_node}


def test_the_report_s_own_layout():
    """2048 GPUs: 16 pipeline ranks, experts over 64 ranks on 8 nodes of 8 (report §3.2)."""
    layout = Layout(pp=16, dp=128, ep=64, ranks_per_node=8)
    assert layout.world == 2048
    assert layout.axes == {"pp": 16, "edp": 2, "across": 8, "inside": 8}
    assert layout.ranks("edp", 5) == [5, 69]
    assert [layout.node(r) for r in layout.ranks("across", 70)] == list(range(8, 16))
    mirrored = layout.holders(5, expert=True, mirrored=True)
    assert mirrored == [5, 69, 15 * 128 + 5, 15 * 128 + 69]
    assert len(layout.holders(5, expert=False, mirrored=True)) == 2 * 128


def test_the_middle_rank_of_an_odd_pipeline_is_its_own_mirror():
    assert Layout(3, 2, 1, 2).holders(2, expert=False, mirrored=True) == [2, 3]


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((0, 1, 1, 1), "pp = 0"),
        ((1, 4, 3, 4), "ep = 3 doesn't divide dp = 4"),
        ((1, 6, 6, 4), "ep = 6 with 4 ranks per node"),
    ],
)
def test_numbers_that_dont_fit_are_named(numbers, says):
    with pytest.raises(ValueError, match=says):
        Layout(*numbers)


def test_one_process_alone_needs_no_groups():
    mesh = make_mesh()
    assert mesh.ep is None and mesh.edp is None
    assert (mesh.rank, mesh.node, mesh.index("ep"), mesh.size("dp")) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"pp · dp = 2 · 1 = 2, but there are 1 processes"):
        make_mesh(pp=2, dp=1)
    with pytest.raises(ValueError, match="1 processes don't divide into pipelines of pp = 2"):
        make_mesh(pp=2)
    with pytest.raises(AttributeError):
        _ = mesh.nonsense


def test_links():
    assert [link(1, there, 2) for there in range(4)] == ["nvlink", "self", "ib", "ib"]
