"""A corpus too large to read anew for every run: a folder of token shards that was written once, opened in an instant.

    DIR/shards.json        the index: what was read and how, and every file's size and SHA-256
    DIR/tokenizer.json     the tokenizer                  DIR/train-00000.bin …      training tokens, of whole documents
    DIR/val.bin            held-out tokens                DIR/held-out-00000.jsonl … held-out text

`dsv3_book.data.shards` writes it. The shards count as one long array: sequence number i of a run depends on the seed
and i alone, whatever the number of files, and a window may cross from one file into the next.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_book.data.cache import key_of
from dsv3_book.data.corpus import Corpus
from dsv3_book.data.packing import CorruptShard, PackedTokens
from dsv3_book.data.tokenizer import Tokenizer
from dsv3_book.disk import sha256

INDEX, FORMAT, PREFIX = "shards.json", 1, "shards:"


class ShardedTokens(PackedTokens):
    """Several arrays of tokens as one; windows and their order are those of `PackedTokens`.

    parts: the shards, in order; all of one vocabulary.
    """

    def __init__(self, parts: list[PackedTokens], seed: int = 0):
        self.parts, self.vocab_size, self.seed = parts, parts[0].vocab_size, seed
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, starts: np.ndarray, length: int) -> Int[Tensor, "count length"]:
        """The windows that begin at `starts`, int64; past the end of the last shard its last token is repeated."""
        places = np.minimum(starts[:, None] + np.arange(length), len(self) - 1)
        shard = np.searchsorted(self.ends, places, side="right")
        out = np.empty(places.shape, dtype=np.int64)
        for number in np.unique(shard).tolist():
            here, part = shard == number, self.parts[number]
            out[here] = part.tokens[places[here] - (self.ends[number] - len(part))]
        return torch.from_numpy(out)


class ShardCorpus(Corpus):
    """What the index knows of the documents. Their texts aren't loaded: `train` and `held_out` are empty."""

    def __init__(self, index: dict[str, Any]):
        super().__init__([], [])
        self.index = index

    @property
    def train_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.index["shards"])

    @property
    def held_out_bytes(self) -> int:
        return sum(shard["held_out"]["bytes"] for shard in self.index["shards"])

    def summary(self) -> str:
        """One line for people: counts, bytes, and how many were left out."""
        shards = self.index["shards"]
        held, left = (
            sum(get(s) for s in shards) for get in (lambda s: s["held_out"]["documents"], lambda s: s["left"])
        )
        return (
            f"{sum(s['documents'] for s in shards):,} documents in {len(shards)} shard(s), "
            f"{self.train_bytes / 1e6:,.2f} MB; {held:,} held out ({self.held_out_bytes / 1e6:,.2f} MB)"
            + (f" (left out: {left:,} empty or not text)" if left else "")
        )

    def xz_bits_per_byte(self) -> float | None:
        """As computed when the shards were written; None where there was too much text for it."""
        return self.index["xz_bits_per_byte"]


def folder_in(sources: str | os.PathLike | Sequence[str | os.PathLike] | None) -> Path | None:
    """The folder of shards that `--data` names, as `shards:DIR` or as a DIR with an index; None: it names other text.

    Raises:
        ValueError: shards beside other text, or several folders of them.
    """
    if sources is None:
        return None
    listed = [os.fspath(s) for s in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    found = [s for s in listed if s.startswith(PREFIX) or Path(s, INDEX).is_file()]
    if not found:
        return None
    if len(listed) > 1:
        raise ValueError(
            f"{found[0]} is a folder of token shards: a run reads one such folder and nothing beside it, not "
            f"{' '.join(listed)}. Write all of it into one folder with python -m dsv3_book.data.shards"
        )
    return Path(found[0].removeprefix(PREFIX))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards.

    Raises:
        FileNotFoundError: there is none.  ValueError: it isn't one, or of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"no token shards at {folder} ({path} is missing): correct the path; on several machines, each must find "
            "the folder there, shared or copied"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{path} has format {index['format']}, this version of dsv3_book reads {FORMAT}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is no index of token shards; write them again into an empty folder") from None
    return index


def open_shards(folder: Path, seed: int = 0) -> tuple[ShardedTokens, PackedTokens, Tokenizer, ShardCorpus, str]:
    """Training tokens and held-out tokens, mapped into memory; the tokenizer; what is known of the documents; and a
    fingerprint of all of it.

    Sizes and headers are checked against the index; `verify` reads every byte, which takes as long as a disk does.

    Raises:
        FileNotFoundError: no index, or a file is missing.  CorruptShard (a ValueError): a file isn't what the index
            says.  ValueError: the writing isn't finished.
    """
    index = read_index(folder)
    if not index["complete"]:
        raise ValueError(
            f"{folder} holds {len(index['shards'])} shard(s) of a tokenising that isn't finished: give the command "
            "that began it once more, and it goes on"
        )
    parts = [_opened(folder, entry, seed) for entry in index["shards"]]
    val = _opened(folder, index["val"], seed)
    fingerprint = key_of({"shards": [entry["sha256"] for entry in (*index["shards"], index["val"])]})
    return ShardedTokens(parts, seed), val, Tokenizer.load(folder), ShardCorpus(index), fingerprint


def _opened(folder: Path, entry: dict[str, Any], seed: int) -> PackedTokens:
    path = folder / entry["file"]
    try:
        tokens = PackedTokens.open(path, seed, checksum=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, which {folder / INDEX} lists: copy the folder again") from None
    if len(tokens) != entry["tokens"]:
        raise CorruptShard(f"{path} holds {len(tokens):,} tokens where {INDEX} says {entry['tokens']:,}: copy it again")
    return tokens


def verify(folder: Path) -> int:
    """Reads every file that the index lists and compares its SHA-256; returns how many bytes that were.

    Raises:
        FileNotFoundError, ValueError: as `read_index`, or a file that is missing or altered, by name.
    """
    index = read_index(folder)
    entries = [entry for shard in index["shards"] for entry in (shard, shard["held_out"])]
    entries += [index["val"]] if index["complete"] else []
    size = 0
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, which {folder / INDEX} lists: copy the folder again")
        if sha256(path) != entry["sha256"]:
            raise CorruptShard(f"{path} isn't what was written (another SHA-256): copy it again")
        size += path.stat().st_size
    return size
