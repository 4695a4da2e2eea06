"""Corpus: what is read, what is held out, and what is said when it can't be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.data import Corpus, Document, load_corpus
from dsv3_book.data.corpus import stdlib_files


def folder_of(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


def names(corpus: Corpus) -> set[str]:
    return {Path(doc.name).name for doc in corpus.train + corpus.held_out}


def test_the_default_corpus_is_the_standard_library_without_its_tests():
    files = stdlib_files()
    assert 8e6 < sum(path.stat().st_size for path in files) < 20e6
    assert {"argparse.py", "threading.py"} <= {path.name for path in files}
    root = files[0].parent
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert files == stdlib_files()
    corpus = load_corpus()
    assert 0.01 < corpus.held_out_bytes / corpus.bytes < 0.12
    assert corpus.train[0].text == (root / corpus.train[0].name).read_bytes().decode()


def test_every_format_and_kind_of_source(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.md").write_bytes("# märkdown\r\n".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("code = 1")
    (tmp_path / "d.jsonl").write_text('{"text": "one \u2028 line", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    parquet.write_table(arrow.table({"text": ["row 0", "row 1"], "x": [1, 2]}), tmp_path / "e.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    everything = load_corpus(tmp_path)
    texts = {doc.text for doc in everything.train + everything.held_out}
    assert texts == {"text", "# märkdown\r\n", "code = 1", "one \u2028 line", "two", "row 0", "row 1"}
    assert names(load_corpus(str(tmp_path / "**" / "*.[tp]*"))) >= {"a.txt", "c.py"}
    assert names(load_corpus([tmp_path / "a.txt", tmp_path / "d.jsonl"])) == {"a.txt", "d.jsonl:1", "d.jsonl:3"}


def test_undecodable_files_are_skipped_counted_and_named(tmp_path):
    folder = folder_of(tmp_path, ["one", "two", "", "  \n", "one"])
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    corpus = load_corpus(folder)
    assert len(corpus.skipped) == 2
    assert any("latin.txt: not UTF-8 (byte 3)" in line for line in corpus.skipped)
    assert any("half.jsonl:1" in line and "surrogate" in line for line in corpus.skipped)
    assert (corpus.empty, corpus.duplicates) == (2, 1)
    assert "2 skipped" in corpus.summary() and "latin.txt" in corpus.summary()


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": null}', '{"text": 3}', '"text"', "[1]"])
def test_a_jsonl_line_without_text_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r'rows\.jsonl:2: no text .* "text"'):
        load_corpus(path)


def test_a_broken_jsonl_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a line of JSON"):
        load_corpus(tmp_path / "rows.jsonl")


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "bad.parquet").write_text("not parquet")
    for source, kind, message in [
        (tmp_path / "nothing.txt", FileNotFoundError, r"no such file or folder: .*nothing\.txt"),
        (tmp_path / "nothing", FileNotFoundError, "no such file or folder"),
        (tmp_path / "*.md", FileNotFoundError, r"no file matches .*\*\.md"),
        (tmp_path / "empty", ValueError, r"empty has no file that ends in \.txt"),
        (tmp_path / "blank.txt", ValueError, r"no text in .*blank\.txt: 1 empty"),
        (tmp_path / "one.txt", ValueError, "one character"),
        (tmp_path / "table.csv", ValueError, r"'\.csv', which is not read"),
        (tmp_path / "bad.parquet", ValueError, r"bad\.parquet: not a readable parquet file"),
        ([], ValueError, "list of sources is empty"),
    ]:
        with pytest.raises(kind, match=message):
            load_corpus(source)
    with pytest.raises(ValueError, match=r"held_out is 1\.5"):
        load_corpus(tmp_path / "one.txt", held_out=1.5)
    with pytest.raises(ValueError, match="max_bytes is 0"):
        load_corpus(tmp_path / "one.txt", max_bytes=0)


def test_a_parquet_without_text_names_its_columns(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r'no column "text" among \[\'body\'\]'):
        load_corpus(tmp_path / "e.parquet")


def test_without_the_extra_its_name_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dsv3-book\[data\]'"):
        load_corpus(tmp_path / "e.parquet")
    for source in ("hf:someone/texts", "someone/texts", "texts"):
        with pytest.raises(ModuleNotFoundError, match=r"texts' is neither a file nor a folder here.*\[data\]"):
            load_corpus(source)


class FakeHub:
    """Stands in for the package `datasets`, which needs a network."""

    asked: tuple = ()

    @classmethod
    def load_dataset(cls, name, config, *, split, streaming):
        cls.asked = (name, config, split, streaming)
        if name == "gone":
            raise ConnectionError("no network")
        return ({"text": f"row {number} of {name}"} for number in range(10**9))


def test_a_hub_data_set_is_streamed_up_to_max_bytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub)
    corpus = load_corpus("hf:someone/texts:en", max_bytes=1000)
    assert FakeHub.asked == ("someone/texts", "en", "train", True)
    assert 1000 <= corpus.bytes < 1100
    with pytest.raises(FileNotFoundError, match=r"'gone' is neither a file.*ConnectionError: no network"):
        load_corpus("gone")


@settings(max_examples=30, deadline=None)
@given(
    texts=st.sets(st.text(min_size=1).filter(str.strip), min_size=2, max_size=40),
    more=st.sets(st.text(min_size=1).filter(str.strip), max_size=40),
)
def test_the_split_is_stable_when_documents_are_added(tmp_path_factory, texts, more):
    base = tmp_path_factory.mktemp("split")
    small, large = base / "small.jsonl", base / "large.jsonl"
    small.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(texts)))
    large.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(texts | more, reverse=True)))
    before, after = load_corpus(small, held_out=0.3), load_corpus(large, held_out=0.3)
    assert before.train and before.held_out and after.train and after.held_out
    assert {doc.text for doc in before.train} | {doc.text for doc in before.held_out} == texts
    assert not {doc.text for doc in after.train} & {doc.text for doc in after.held_out}
    side = {doc.text: False for doc in after.train} | {doc.text: True for doc in after.held_out}
    for text in texts:
        drawn = Document.of("", text).draw < 0.3
        assert side[text] == drawn or len(after.held_out) == 1 or len(after.train) == 1


def test_about_the_asked_share_is_held_out():
    draws = [Document.of("", f"document {number}").draw < 0.05 for number in range(4000)]
    assert 0.04 < sum(draws) / len(draws) < 0.06


def test_one_document_is_cut(tmp_path):
    (tmp_path / "book.txt").write_text("äbcdefghij" * 100)
    corpus = load_corpus(tmp_path / "book.txt", held_out=0.1)
    assert corpus.train[0].text + corpus.held_out[0].text == "äbcdefghij" * 100
    assert len(corpus.held_out[0].text) == 100


def test_text_is_never_executed(tmp_path):
    flag = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    (tmp_path / "evil.jsonl").write_text(json.dumps({"text": f"__import__('os').mkdir({str(flag)!r})"}))
    load_corpus(tmp_path)
    assert not flag.exists()


def test_importing_data_brings_no_heavy_extras():
    code = "import sys, dsv3_book.data; print({'pyarrow', 'datasets', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
