"""Showing the package's own code and numbers, in a notebook as on a rendered page.

Everything here answers with Markdown or plain MIME data, so that JupyterLab, VS Code, Colab and the rendered book each
highlight it in their own light or dark theme. No torch, no matplotlib.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any, TypeVar

Item = TypeVar("Item")
ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Source:
    """A piece of the package's source: where it is, and its text. Displays itself as highlighted code."""

    path: str
    ranges: tuple[tuple[int, int], ...]
    text: str

    @property
    def where(self) -> str:
        """Like ``dsv3_book/model/router.py, lines 12–40``."""
        spans = ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in self.ranges)
        return f"{self.path}, line{'' if spans.isdigit() else 's'} {spans}"

    def _repr_markdown_(self) -> str:
        fence = "```" if "```" not in self.text else "````"
        return f"*{self.where.replace('_', chr(92) + '_')}*\n\n{fence}python\n{self.text}\n{fence}\n"

    def __repr__(self) -> str:
        return f"# {self.where}\n{self.text}"


def show(obj: Any, *, only: Sequence[str] = (), docstring: bool = True) -> Source:
    """The source of a function, class, method, property or module of the package, with its file and lines.

    Args:
        obj: what to show. Decorated functions and properties are unwrapped.
        only: for a class, names of the members to show; the others are left out, marked by ``...``.
        docstring: ``False`` leaves the docstrings out (when the page around says the same).

    Raises:
        TypeError: `obj` has no Python source of its own (a built-in, a number).
        ValueError: `only` names a member that the class doesn't define.
    """
    target = _unwrap(obj)
    try:
        lines, start = inspect.getsourcelines(target)
        file = Path(inspect.getsourcefile(target) or "")
    except (TypeError, OSError) as error:
        raise TypeError(f"show() wants a function, class, method or module with Python source, got {obj!r}") from error
    if isinstance(target, ModuleType):
        start = 1
    try:
        path = file.resolve().relative_to(ROOT.parent).as_posix()
    except ValueError:
        path = file.name
    keep = [True] * len(lines)
    code = textwrap.dedent("".join(lines))
    node = ast.parse(code)
    if only:
        keep = _members(node.body[0], list(only), len(lines))
    if not docstring:
        for first, last in _docstrings(node):
            keep[first - 1 : last] = [False] * (last - first + 1)
    return Source(path, _ranges(keep, start, bool(only)), _join(code.splitlines(), keep, bool(only)))


def _unwrap(obj: Any) -> Any:
    while type(obj).__module__.startswith("triton.") and hasattr(obj, "fn"):  # a kernel, compiled, interpreted or tuned
        obj = obj.fn
    if isinstance(obj, property):
        obj = obj.fget
    if isinstance(obj, staticmethod | classmethod):
        obj = obj.__func__
    if not isinstance(obj, type | ModuleType) and not inspect.isroutine(obj) and hasattr(type(obj), "__wrapped__"):
        obj = obj.__wrapped__
    return inspect.unwrap(obj) if callable(obj) else obj


def _first_line(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])  # type: ignore[attr-defined]


def _members(cls: ast.stmt, only: list[str], total: int) -> list[bool]:
    """Which lines of a class to keep: its head, its docstring and the members named in `only`."""
    if not isinstance(cls, ast.ClassDef):
        raise ValueError(f"show(only=...) wants a class, got {type(cls).__name__}")
    keep = [False] * total
    body_start = _first_line(cls.body[0])
    keep[: body_start - 1] = [True] * (body_start - 1)
    names = {}
    for member in cls.body:
        is_doc = member is cls.body[0] and isinstance(member, ast.Expr) and isinstance(member.value, ast.Constant)
        targets = [getattr(member, "target", None), *getattr(member, "targets", [])]
        label = getattr(member, "name", None) or next((t.id for t in targets if isinstance(t, ast.Name)), None)
        if label:
            names[label] = member
        if is_doc or label in only:
            first = _first_line(member)
            keep[first - 1 : member.end_lineno] = [True] * ((member.end_lineno or first) - first + 1)
    if missing := [name for name in only if name not in names]:
        raise ValueError(f"{cls.name} defines no {', '.join(missing)}; it defines {', '.join(names)}")
    return keep


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module) or not body:
            continue
        first = body[0]
        text = first.value if isinstance(first, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and len(body) > 1:
            yield first.lineno, first.end_lineno or first.lineno


def _ranges(keep: list[bool], start: int, split: bool) -> tuple[tuple[int, int], ...]:
    if not split:
        return ((start, start + len(keep) - 1),)
    ranges: list[tuple[int, int]] = []
    for number, kept in enumerate(keep, start):
        if kept and ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        elif kept:
            ranges.append((number, number))
    return tuple(ranges)


def _join(lines: list[str], keep: list[bool], mark_gaps: bool) -> str:
    out: list[str] = []
    gap = False
    for line, kept in zip(lines, keep, strict=False):
        if kept:
            if gap and mark_gaps:
                indent = len(line) - len(line.lstrip())
                out += ["", " " * indent + "...", ""]
            out.append(line)
            gap = False
        elif line.strip():
            gap = True
    if gap and mark_gaps:
        out += ["", "    ..."]
    text = "\n".join(out).strip("\n")
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def glue(name: str, value: Any, spec: str = "") -> None:
    """Keep a computed number for the prose: the page says ``{glue:text}`name` ``, the notebook prints ``name = value``.

    Args:
        name: the name, unique on its page (letters, digits, ``_``).
        value: what to show, formatted with `spec` as :func:`format` does (``","`` or ``".2f"``).
    """
    from IPython.display import display

    text = format(value, spec)
    prefix = "application/papermill.record/"
    # The metadata is the one that myst-nb's own glue writes; using it directly keeps notebooks free of myst-nb.
    # Quoted, because myst-nb reads the text as a Python literal: 70,272 would become a pair of numbers.
    data = {f"{prefix}text/plain": repr(text), "text/plain": f"{name} = {text}"}
    display(data, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], align: str = "") -> "Table":
    """A small table: `align` has one letter a column, ``l`` or ``r`` (default: first column left, the others right)."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row!r}")
    align = align or "l" + "r" * (len(header) - 1)
    return Table(tuple(tuple(str(cell) for cell in row) for row in rows), tuple(header), align)


@dataclass(frozen=True)
class Table:
    """Rows under a header; displays as a table on a page and in a notebook, as aligned text elsewhere."""

    rows: tuple[tuple[str, ...], ...]
    header: tuple[str, ...]
    align: str

    def _repr_markdown_(self) -> str:
        cells = [[c.replace("|", r"\|") for c in row] for row in self.rows]
        rule = ["---:" if a == "r" else ":---" for a in self.align]
        lines = [list(self.header), rule, *cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        pad = {"l": str.ljust, "r": str.rjust}
        return "\n".join(
            "  ".join(pad[a](c, w) for c, w, a in zip(line, widths, self.align, strict=True)) for line in lines
        )


def recorded(name: str) -> dict[str, Any]:
    """The recorded result of a long experiment, from ``results/`` in the package.

    Every one has ``about``: the date, command, commit and machine it was measured with.

    Raises:
        FileNotFoundError: no such result (the message lists those there are).
    """
    path = ROOT / "results" / f"{name}.json"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in (ROOT / "results").glob("*.json"))) or "none yet"
        raise FileNotFoundError(f"no recorded result is called {name!r}: there are {have}")
    return json.loads(path.read_text(encoding="utf-8"))


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Go through `items` and show how far we are while it lasts; a finished page keeps no trace of it.

    In a notebook one line is rewritten in place and removed at the end; elsewhere nothing is shown.
    """
    count = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    update, clear = _notebook_line()
    shown = float("-inf")
    for done, item in enumerate(items):
        if monotonic() > shown + 0.5:
            shown = monotonic()
            bar = "" if not count else "▰" * (20 * done // count) + "▱" * (20 - 20 * done // count)
            update(f"{label} {bar} {done}{f'/{count}' if count else ''}")
        yield item
    clear()


def _notebook_line() -> tuple[Callable[[str], None], Callable[[], None]]:
    """Two functions, one that rewrites a line of output and one that removes it; both do nothing outside a notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import clear_output
    except ImportError:
        return (lambda text: None), (lambda: None)
    if get_ipython() is None or "IPKernelApp" not in get_ipython().config:
        return (lambda text: None), (lambda: None)

    def update(text: str) -> None:
        clear_output(wait=True)
        print(text, flush=True)

    return update, clear_output
