"""`prepare`: the same data every time, from cache or not, in one process or several; honest bytes under the loss."""

import contextlib
import lzma
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_book.data import Dataset, PackedTokens, Tokenizer, dataset, prepare
from dsv3_book.data import cache as cache_module
from dsv3_book.data.corpus import stdlib_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Thirty files of the standard library, about half a megabyte."""
    folder = tmp_path_factory.mktemp("texts")
    for path in stdlib_files()[:150:5]:
        shutil.copyfile(path, folder / f"{path.parent.name}-{path.name}")
    return folder


def prepared(folder: Path, cache: Path, **settings) -> Dataset:
    return prepare(folder, 500, cache_dir=cache, progress=False, **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ready(folder, cache) -> Dataset:
    return prepared(folder, cache)


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """The names of shards that are written, and "tokenizer" for each one trained."""
    log: list[str] = []
    write, train = PackedTokens.write, Tokenizer.train

    def logged_write(path, rows, vocab_size):
        log.append(Path(path).name)
        return write(path, rows, vocab_size)

    def logged_train(*args):
        log.append("tokenizer")
        return train(*args)

    monkeypatch.setattr(PackedTokens, "write", staticmethod(logged_write))
    monkeypatch.setattr(Tokenizer, "train", staticmethod(logged_train))
    return log


def same(one: Dataset, two: Dataset) -> bool:
    shards = zip((one.train, one.val), (two.train, two.val))
    equal = all(np.array_equal(a.tokens, b.tokens) for a, b in shards)
    return equal and one.fingerprint == two.fingerprint and one.tokenizer.spec == two.tokenizer.spec


def test_tokens_are_the_documents(ready):
    text = ready.tokenizer.decode(ready.val.tokens.tolist(), specials=True)
    expected = [f"<｜begin▁of▁sentence｜>{doc.text}<｜end▁of▁sentence｜>" for doc in ready.corpus.held_out]
    assert text == "".join(expected)
    lengths = ready.tokenizer.byte_lengths
    assert lengths[ready.train.tokens].sum() == ready.corpus.train_bytes
    filled = int((ready.train.tokens == ready.tokenizer.fim_ids[0]).sum())
    assert 0 < filled < 0.3 * len(ready.corpus.train)
    assert ready.train.tokens.dtype == np.uint16


def test_a_second_call_builds_nothing(ready, folder, cache, builds):
    assert same(prepared(folder, cache), ready) and builds == []


def test_a_cache_made_anew_is_the_same(ready, folder, tmp_path):
    assert same(prepared(folder, tmp_path), ready)


def test_what_changes_the_tokens_changes_the_cache(ready, folder, cache, builds):
    for settings in ({"fim_rate": 0.5}, {"document_seed": 1}, {"newline_split_rate": 0.5}):
        other = prepared(folder, cache, **settings)
        assert other.fingerprint != ready.fingerprint
        assert np.array_equal(other.val.tokens, ready.val.tokens)
    assert builds == ["train.bin", "val.bin"] * 3  # and the tokenizer is not trained again
    del builds[:]
    assert prepared(folder, cache, style="code").fingerprint != ready.fingerprint
    assert builds == ["tokenizer", "train.bin", "val.bin"]
    seeded = prepared(folder, cache, seed=5)
    assert same(seeded, ready)  # the order's seed touches nothing on disk
    assert not torch.equal(seeded.train.sequences(0, 8, 33, 32), ready.train.sequences(0, 8, 33, 32))


@pytest.mark.parametrize("victim", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_cache_is_built_again(ready, folder, cache, tmp_path, builds, victim, damage):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    kind = "tokenizer" if victim == "tokenizer.json" else "tokens"
    paths = [
        path for path in copy.glob(f"{kind}-*/{victim}") if kind == "tokenizer" or ready.fingerprint in path.parent.name
    ]
    for path in paths:
        raw = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(raw[:-20] if damage == "cut" else b"\xff" + raw[1:])
    assert paths and same(prepared(folder, copy), ready)
    assert builds == (["tokenizer"] if kind == "tokenizer" else ["train.bin", "val.bin"])
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_a_build_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset.Augmenter, "encode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, tmp_path)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir() if path.is_dir()} == {"tokenizer"}
    assert len(prepared(folder, tmp_path).train)


def _prepare_in_process(folder: Path, cache: Path) -> tuple[str, int]:
    built: list[str] = []
    write = PackedTokens.write
    PackedTokens.write = staticmethod(lambda path, rows, size: built.append(path.name) or write(path, rows, size))
    return prepared(folder, cache).fingerprint, len(built)


@pytest.mark.distributed
def test_processes_share_one_build(ready, folder, tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_prepare_in_process, [(folder, tmp_path)] * 2, chunksize=1)
    assert {fingerprint for fingerprint, _ in results} == {ready.fingerprint}
    assert sorted(built for _, built in results) == [0, 2]


@pytest.mark.parametrize(("B", "T", "extra"), [(4, 64, 0), (3, 100, 1), (1, 7, 2), (2, 10**6, 1), (2, "all", 1)])
def test_evaluation_predicts_every_token_but_the_first_once(ready, B, T, extra):
    T = len(ready.val) if T == "all" else T  # the last window then ends exactly one token too late
    seen, size, predicted = [], 0, 0
    for batch in ready.evaluation(B, T, extra):
        t = batch.tokens.shape[1] - 1 - extra
        assert batch.tokens.shape[0] <= B and 1 <= t <= T
        seen += batch.tokens[:, 1 : t + 1].flatten().tolist()
        size, predicted = size + batch.bytes, predicted + batch.predicted
    assert seen == ready.val.tokens[1:].tolist() and predicted == len(seen)
    assert size == ready.val_bytes == sum(len(doc.text.encode()) for doc in ready.corpus.held_out)


def test_a_short_evaluation_counts_its_own_bytes(ready):
    batches = list(ready.evaluation(4, 32, 1, max_windows=10))
    assert sum(len(batch.tokens) for batch in batches) == 10
    for batch in batches:
        targets = batch.tokens[:, 1:-1]
        assert batch.bytes == len(ready.tokenizer.decode_bytes(targets.flatten().tolist()))
    with pytest.raises(ValueError, match="at least 1"):
        next(ready.evaluation(0, 32))


def test_xz_is_given_all_held_out_text_at_once(ready):
    text = "".join(doc.text for doc in ready.corpus.held_out).encode()
    assert ready.val_xz_bits_per_byte == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert 0.5 < ready.val_xz_bits_per_byte < 4


def test_a_given_tokenizer_is_used(ready, folder, tmp_path, builds):
    path = ready.tokenizer.save(tmp_path)
    for given in (ready.tokenizer, path, str(tmp_path)):
        assert same(prepared(folder, tmp_path, tokenizer=given), ready)
    assert builds == ["train.bin", "val.bin"]
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        prepared(folder, tmp_path, tokenizer=tmp_path / "none.json")


def test_the_cache_folder_is_found_and_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_BOOK_CACHE", str(tmp_path / "from" / "environment"))
    prepare(sorted(folder.iterdir())[:3], 300, progress=False)
    assert list((tmp_path / "from" / "environment").glob("tokens-*/train.bin"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't make the cache folder .*DSV3_BOOK_CACHE"):
        prepared(folder, tmp_path / "file" / "below")


def test_progress_is_told_where_there_is_no_terminal(folder, tmp_path, capfd):
    prepare(sorted(folder.iterdir())[:3], 500, cache_dir=tmp_path)
    assert capfd.readouterr().err.splitlines() == ["reading ...", "training a tokenizer of 500 ...", "tokenising ..."]


def test_a_corpus_shorter_than_a_window_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("a short text")
    data = prepare(tmp_path / "a.txt", 300, cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="but one training sequence needs 258: give more text"):
        data.train.sequences(0, 1, 258, 256)
    assert sum(batch.bytes for batch in data.evaluation(1, 256)) == data.val_bytes


def test_without_working_locks_every_process_still_gets_whole_data(ready, folder, tmp_path, monkeypatch):
    """Another process builds the same thing in the middle of our build, as on a disk whose locks don't work."""
    monkeypatch.setattr(cache_module, "FileLock", lambda path: contextlib.nullcontext())
    encode, others = dataset.Augmenter.encode_batch, []

    def interrupted(self, documents):
        if not others:
            others.append(None)
            others[0] = prepared(folder, tmp_path)
        return encode(self, documents)

    monkeypatch.setattr(dataset.Augmenter, "encode_batch", interrupted)
    assert same(prepared(folder, tmp_path), ready) and same(others[0], ready)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_killed_build_left_is_swept_up_after_a_day(ready, folder, cache):
    old, young = (cache / f".tokens-{ready.fingerprint}-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    prepared(folder, cache)
    assert not old.exists() and young.exists()
    young.rmdir()
