"""What a machine can check of book/AUTHORING.md, without running a cell."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import jupytext
import notebooks
from IPython.core.inputtransformer2 import TransformerManager

PAGES = notebooks.pages(ROOT)
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]-*.md"))
NOTEBOOKS = [
    page for page in sorted({*PAGES, *CHAPTERS}) if page.exists() and "{code-cell}" in page.read_text(encoding="utf-8")
]
# Directives that only pages without cells may use: they are never turned into notebooks.
BACK_MATTER = {"glossary", "bibliography", "tableofcontents", "literalinclude"}
page_of = {"ids": lambda page: page.stem}


def _cells(page: Path, kind: str) -> list:
    return [
        cell for cell in jupytext.reads(page.read_text(encoding="utf-8"), fmt="md:myst").cells if cell.cell_type == kind
    ]


def test_every_page_of_the_toc_exists_and_every_page_is_in_it():
    assert all(page.exists() for page in PAGES), [str(page) for page in PAGES if not page.exists()]
    unlisted = set((ROOT / "book").glob("*.md")) - set(PAGES) - {ROOT / "book" / "AUTHORING.md"}
    assert not unlisted, f"not in _toc.yml: {sorted(page.name for page in unlisted)}"


@pytest.mark.parametrize("page", NOTEBOOKS, **page_of)
def test_a_page_with_cells_has_the_header(page):
    head = yaml.safe_load(page.read_text(encoding="utf-8").split("---\n")[1])
    assert head["jupytext"]["text_representation"]["format_name"] == "myst"
    assert head["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("page", NOTEBOOKS, **page_of)
def test_cells_are_short_and_shown(page):
    for cell in _cells(page, "code"):
        tags = set(cell.metadata.get("tags", []))
        lines = cell.source.strip().splitlines()
        if "solution" not in tags:
            assert len(lines) <= 15, f"{page.name}: a cell of {len(lines)} lines begins {lines[0]!r}"
        assert tags <= {"exercise", "solution", "hide-cell"}, f"{page.name}: unknown tags {tags}"
        assert ("hide-cell" in tags) == ("solution" in tags), f"{page.name}: only solutions are folded: {lines[0]!r}"
        assert "plt.show" not in cell.source
        assert not re.search(r"^(?:from|import) myst_nb", cell.source, flags=re.M), "use dsv3_book.show.glue"


@pytest.mark.parametrize("page", NOTEBOOKS, **page_of)
def test_cells_parse(page):
    """A typing error is found here in a second, not after minutes of building."""
    for cell in _cells(page, "code"):
        ast.parse(TransformerManager().transform_cell(cell.source), filename=page.name)


@pytest.mark.parametrize("page", NOTEBOOKS, **page_of)
def test_figures_have_alt_text(page):
    for cell in _cells(page, "code"):
        for call in re.findall(r"plot\.finish\((.*)", cell.source, flags=re.S):
            assert "alt=" in call, f"{page.name}: plot.finish without alt"
    for image in re.findall(r"!\[(.*?)\]\(", page.read_text(encoding="utf-8")):
        assert len(image) >= 20, f"{page.name}: an image without alt text"


@pytest.mark.parametrize("page", PAGES, **page_of)
def test_only_markup_that_survives_in_a_notebook(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^(`{3,})(?!\{).*?^\1\s*$", "", text, flags=re.M | re.S)
    directives = set(re.findall(r"^\s*(?:`{3,}|:{3,})\{([\w:-]+)\}", prose, flags=re.M))
    assert directives <= set(notebooks.DIRECTIVES) | BACK_MATTER, f"{page.name}: {directives}"
    roles = set(re.findall(r"(?<![`\w])\{([\w:]+)\}`", re.sub(r"``.*?``", "", prose)))
    assert roles <= set(notebooks.ROLES), f"{page.name}: {roles - set(notebooks.ROLES)}"


@pytest.mark.parametrize("page", PAGES, **page_of)
def test_citations_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    known = notebooks.short_citations(ROOT)
    for keys in re.findall(r"\{cite:[pt]\}`([^`]+)`", text):
        assert {key.strip() for key in keys.split(",")} <= set(known), f"{page.name}: {keys}"
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).resolve() in PAGES, f"{page.name} links to {target}, which is not in _toc.yml"


def test_labels_of_formulas_are_unique():
    labels = [
        label
        for page in PAGES
        for label in re.findall(r"^\$\$ *\(([\w-]+)\)", page.read_text(encoding="utf-8"), flags=re.M)
    ]
    assert len(labels) == len(set(labels)), sorted({label for label in labels if labels.count(label) > 1})


@pytest.mark.parametrize("page", NOTEBOOKS, **page_of)
def test_the_notebook_is_plain_markdown(page):
    notebook = notebooks.convert(page, ROOT)
    assert notebook.cells[0].source.startswith("# ")
    assert "%pip install" in notebook.cells[1].source
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            outside = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.S)
            assert not re.search(r"^:{3,}|\{[\w:]+\}`|^`{3,}\{", outside, flags=re.M), cell.source
        assert "hide-cell" not in cell.metadata.get("tags", [])


SAMPLE = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
---

# 9 · Sample

A {term}`latents <latent>` of {cite:t}`k` and {cite:p}`k`, {eq}`eq-b`, {glue:text}`n`.

$$
a
$$ (eq-a)

$$
b
$$ (eq-b)

::::{admonition} Why?
Because.

:::{dropdown} More
```python
x = "{eq}`no`"
```
:::
::::

```{code-cell} ipython3
:tags: [hide-cell, solution]

answer = 1
```
"""


def test_conversion_of_every_construct(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "references.bib").write_text(
        "@article{k,\n  author = {Doe, Ann and Roe, Bo},\n  year = {2024}\n}\n"
    )
    page = tmp_path / "book" / "09-sample.md"
    page.write_text(SAMPLE, encoding="utf-8")
    title, install, body, solution = notebooks.convert(page, tmp_path).cells
    assert title.source == "# 9 · Sample"
    assert install.cell_type == "code"
    assert body.source.startswith("A latents of Doe et al. (2024) and (Doe et al., 2024), (2), `n` (printed above).")
    assert "\\tag{2}\n$$" in body.source
    assert "> **Why?**\n>\n> Because." in body.source
    assert "> <summary>More</summary>" in body.source
    assert "{eq}`no`" in body.source
    assert solution.cell_type == "markdown"
    assert "<summary>Solution</summary>" in solution.source
