"""`prepare`: from sources of text to a `Dataset` that a trainer reads, with everything slow kept in a cache."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dsv3_book.data.augment import Augmenter
from dsv3_book.data.cache import cache_folder, cached, key_of
from dsv3_book.data.corpus import HELD_OUT, Corpus, Document, load_corpus
from dsv3_book.data.packing import PackedTokens
from dsv3_book.data.progress import progress_bar
from dsv3_book.data.sharded import folder_in, open_shards
from dsv3_book.data.tokenizer import Tokenizer

VERSION = 1  # raise it when the same inputs would give other tokens: old cache folders are then no longer found
CHUNK = 64  # documents encoded at a time: enough to keep all cores busy, little enough to show progress


class EvalBatch(NamedTuple):
    """One batch of held-out windows.

    tokens: int64 [b, t + 1 + extra].  predicted: how many tokens the main model predicts in it (b·t).  bytes: how many
    bytes of text those predicted tokens stand for.
    """

    tokens: Tensor
    predicted: int
    bytes: int


@dataclass
class Dataset:
    """What a run trains on and is measured by.

    train, val: packed tokens.  tokenizer: theirs.  corpus: the documents (held-out text included) and what was skipped.
    fingerprint: hash of documents, tokenizer and settings; equal on all processes of a run, and on a resume.
    """

    train: PackedTokens
    val: PackedTokens
    tokenizer: Tokenizer
    corpus: Corpus = field(repr=False)
    fingerprint: str

    @property
    def val_bytes(self) -> int:
        """Bytes of all held-out documents: the bytes that the tokens of `val` stand for, bos and eos standing for
        none.
        """
        return self.corpus.held_out_bytes

    @cached_property
    def val_xz_bits_per_byte(self) -> float | None:
        """`Corpus.xz_bits_per_byte`, computed once: what bits per byte are held against. None where it isn't known."""
        return self.corpus.xz_bits_per_byte()

    def evaluation(self, B: int, T: int, extra: int = 0, max_windows: int | None = None) -> Iterator[EvalBatch]:
        """Held-out windows, in order, such that every token but the first is predicted exactly once.

        Window j predicts tokens jT+1 … jT+T from the tokens jT … of the same window. The very first token is the first
        document's bos, which stands for no bytes; so the bytes of all batches add up to `val_bytes`, and bits per byte
        is the sum of all losses in bits over that, the cost of predicting every eos and bos included.
        B: windows in a batch; the last, shorter window comes alone.  T: predicted tokens in a window.  extra: further
        tokens at the end (the MTP depth J); past the end of the text the last token is repeated there, so only the main
        loss counts. max_windows: only so many windows, evenly spread: a quicker estimate, whose `bytes` are those
        windows' own.
        """
        if B < 1 or T < 1:
            raise ValueError(f"batches of {B} windows of {T} tokens: both must be at least 1")
        starts = np.arange(0, len(self.val) - 1, T)
        if max_windows is not None and max_windows < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, max_windows).round().astype(np.int64)]
        whole, last = starts[starts + T < len(self.val)], starts[starts + T >= len(self.val)]
        for chunk in [whole[i : i + B] for i in range(0, len(whole), B)] + [last] * len(last):
            t = min(T, len(self.val) - 1 - int(chunk[0]))
            tokens = self.val.at(chunk, t + 1 + extra)
            size = int(self.tokenizer.byte_lengths[tokens[:, 1 : t + 1].numpy()].sum())
            yield EvalBatch(tokens, tokens.shape[0] * t, size)


def prepare(
    sources: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    vocab_size: int = 4096,
    *,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    style: str = "v3",
    cache_dir: str | os.PathLike | None = None,
    seed: int = 0,
    fim_rate: float = 0.1,
    newline_split_rate: float = 0.05,
    document_seed: int = 0,
    held_out: float = HELD_OUT,
    max_bytes: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Read, tokenise and pack a corpus, or find it in the cache.

    sources, held_out, max_bytes: as in `load_corpus`; None is the Python standard library. Or a folder of token shards
        (`shards:DIR`, see `shards`), which is opened as it is: what was held out, and how, was decided when they were
        written, so held_out, max_bytes, vocab_size and style are not used then.
    vocab_size, style: of the tokenizer to train (on the training documents only); not used if `tokenizer` is given.
    tokenizer: one to use, or the path of a `tokenizer.json`, ours or a released one.
    cache_dir: else $DSV3_BOOK_CACHE, else ~/.cache/dsv3_book.
    seed: of the order of sequences; it changes nothing on disk.
    fim_rate (report: 0.1), newline_split_rate (our choice; the report gives no number), document_seed: what is done to
        training documents, see `augment`. Held-out documents stay as they are.
    progress: show bars on standard error.

    Every process of a run may call this: one builds, the others wait for it. Raises ValueError and FileNotFoundError
    with the thing, the value and the remedy.
    """
    if (shards := folder_in(sources)) is not None:
        return _opened(shards, tokenizer, fim_rate, seed)
    corpus = load_corpus(sources, held_out=held_out, max_bytes=max_bytes, progress=progress)
    folder = cache_folder(cache_dir)
    train_digest = _digest(corpus.train)
    if tokenizer is None:
        tokenizer = _trained(corpus, train_digest, vocab_size, style, folder, progress)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    plain = Augmenter(tokenizer)
    augmented = Augmenter(tokenizer, fim_rate, newline_split_rate, document_seed)
    fingerprint = key_of(
        {
            "version": VERSION,
            "train": train_digest,
            "held_out": _digest(corpus.held_out),
            "tokenizer": tokenizer.spec,
            "fim_rate": fim_rate,
            "newline_split_rate": newline_split_rate,
            "document_seed": document_seed,
        }
    )

    def build(work: Path) -> None:
        with progress_bar("tokenising", len(corpus.train) + len(corpus.held_out), progress) as advance:

            def rows(documents: list[Document], augmenter: Augmenter) -> Iterator[list[int]]:
                for start in range(0, len(documents), CHUNK):
                    chunk = documents[start : start + CHUNK]
                    yield from augmenter.encode_batch(chunk)
                    advance(len(chunk))

            PackedTokens.write(work / "train.bin", rows(corpus.train, augmented), tokenizer.vocab_size)
            PackedTokens.write(work / "val.bin", rows(corpus.held_out, plain), tokenizer.vocab_size)

    def load(place: Path) -> tuple[PackedTokens, PackedTokens]:
        return PackedTokens.open(place / "train.bin", seed), PackedTokens.open(place / "val.bin", seed)

    train, val = cached(f"tokens-{fingerprint}", folder, build, load)
    return Dataset(train, val, tokenizer, corpus, fingerprint)


def _opened(folder: Path, tokenizer: Tokenizer | str | os.PathLike | None, fim_rate: float, seed: int) -> Dataset:
    """A folder of shards, if it is what these settings would make of its text."""
    train, val, theirs, corpus, fingerprint = open_shards(folder, seed)
    if tokenizer is not None:
        mine = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
        if mine.spec != theirs.spec:
            raise ValueError(f"the shards in {folder} were written with another tokenizer: name none, theirs is used")
    if (rate := corpus.index["settings"]["fim_rate"]) != fim_rate:
        raise ValueError(
            f"the shards in {folder} were written with fim_rate {rate}, not {fim_rate}: give {rate}, or write them anew"
        )
    return Dataset(train, val, theirs, corpus, fingerprint)


def _trained(corpus: Corpus, digest: str, vocab_size: int, style: str, folder: Path, progress: bool) -> Tokenizer:
    def build(work: Path) -> None:
        with progress_bar(f"training a tokenizer of {vocab_size}", None, progress):
            Tokenizer.train((doc.text for doc in corpus.train), vocab_size, style).save(work)

    key = key_of({"version": VERSION, "documents": digest, "vocab_size": vocab_size, "style": style})
    return cached(f"tokenizer-{key}", folder, build, Tokenizer.load)


def _digest(documents: list[Document]) -> str:
    return key_of({"documents": [doc.digest.hex() for doc in documents]})
