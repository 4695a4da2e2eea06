"""Token shards: written once, killed and gone on with, opened as one long array.

The package `datasets` needs a network to be of use: a stand-in with its streaming interface (load_dataset, skip,
iteration) takes its place here.
"""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainkit import lines

from dsv3_book.data import Document, PackedTokens, Tokenizer, prepare, sharded, shards
from dsv3_book.data.corpus import stdlib_files
from dsv3_book.data.sharded import CorruptShard, ShardedTokens, folder_in, open_shards, verify
from dsv3_book.data.shards import Settings, main, write

TEXTS = [path.read_text(encoding="utf-8", errors="ignore")[:3000] for path in stdlib_files()[:220:2]]
TEXTS = [text for text in TEXTS if text.strip()][:90]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ninety documents under "body", one more empty."""
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS[:50], "", *TEXTS[50:]]))
    return path


def settings(source: Path, **changes: Any) -> Settings:
    return Settings(
        **{"dataset": (str(source),), "text_field": "body", "held_out": 0.1, "shard_tokens": 5000, **changes}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(source, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write(settings(source), tokenizer, folder, progress=False)
    return folder


def test_every_document_is_there_once(whole, source, tokenizer):
    index = sharded.read_index(whole)
    train = [t for t in TEXTS if Document.of("", t).draw >= 0.1]
    held = [t for t in TEXTS if Document.of("", t).draw < 0.1]
    assert len(index["shards"]) > 3 and index["complete"] and train and held
    assert all(5000 <= shard["tokens"] < 9000 for shard in index["shards"][:-1])
    tokens, val, theirs, corpus, _ = open_shards(whole)
    assert theirs.spec == tokenizer.spec
    assert corpus.train_bytes == sum(len(t.encode()) for t in train)
    assert corpus.held_out_bytes == sum(len(t.encode()) for t in held)
    assert tokenizer.byte_lengths[np.concatenate([p.tokens for p in tokens.parts])].sum() == corpus.train_bytes
    assert tokenizer.decode(val.tokens.tolist()) == "".join(held)
    kept = [
        json.loads(line)["text"]
        for shard in index["shards"]
        for line in (whole / shard["held_out"]["file"]).read_text().splitlines()
    ]
    assert kept == held
    assert corpus.xz_bits_per_byte() == 8 * len(
        lzma.compress("".join(held).encode(), preset=9 | lzma.PRESET_EXTREME)
    ) / (corpus.held_out_bytes)
    assert f"{len(train)} documents in {len(index['shards'])} shard(s)" in corpus.summary()
    assert "1 empty or not text" in corpus.summary()


def test_the_tokens_are_those_of_prepare(whole, source, tokenizer, tmp_path):
    """The same documents, whether they went through shards or through the cache of one machine."""
    renamed = tmp_path / "rows.jsonl"
    renamed.write_text(source.read_text().replace('"body"', '"text"'))
    cached = prepare(renamed, tokenizer=tokenizer, held_out=0.1, cache_dir=tmp_path / "cache", progress=False)
    opened = prepare(f"shards:{whole}", progress=False)
    assert len(cached.train) == len(opened.train)
    for first in (0, 7, 10**6):
        here, there = (data.train.sequences(first, 9, 34, 32) for data in (opened, cached))
        assert torch.equal(here, there)
    assert np.array_equal(cached.val.tokens, opened.val.tokens)
    assert opened.val_bytes == cached.val_bytes
    assert opened.val_xz_bits_per_byte == cached.val_xz_bits_per_byte
    assert [b.bytes for b in opened.evaluation(4, 32)] == [b.bytes for b in cached.evaluation(4, 32)]


@pytest.mark.parametrize("sizes", [[50], [10, 40], [1, 0, 30, 19], [0, 50, 0]])
def test_the_order_does_not_know_of_files(sizes):
    flat = np.arange(50, dtype=np.uint16)
    cuts = np.cumsum(sizes)[:-1]
    parts = [PackedTokens(part, 50) for part in np.split(flat, cuts)]
    one, many = PackedTokens(flat, 50, seed=3), ShardedTokens(parts, seed=3)
    assert len(many) == 50 and many.windows(7, 3) == one.windows(7, 3)
    assert torch.equal(many.sequences(5, 60, 7, 3), one.sequences(5, 60, 7, 3))
    assert torch.equal(many.at(np.array([0, 9, 47]), 6), one.at(np.array([0, 9, 47]), 6))


class Killed(BaseException):
    """Ends the writing at a chosen moment, as a kill would."""


@pytest.mark.parametrize("moment", range(1, 40, 3))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole, source, tokenizer, tmp_path, monkeypatch, moment):
    calls = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        with pytest.raises(Killed):
            write(settings(source), tokenizer, tmp_path, progress=False)
    if (tmp_path / "shards.json").exists():
        with pytest.raises(ValueError, match="isn't finished: give the command"):
            open_shards(tmp_path)
    read: list[int] = []
    monkeypatch.setattr(shards, "_texts", _noted(shards._texts, read))
    done = sum(s["read"] for s in sharded.read_index(tmp_path)["shards"]) if (tmp_path / "shards.json").exists() else 0
    write(settings(source), tokenizer, tmp_path, progress=False)
    assert read == [max(0, done - 1)]
    left = {name: raw for name, raw in files(tmp_path).items() if not name.endswith(".part")}
    assert left == files(whole)


def _noted(function: Any, into: list[int]) -> Any:
    return lambda settings, skip: into.append(skip) or function(settings, skip)


def test_a_real_kill_too(whole, source, tokenizer, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "dsv3_book.data.shards", "--dataset", str(source), "--text-field", "body"]
    words += ["--held-out", "0.1", "--shard-tokens", "5000", "--out", str(out)]
    words += ["--tokenizer", str(tokenizer.save(tmp_path))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (out / "train-00000.bin").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Train with --data shards:{out}" in done.stdout
    assert {name: raw for name, raw in files(out).items() if not name.endswith(".part")} == files(whole)


def test_the_data_changed_since(whole, source, tokenizer, tmp_path, monkeypatch):
    changed = tmp_path / "rows.jsonl"
    changed.write_text(source.read_text())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(settings(changed, max_documents=60), tokenizer, out, progress=False)
    changed.write_text(source.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"document 59 of .* isn't the one that was read last"):
        write(settings(changed, max_documents=60), tokenizer, out, progress=False)


@pytest.mark.parametrize("change", [{"fim_rate": 0.5}, {"held_out": 0.2}, {"max_documents": 3}, {"dataset": ("x",)}])
def test_other_settings_are_refused(whole, source, tokenizer, change):
    with pytest.raises(ValueError, match="made with another settings"):
        write(settings(source, **change), tokenizer, whole, progress=False)


def test_another_tokenizer_is_refused(whole, source, tokenizer):
    other = Tokenizer.train(TEXTS[:3], 300)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        write(settings(source), other, whole, progress=False)
    with pytest.raises(ValueError, match="written with another tokenizer: name none"):
        prepare(f"shards:{whole}", tokenizer=other)
    with pytest.raises(ValueError, match=r"written with fim_rate 0\.1, not 0\.0: give 0\.1"):
        prepare(f"shards:{whole}", fim_rate=0.0)


class Stream:
    """A streamed data set of the package `datasets`."""

    def __init__(self, rows: range, skipped: list[int]):
        self.rows, self.skipped = rows, skipped

    def skip(self, n: int) -> "Stream":
        self.skipped.append(n)
        return Stream(self.rows[n:], self.skipped)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"content": f"def row_{number}(): return {number} * {number}\n" * 20} for number in self.rows)


class Hub:
    """Stands in for the package `datasets`."""

    def __init__(self, rows: int = 10**9):
        self.rows, self.asked, self.skipped = rows, [], []

    def load_dataset(self, name, config, *, split, streaming):
        self.asked.append((name, config, split, streaming))
        return Stream(range(self.rows), self.skipped)


def test_a_hub_data_set_is_streamed_and_skipped(tokenizer, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    given = Settings(
        ("hf:someone/code:py",), "validation", "content", held_out=0.2, shard_tokens=3000, max_documents=40
    )
    one = write(given, tokenizer, tmp_path / "one", progress=False)
    assert hub.asked == [("someone/code", "py", "validation", True)] and hub.skipped == []
    assert sum(shard["read"] for shard in one["shards"]) == 40
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_reads", lambda *args: islice(shards_reads(*args), 25))
        patch.setattr(shards, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(given, tokenizer, tmp_path / "two", progress=False)
    done = sum(shard["read"] for shard in sharded.read_index(tmp_path / "two")["shards"])
    assert done == 25
    two = write(given, tokenizer, tmp_path / "two", progress=False)
    assert hub.skipped == [24]
    assert sum(shard["tokens"] for shard in two["shards"]) == sum(shard["tokens"] for shard in one["shards"])
    assert two["val"] == one["val"]


shards_reads = shards._reads


def test_a_damaged_copy_is_seen(whole, tmp_path, capsys):
    def copy() -> Path:
        for name, raw in files(whole).items():
            (tmp_path / name).write_bytes(raw)
        return tmp_path

    assert verify(copy()) > 10_000
    assert main(["--check", str(tmp_path)]) == 0 and "is as it was written" in capsys.readouterr().out
    victim = tmp_path / "train-00001.bin"
    raw = victim.read_bytes()
    victim.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    open_shards(tmp_path)  # sizes are right: opening reads no more than that
    with pytest.raises(CorruptShard, match=r"train-00001\.bin isn't what was written"):
        verify(tmp_path)
    assert main(["--check", str(tmp_path)]) == 2 and "copy it again" in capsys.readouterr().err
    victim.write_bytes(raw[:-2])
    with pytest.raises(CorruptShard, match="bytes where its header says"):
        open_shards(tmp_path)
    victim.write_bytes(files(whole)["train-00002.bin"])
    with pytest.raises(CorruptShard, match=r"tokens where shards\.json says"):
        open_shards(tmp_path)
    victim.unlink()
    for look in (open_shards, verify):
        with pytest.raises(FileNotFoundError, match=r"train-00001\.bin is missing, which"):
            look(tmp_path)


def test_what_data_means(whole, tmp_path, source):
    assert folder_in(None) is None and folder_in([str(source)]) is None and folder_in("hf:someone/texts") is None
    assert folder_in([f"shards:{whole}"]) == folder_in(str(whole)) == whole
    with pytest.raises(ValueError, match="reads one such folder and nothing beside it"):
        folder_in([str(source), f"shards:{whole}"])
    with pytest.raises(FileNotFoundError, match="on several machines, each must find the folder there"):
        prepare("shards:/no/such/folder")
    for text in ("nonsense", "[]", '{"format": 99}'):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises(ValueError, match=r"has format 99|is no index of token shards"):
            prepare(tmp_path)


def test_more_held_out_text_than_xz_is_tried_on(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "XZ_LIMIT", 100)
    write(settings(source), tokenizer, tmp_path, progress=False)
    data = prepare(tmp_path, progress=False)
    assert data.val_xz_bits_per_byte is None and data.val_bytes > 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--dataset no/such.jsonl", "no such file or folder"),
        ("--dataset {source} --text-field body --held-out 0", "held_out is 0.0"),
        ("--dataset {source} --text-field body --shard-tokens 0", "shard_tokens is 0"),
        ("--dataset {source}", 'must hold its text as a string under "text"'),
        ("--dataset {source} --text-field body --held-out 1e-9", "none is held out: give more text, or raise"),
        (
            "--dataset {source} --text-field body --held-out 0.999999999",
            "none is to train on: give more text, or lower",
        ),
        ("--dataset {source} --text-field body --tokenizer no.json", "no tokenizer at no.json"),
    ],
)
def test_mistakes_are_one_line(source, tokenizer, tmp_path, capsys, more, message):
    path = tokenizer.save(tmp_path)
    words = ["--tokenizer", str(path), "--out", str(tmp_path / "out"), *more.format(source=source).split()]
    assert main(words) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_folder_of_something_else_is_left_alone(source, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no folder of shards, and not empty \(thesis\.txt"):
        write(settings(source), tokenizer, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_two_writers(source, tokenizer, tmp_path):
    with shards.FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is writing shards"):
        write(settings(source), tokenizer, tmp_path, progress=False)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_trains_on_shards(whole, tmp_path, capsys, known):
    """To the end, its report and its sample; also where what xz makes of the held-out text isn't known."""
    from dsv3_book.train.__main__ import main as train

    folder = tmp_path / "shards"
    folder.mkdir()
    for name, raw in files(whole).items():
        (folder / name).write_bytes(raw)
    index = json.loads((folder / "shards.json").read_text())
    index["xz_bits_per_byte"] = index["xz_bits_per_byte"] if known else None
    (folder / "shards.json").write_text(json.dumps(index))
    words = ["--preset", "tiny", "--steps", "2", "--model.num-hidden-layers", "2", "--batch.sequence-length", "16"]
    words += ["--model.vocab-size", "400"]
    assert train([*words, "--out", str(tmp_path / "run"), "--data", f"shards:{folder}"]) == 0
    last = lines(tmp_path / "run")[-1]
    assert last["val_xz_bits_per_byte"] == index["xz_bits_per_byte"] and last["val_bits_per_byte"] > 0
    assert "documents in" in capsys.readouterr().err
