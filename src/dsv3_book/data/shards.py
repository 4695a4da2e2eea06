"""`python -m dsv3_book.data.shards`: a large corpus, read once and kept as token shards that every run opens at once.

    python -m dsv3_book.data.shards --dataset hf:NAME[:CONFIG] --tokenizer tokenizer.json --out DIR
    python -m dsv3_book.data.shards --check DIR          # after copying it: is every byte what was written?

A data set of the Hugging Face hub is streamed, never kept whole; files, folders and globs are read as `load_corpus`
reads them. A shard is complete when the index names it, which happens in one rename: killed at any moment, the same
command goes on after the last whole shard. `sharded` says what lies in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dsv3_book.data.augment import Augmenter
from dsv3_book.data.corpus import Document
from dsv3_book.data.packing import PackedTokens
from dsv3_book.data.progress import progress_bar
from dsv3_book.data.readers import Skip, expand, read_hub, read_source
from dsv3_book.data.sharded import FORMAT, INDEX, read_index, verify
from dsv3_book.data.tokenizer import Tokenizer
from dsv3_book.disk import sha256, write_text

CHUNK = 64  # documents encoded at a time
XZ_LIMIT = 64 << 20  # bytes of held-out text that xz is tried on: its dictionary; more would take many minutes


@dataclass(frozen=True)
class Settings:
    """What decides every byte of the shards.

    dataset: files, folders, globs, or data sets of the hub (`hf:NAME`, `hf:NAME:CONFIG`).  split: of a hub data set.
    text_field: where a row keeps its text.  held_out: share of documents kept for validation, chosen by the hash of
    their bytes.  fim_rate, newline_split_rate: as in `prepare`.  shard_tokens: a shard ends with the document that
    reaches so many.  max_documents: stop after so many have been read.
    """

    dataset: tuple[str, ...]
    split: str = "train"
    text_field: str = "text"
    held_out: float = 0.001
    fim_rate: float = 0.1
    newline_split_rate: float = 0.05
    shard_tokens: int = 100_000_000
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: it is the share of documents to hold out, between 0 and 1")
        for name in ("shard_tokens", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")


class Read(NamedTuple):
    """One document of the source. `row`: its tokens, if it is trained on.  `held`: its text, if it is held out."""

    mark: str  # a hash of what was read
    size: int  # UTF-8 bytes
    row: list[int] | None = None
    held: str | None = None


def write(settings: Settings, tokenizer: Tokenizer, out: Path, progress: bool = True) -> dict[str, Any]:
    """Writes the shards, or what is missing of them, into `out`; returns the index.

    Raises:
        ValueError: `out` holds shards made with other settings, another tokenizer or from other text, or somebody is
            writing there; no document to train on, or none held out; a line without text.
        FileNotFoundError: no such path or data set.  ModuleNotFoundError: the extra `data` is missing.
    """
    made_with = {"settings": json.loads(json.dumps(asdict(settings))), "tokenizer": _hash(tokenizer.spec)}
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is writing shards into {out}: wait for it, or name another --out") from None
    with lock:
        index = _begin(out, made_with)
        if index["complete"]:
            return index
        tokenizer.save(out)
        augmenter = Augmenter(tokenizer, settings.fim_rate, settings.newline_split_rate)
        done = sum(shard["read"] for shard in index["shards"])
        last = index["shards"][-1]["last"] if done else None
        with progress_bar("tokenising", settings.max_documents, progress) as advance:
            advance(done)
            reads = _reads(settings, augmenter, done, last)
            while shard := _shard(out, len(index["shards"]), reads, settings.shard_tokens, tokenizer.vocab_size):
                index["shards"].append(shard)
                _save(out, index)
                advance(shard["read"])
        return _finish(out, index, tokenizer)


def _begin(out: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """The index so far. (What a killed run left beside it is written over.)"""
    if not (out / INDEX).exists():
        if strange := [p.name for p in out.iterdir() if not p.name.startswith(".") and p.name != "tokenizer.json"]:
            raise ValueError(f"{out} is no folder of shards, and not empty ({strange[0]} …): name another --out")
        index = {"format": FORMAT, **made_with, "complete": False, "shards": []}
        _save(out, index)
        return index
    index = read_index(out)
    for key, name in (("settings", "settings"), ("tokenizer", "tokenizer")):
        if index[key] != made_with[key]:
            raise ValueError(
                f"{out} holds shards made with another {name}: {index[key]}, not {made_with[key]}. Give what it was "
                "begun with, or name another --out"
            )
    return index


def _reads(settings: Settings, augmenter: Augmenter, done: int, last: str | None) -> Iterator[Read]:
    """The documents of the source after the first `done`, in order, tokenised a chunk at a time."""
    texts = _texts(settings, max(0, done - 1))
    if done and next((_mark(text) for _, text in texts), None) != last:
        raise ValueError(
            f"document {done - 1} of {' '.join(settings.dataset)} isn't the one that was read last: the data has "
            "changed since the first shards were written. Write all of them anew into another --out"
        )
    left = None if settings.max_documents is None else settings.max_documents - done
    texts = islice(texts, left)
    while chunk := [text for _, text in islice(texts, CHUNK)]:
        documents = [_document(text) for text in chunk]
        train = [doc for doc in documents if doc is not None and doc.draw >= settings.held_out]
        rows = iter(augmenter.encode_batch(train))
        for text, doc in zip(chunk, documents, strict=True):
            if doc is None:
                yield Read(_mark(text), 0)
            elif doc.draw < settings.held_out:
                yield Read(_mark(text), doc.size, held=doc.text)
            else:
                yield Read(_mark(text), doc.size, row=next(rows))


def _texts(settings: Settings, skip: int) -> Iterator[tuple[str, str | Skip]]:
    """(name, text) of every document but the first `skip`. A hub data set may know a quick way to skip."""
    files = [item for source in settings.dataset for item in expand(source)]
    split, field = settings.split, settings.text_field
    if len(files) == 1 and files[0][1] is None:
        yield from read_hub(files[0][0], split, field, skip)
        return
    every = (
        document
        for name, path in files
        for document in (read_hub(name, split, field) if path is None else read_source(name, path, field))
    )
    yield from islice(every, skip, None)


def _document(text: str | Skip) -> Document | None:
    """None for what is no text, or empty."""
    if isinstance(text, Skip) or not text.strip():
        return None
    try:
        return Document.of("", text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def _shard(out: Path, number: int, reads: Iterator[Read], limit: int, vocab_size: int) -> dict[str, Any] | None:
    """Writes the next shard and the held-out text met on the way; returns its entry, None at the end of the source."""
    count: Counter[str] = Counter()
    held: list[str] = []
    last = ""

    def rows() -> Iterator[list[int]]:
        nonlocal last
        for read in reads:
            count["read"] += 1
            last = read.mark
            if read.held is not None:
                held.append(read.held)
                count["held_bytes"] += read.size
            if read.row is None:
                continue
            count["documents"] += 1
            count["bytes"] += read.size
            count["tokens"] += len(read.row)
            yield read.row
            if count["tokens"] >= limit:
                return

    tokens, text = out / f"train-{number:05}.bin", out / f"held-out-{number:05}.jsonl"
    PackedTokens.write(_work(tokens), rows(), vocab_size)
    if not count["read"]:
        _work(tokens).unlink()
        return None
    write_text(_work(text), "".join(json.dumps({"text": one}) + "\n" for one in held))
    for path in (tokens, text):
        os.replace(_work(path), path)
    return {
        "file": tokens.name,
        "tokens": count["tokens"],
        "documents": count["documents"],
        "bytes": count["bytes"],
        "sha256": sha256(tokens),
        "read": count["read"],
        "left": count["read"] - count["documents"] - len(held),
        "last": last,
        "held_out": {
            "file": text.name,
            "documents": len(held),
            "bytes": count["held_bytes"],
            "sha256": sha256(text),
        },
    }


def _finish(out: Path, index: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenises the held-out text, which makes the folder complete."""
    shards = index["shards"]
    train, held = (sum(get(s) for s in shards) for get in (lambda s: s["tokens"], lambda s: s["held_out"]["documents"]))
    if not train or not held:
        what = "to train on" if not train else "held out"
        change = "raise" if train else "lower"
        raise ValueError(
            f"of {sum(s['read'] for s in shards):,} documents none is {what}: give more text, or {change} --held-out "
            f"(and remove {out}, or name another --out)"
        )

    def texts() -> Iterator[str]:
        for shard in shards:
            with (out / shard["held_out"]["file"]).open(encoding="utf-8") as file:
                yield from (json.loads(line)["text"] for line in file)

    def rows() -> Iterator[list[int]]:
        plain, left = Augmenter(tokenizer), texts()
        while chunk := [Document.of("", text) for text in islice(left, CHUNK)]:
            yield from plain.encode_batch(chunk)

    val = out / "val.bin"
    count = PackedTokens.write(_work(val), rows(), tokenizer.vocab_size)
    os.replace(_work(val), val)
    size = sum(shard["held_out"]["bytes"] for shard in shards)
    ratio = None
    if size <= XZ_LIMIT:
        whole = b"".join(text.encode("utf-8") for text in texts())
        ratio = 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / size
    index |= {"val": {"file": val.name, "tokens": count, "sha256": sha256(val)}, "xz_bits_per_byte": ratio}
    index["complete"] = True
    _save(out, index)
    return index


def _work(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.part")


def _save(out: Path, index: dict[str, Any]) -> None:
    write_text(_work(out / INDEX), json.dumps(index, indent=1))
    os.replace(_work(out / INDEX), out / INDEX)


def _mark(text: str | Skip) -> str:
    return _hash(text.reason if isinstance(text, Skip) else text)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser("python -m dsv3_book.data.shards", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--check", type=Path, metavar="DIR", help="only compare a folder's files with its index")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="files, folders, globs, or hf:NAME[:CONFIG]")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, ours or a released one")
    parser.add_argument("--out", type=Path, help="the folder of shards")
    default = Settings(())
    parser.add_argument("--split", default=default.split, help="of a hub data set (%(default)s)")
    parser.add_argument("--text-field", default=default.text_field, help="where a row keeps its text (%(default)s)")
    for name in ("held_out", "fim_rate", "newline_split_rate"):
        flag, value = f"--{name.replace('_', '-')}", getattr(default, name)
        parser.add_argument(flag, type=float, default=value, help="share, between 0 and 1 (%(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=default.shard_tokens, help="(%(default)s)")
    parser.add_argument("--max-documents", type=int, help="read no more than so many")
    given = vars(parser.parse_args(argv))
    folder, source, path, out = (given.pop(name) for name in ("check", "dataset", "tokenizer", "out"))
    try:
        if folder is not None:
            print(f"{folder} is as it was written: {verify(folder):,} bytes")
            return 0
        if not (source and path and out):
            parser.error("--dataset, --tokenizer and --out are needed (or --check DIR)")
        index = write(Settings(tuple(source), **given), Tokenizer.load(path), out)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shards = index["shards"]
    print(
        f"{out}: {sum(s['tokens'] for s in shards):,} tokens in {len(shards)} shard(s). Train with --data shards:{out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
