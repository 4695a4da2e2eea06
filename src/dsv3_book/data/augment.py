"""What V3's recipe does to a training document before packing (report §4.1): Fill-in-Middle, and line ends cut loose.

Both are random, but drawn from the document's bytes and a seed, never from a shared generator: a document is treated
alike whatever stands before it, on whatever process, in whatever order.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from dsv3_book.data.corpus import Document
from dsv3_book.data.tokenizer import Tokenizer


def draws(document: Document, seed: int, purpose: str) -> tuple[int, int, int]:
    """Three independent 64-bit numbers that depend on the document's bytes, the seed and the purpose alone."""
    key = hashlib.blake2b(document.digest + f"{purpose}:{seed}".encode(), digest_size=24).digest()
    first, second, third = (int.from_bytes(key[i : i + 8], "big") for i in (0, 8, 16))
    return first, second, third


def fim_parts(document: Document, rate: float, seed: int) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) for a document that is drawn for Fill-in-Middle, else None.

    rate: the fraction of documents drawn; the report's is 0.1. The two cuts fall anywhere between characters, each
    place equally likely, so a part may be empty; prefix + middle + suffix is the document.
    """
    drawn, one, two = draws(document, seed, "fim")
    if drawn / 2**64 >= rate:
        return None
    text = document.text
    start, end = sorted((one % (len(text) + 1), two % (len(text) + 1)))
    return text[:start], text[start:end], text[end:]


def frame_fim(tokenizer: Tokenizer, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """Prefix-suffix-middle order: begin, prefix, hole, suffix, end, middle (report §4.1). The middle comes last, so a
    left-to-right model learns to write it knowing both sides. ValueError if the tokenizer has no such tokens."""
    if tokenizer.fim_ids is None:
        raise ValueError("this tokenizer has no Fill-in-Middle tokens: set fim_rate to 0, or use one that has them")
    begin, hole, end = tokenizer.fim_ids
    return [begin, *prefix, hole, *suffix, end, *middle]


class NewlineSplitter:
    """Cuts some tokens that are marks *and* line ends, like `):\\n`, in two: `):` and `\\n`.

    Without it the model would never see `):` followed by a line end, since the two always come as one token; a prompt
    that stops after `):` would then look like a line that goes on. The report splits a certain share of such tokens; it
    does not say how large a share.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.pieces: dict[int, list[int]] = {}
        for index in range(tokenizer.vocab_size):
            try:
                text = tokenizer.decode_bytes([index]).decode("utf-8")
            except UnicodeDecodeError:
                continue  # a part of a character: no line end in it
            mark = text.rstrip(" \t\r\n")
            if mark.strip() and not mark[-1].isalnum() and set(text[len(mark) :]) & {"\r", "\n"}:
                self.pieces[index] = tokenizer.encode(mark) + tokenizer.encode(text[len(mark) :])
        self.combined = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.combined[list(self.pieces)] = True

    def __call__(self, ids: Sequence[int], rate: float, seed: int) -> list[int]:
        """`ids` with each combined token split with probability `rate`; the bytes they stand for stay the same."""
        row = np.asarray(ids, dtype=np.int64)
        places = np.flatnonzero(self.combined[row])
        places = places[np.random.Generator(np.random.Philox(seed)).random(len(places)) < rate]
        out, last = [], 0
        for place in places.tolist():
            out += [*ids[last:place], *self.pieces[ids[place]]]
            last = place + 1
        return [*out, *ids[last:]]


class Augmenter:
    """Documents to token ids: bos, the text, eos; for training, some documents filled in and some line ends split.

    Every document begins with bos, as the released tokenizer's texts do, and ends with eos; so a model asked to write
    from nothing but bos writes a document's beginning. A filled-in document is bos, begin, prefix, hole, suffix, end,
    middle, eos.
    """

    def __init__(self, tokenizer: Tokenizer, fim_rate: float = 0.0, newline_split_rate: float = 0.0, seed: int = 0):
        for name, rate in (("fim_rate", fim_rate), ("newline_split_rate", newline_split_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} is {rate}: it is a fraction, between 0 and 1")
        if fim_rate and tokenizer.fim_ids is None:
            raise ValueError(f"fim_rate is {fim_rate}, but this tokenizer has no Fill-in-Middle tokens: set it to 0")
        self.tokenizer, self.seed = tokenizer, seed
        self.fim_rate, self.newline_split_rate = fim_rate, newline_split_rate
        self.splitter = NewlineSplitter(tokenizer) if newline_split_rate else None

    def encode_batch(self, documents: Sequence[Document]) -> list[list[int]]:
        """The token ids of each document; the texts are encoded together, on all cores."""
        split = [fim_parts(doc, self.fim_rate, self.seed) for doc in documents]
        texts = [text for doc, parts in zip(documents, split) for text in (parts or (doc.text,))]
        encoded = iter(self.tokenizer.encode_batch(texts))
        rows = []
        for doc, parts in zip(documents, split):
            pieces = [next(encoded) for _ in (parts or (doc.text,))]
            if self.splitter is not None:
                seeds = draws(doc, self.seed, "newline")
                pieces = [self.splitter(ids, self.newline_split_rate, key) for ids, key in zip(pieces, seeds)]
            if parts:
                prefix, middle, suffix = pieces
                pieces = [frame_fim(self.tokenizer, prefix, middle, suffix)]
            rows.append([self.tokenizer.bos_id, *pieces[0], self.tokenizer.eos_id])
        return rows
