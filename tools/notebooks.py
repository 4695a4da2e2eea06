"""Write the chapters as `.ipynb` files: `python tools/notebooks.py [--out DIR]`, as `make notebooks` does.

The files are what VS Code, Colab and JupyterLab open with nothing of ours installed but the package: MyST directives
become plain Markdown, code is shown, exercises are open stubs, solutions are folded. A page's download button gives the
same file.
"""

import argparse
import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/dsv3-book/dsv3-book"
INSTALL = f"""\
# Only where the package is missing (Colab, say): install it, which takes a minute or two.
try:
    import dsv3_book
except ImportError:
    %pip install -q "dsv3_book @ git+{REPOSITORY}"
"""
ADMONITIONS = ("admonition", "note", "tip", "warning", "important", "seealso")
DIRECTIVES = (*ADMONITIONS, "dropdown", "code-cell")
ROLES = ("term", "cite:p", "cite:t", "eq", "glue:text")

_FENCE = re.compile(r"^(?P<fence>:{3,}|`{3,})\{(?P<name>[\w:-]+)\}\s*(?P<title>.*)$")
_ROLE = re.compile(r"\{(?P<role>[\w:]+)\}`(?P<body>[^`]+)`")
_LABELLED = re.compile(r"^\$\$\s*\((?P<label>[\w-]+)\)\s*$")


def pages(root: Path) -> list[Path]:
    """The pages of `_toc.yml`, in order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]]
    for part in [*toc.get("parts", []), {"chapters": toc.get("chapters", [])}]:
        files += [chapter["file"] for chapter in part["chapters"]]
    return [root / f"{file}.md" for file in files]


def is_notebook(page: Path) -> bool:
    """Whether a page has the jupytext header, so that its cells run."""
    text = page.read_text(encoding="utf-8")
    return text.startswith("---\n") and "\njupytext:" in text.split("\n---", 2)[0]


def short_citations(root: Path) -> dict[str, str]:
    """Citation key -> "Author et al., year", read from the bibliography."""
    path = root / "book" / "references.bib"
    if not path.exists():
        return {}
    short = {}
    for key, body in re.findall(r"^@\w+\{([^,]+),(.*?)^\}", path.read_text(encoding="utf-8"), flags=re.M | re.S):
        author = re.search(r"author\s*=\s*\{+(.*?)\}+,?\s*$", body, flags=re.M)
        year = re.search(r"year\s*=\s*\{?(\d+)", body)
        names = author.group(1).split(" and ") if author else [key]
        last = names[0].split(",")[0] if "," in names[0] or "{" in author.group(0)[:12] else names[0].split()[-1]  # type: ignore[union-attr]
        short[key.strip()] = (
            f"{last.strip('{}')}{' et al.' if len(names) > 1 else ''}, {year.group(1) if year else 'n.d.'}"
        )
    return short


class Plain:
    """Turns the MyST of one page into Markdown that any notebook renders. Numbers formulas as the page does."""

    def __init__(self, citations: dict[str, str], labels: list[str], values: dict[str, str]) -> None:
        self.citations = citations
        self.values = values
        self.numbers = {label: number for number, label in enumerate(labels, 1)}

    def roles(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            role, body = match["role"], match["body"]
            name = re.sub(r"\s*<[^>]*>$", "", body)
            if role.startswith("cite"):
                cited = [self.citations.get(key.strip(), key.strip()) for key in body.split(",")]
                return (
                    f"({'; '.join(cited)})"
                    if role == "cite:p"
                    else "; ".join(re.sub(r", (\w+)$", r" (\1)", c) for c in cited)
                )
            if role == "eq":
                return f"({self.numbers.get(body, body)})"
            if role.startswith("glue"):
                return self.values.get(body, f"`{body}` (printed above)")
            return name

        return _ROLE.sub(replace, text)

    def markdown(self, text: str) -> str:
        return "\n".join(self._block(text.split("\n"))).strip("\n")

    def _block(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        at = 0
        while at < len(lines):
            line = lines[at]
            fence = _FENCE.match(line)
            if fence and fence["name"] in DIRECTIVES:
                end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == fence["fence"]), len(lines))
                body = lines[at + 1 : end]
                while body and re.match(r"^:[\w-]+:", body[0]):
                    body = body[1:]
                out += self._directive(fence["name"], fence["title"], self._block(body))
                at = end + 1
                continue
            if line.startswith("```"):  # a plain code block stays as it is
                end = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("```")), len(lines) - 1)
                out += lines[at : end + 1]
                at = end + 1
                continue
            label = _LABELLED.match(line)
            if label:
                out += [f"\\tag{{{self.numbers[label['label']]}}}", "$$"]
            elif not re.match(r"^\([\w-]+\)=$", line):
                out.append(self.roles(line))
            at += 1
        return out

    def _directive(self, name: str, title: str, body: list[str]) -> list[str]:
        title = self.roles(title)
        if name == "dropdown":
            return ["<details>", f"<summary>{title}</summary>", "", *body, "", "</details>", ""]
        title = title if name == "admonition" else name.capitalize() + (f": {title}" if title else "")
        return [f"> **{title}**", ">", *(f"> {line}".rstrip() for line in "\n".join(body).strip("\n").split("\n")), ""]


def glued(page: Path, root: Path, build: Path) -> dict[str, str]:
    """Numbers that the page's cells computed for its prose, from the last build's run of it."""
    executed = build / "jupyter_execute" / page.relative_to(root).with_suffix(".glue.json")
    if not executed.exists():
        return {}
    data = json.loads(executed.read_text(encoding="utf-8"))
    # `show.glue` writes each as a quoted string
    return {name: str(ast.literal_eval(output["data"].get("text/plain", "''"))) for name, output in data.items()}


def convert(page: Path, root: Path = ROOT, build: Path | None = None) -> nbformat.NotebookNode:
    """The notebook of one page, without outputs. `build` is the book's build folder (default: `root`/_build)."""
    text = page.read_text(encoding="utf-8")
    source = jupytext.reads(text, fmt="md:myst")
    labels = [match["label"] for match in map(_LABELLED.match, text.split("\n")) if match]
    plain = Plain(short_citations(root), labels, glued(page, root, build or root / "_build"))
    cells: list[Any] = [nbformat.v4.new_code_cell(INSTALL.rstrip("\n"))]
    for cell in source.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(plain.markdown(cell.source)))
        elif "solution" in tags:
            code = f"<details>\n<summary>Solution</summary>\n\n```python\n{cell.source}\n```\n\n</details>"
            cells.append(nbformat.v4.new_markdown_cell(code))
        else:
            cells.append(nbformat.v4.new_code_cell(cell.source, metadata={"tags": tags} if tags else {}))
    if len(cells) > 1 and cells[1].cell_type == "markdown":  # the title comes first, the install cell after it
        title, _, rest = cells[1].source.partition("\n")
        cells[1:2] = [nbformat.v4.new_markdown_cell(rest.strip("\n"))] if rest.strip() else []
        cells.insert(0, nbformat.v4.new_markdown_cell(title))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same file from the same page, every time
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "colab": {"provenance": []}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write_all(root: Path, out: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Write the notebook of every page that is one; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for page in pages(root):
        if page.exists() and is_notebook(page):
            target = out / f"{page.stem}.ipynb"
            nbformat.write(convert(page, root), target)
            written.append(target)
    for stale in set(out.glob("*.ipynb")) - set(written):
        say(f"left alone: {stale} (not a chapter; yours?)")
    say(f"{len(written)} notebooks in {out}")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "notebooks")
    write_all(ROOT, parser.parse_args().out)
