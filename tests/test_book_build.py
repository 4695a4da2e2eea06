"""The strict build: failures stay failures, nothing stale is shown, an unchanged book isn't run again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst, format_version: 0.13}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Page
"""
# Each execution adds a line to a file, so the tests can count executions.
CELL = """
```{{code-cell}} ipython3
with open({log!r}, "a") as log:
    log.write("ran\\n")
import sys; sys.path.insert(0, {src!r})
import mini
print("value is", mini.VALUE)
{extra}
```
"""
CONFIG = """\
title: Small
author: Nobody
only_build_toc_files: true
execute: {execute_notebooks: cache, timeout: 60, stderr_output: warn}
html: {use_repository_button: false}
"""


class Book:
    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log.txt"
        (root / "src").mkdir()
        (root / "_config.yml").write_text(CONFIG)
        (root / "_toc.yml").write_text("format: jb-book\nroot: page\n")
        (root / "requirements.txt").write_text("nothing==1\n")
        self.value(1)
        self.page()

    def value(self, value: int) -> None:
        (self.root / "src" / "mini.py").write_text(f"VALUE = {value}\n")

    def page(self, extra: str = "", prose: str = "") -> None:
        cell = CELL.format(log=str(self.log), src=str(self.root / "src"), extra=extra)
        (self.root / "page.md").write_text(HEADER + cell + prose)

    def build(self) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "tools" / "build_book.py"), "--source", str(self.root)]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        return done.returncode, done.stdout + done.stderr

    @property
    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    @property
    def html(self) -> str:
        return (self.root / "_build" / "html" / "page.html").read_text(encoding="utf-8")


@pytest.mark.book
@pytest.mark.slow
def test_strict_cached_and_never_stale(tmp_path):
    book = Book(tmp_path)
    status, said = book.build()
    assert status == 0, said
    assert "warning" not in said.lower(), said
    assert "value is 1" in book.html
    assert book.runs == 1

    status, said = book.build()
    assert status == 0, said
    assert book.runs == 1, "nothing changed, and yet the page ran again"
    assert "value is 1" in book.html

    book.value(2)
    status, said = book.build()
    assert status == 0, said
    assert book.runs == 2, "src/ changed, and the page did not run again"
    assert "value is 2" in book.html
    assert len(list((tmp_path / "_build" / ".jupyter_cache").iterdir())) == 1, "old caches stay"

    book.page(extra="1 / 0")
    for attempt in (1, 2):
        status, said = book.build()
        assert status != 0, f"a failing cell passed, attempt {attempt}"
        assert "ZeroDivisionError" in said

    book.page(extra="", prose="\nA {term}`nowhere`.\n")
    for attempt in (1, 2):
        status, said = book.build()
        assert status != 0, f"a warning passed, attempt {attempt}"
        assert "nowhere" in said

    book.page()
    status, said = book.build()
    assert status == 0, said
    assert "value is 2" in book.html


def test_the_key_sees_what_cells_depend_on(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    from build_book import cache_key

    for name in ("src/a.py", "experiments/result.json", "requirements.txt", "book/page.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = cache_key(tmp_path)
    assert before == cache_key(tmp_path)
    for name in ("src/a.py", "experiments/result.json", "requirements.txt"):
        (tmp_path / name).write_text("2")
        after = cache_key(tmp_path)
        assert after != before, name
        before = after
    (tmp_path / "src" / "b.py").write_text("")
    after = cache_key(tmp_path)
    assert after != before
    (tmp_path / "book" / "page.md").write_text("2")  # a page's own cells are the notebook cache's business
    (tmp_path / "src" / "__pycache__").mkdir()
    (tmp_path / "src" / "__pycache__" / "a.pyc").write_text("x")
    assert cache_key(tmp_path) == after
    shutil.rmtree(tmp_path / "src")
    assert cache_key(tmp_path) != after


def test_without_triton_its_pages_are_shown_unexecuted(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import build_book
    import yaml

    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "book" / "kernels.md").write_text(HEADER + "```{code-cell} ipython3\nimport triton\n```\n")
    (tmp_path / "book" / "other.md").write_text(HEADER + "Here `import triton` is only a phrase.\n")

    def execute():
        return yaml.safe_load(build_book.write_config(tmp_path, tmp_path, tmp_path / "cache").read_text())["execute"]

    found = build_book.importlib.util.find_spec
    monkeypatch.setattr(build_book.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    assert execute()["exclude_patterns"] == ["book/kernels.md"]
    assert "book/kernels.md" in capsys.readouterr().out
    monkeypatch.setattr(build_book.importlib.util, "find_spec", lambda name: object())
    assert "exclude_patterns" not in execute()
