"""Showing source: the right lines, nothing pasted; glue and tables."""

import math

import pytest

from dsv3_book import plot
from dsv3_book.show import ROOT, Source, progress, recorded, show, table


def test_shows_a_functions_own_lines():
    source = show(plot.arrow)
    ((first, last),) = source.ranges
    assert source.path == "dsv3_book/plot.py"
    assert (ROOT / "plot.py").read_text().splitlines()[first - 1 : last] == source.text.splitlines()
    assert f"lines {first}–{last}" in source.where


def test_only_some_members_of_a_class():
    text = show(Source, only=["where"]).text
    assert "def where" in text
    assert "@property" in text
    assert "_repr_markdown_" not in text
    assert "..." in text
    with pytest.raises(ValueError, match="Source defines no nowhere; it defines path"):
        show(Source, only=["nowhere"])
    with pytest.raises(ValueError, match="wants a class"):
        show(plot.arrow, only=["x"])


def test_methods_properties_modules_and_docstrings():
    assert show(Source.where).text.startswith("@property")
    assert '"""' in show(plot.finish).text
    assert '"""' not in show(plot.finish, docstring=False).text
    assert show(plot).ranges[0][0] == 1


def test_a_kernel_shows_what_was_decorated():
    pytest.importorskip("triton")
    from dsv3_book.fp8.kernels.gemm import gemm_kernel

    assert "def gemm_kernel(" in show(gemm_kernel).text  # interpreted or compiled, and autotuned on top


def test_what_has_no_source_is_named():
    with pytest.raises(TypeError, match="wants a function"):
        show(math.sin)


def test_a_fence_inside_is_fenced():
    assert "````python" in Source("a.py", ((1, 1),), "x = '```'")._repr_markdown_()


def test_table():
    shown = table([["MLA", 576]], header=["attention", "numbers"])
    assert shown._repr_markdown_().splitlines() == ["| attention | numbers |", "| :--- | ---: |", "| MLA | 576 |"]
    assert repr(shown).splitlines()[1] == "MLA            576"
    with pytest.raises(ValueError, match="1 cells, the header 2"):
        table([["MLA"]], header=["a", "b"])


def test_progress_passes_items_through():
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert list(progress(iter("ab"), "x")) == ["a", "b"]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_recorded_result_says_where_it_comes_from_and_stays_small(path):
    about = recorded(path.stem)["about"]
    assert {"date", "command", "commit", "machine"} <= about.keys()
    assert path.stat().st_size < 300_000


def test_an_unknown_result_is_named_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"'nothing': there are .*mtp"):
        recorded("nothing")
