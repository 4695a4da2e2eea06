"""Text in: where documents come from, and which of them are held out.

A *document* is the unit that is packed, held out and filled in: one file, one line of a `.jsonl`, one row of a
`.parquet` or of a data set from the Hugging Face hub. With no source named, the corpus is the source code of the
Python standard library that runs this program: about 12 MB, on every machine, without a download.

Text is only ever data here: nothing that is read is imported, evaluated or executed.
"""

import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_book.data.progress import progress_bar
from dsv3_book.data.readers import Skip, expand, read_hub, read_source

HELD_OUT = 0.05  # our choice: one document in twenty is never trained on
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a `name` for people, its `text`, and the `digest` of its UTF-8 bytes (16 bytes, blake2b)."""

    name: str
    text: str
    digest: bytes
    size: int  # UTF-8 bytes

    @classmethod
    def of(cls, name: str, text: str) -> "Document":
        """A document from its text; UnicodeEncodeError if the text has lone surrogates, which no UTF-8 can hold."""
        raw = text.encode("utf-8")
        return cls(name, text, hashlib.blake2b(raw, digest_size=16).digest(), len(raw))

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the document's bytes only: below the held-out fraction, it is held out."""
        return int.from_bytes(self.digest[:8], "big") / 2**64


@dataclass
class Corpus:
    """Documents in a fixed order, split in two, with an account of what was left out.

    train, held_out: the documents; no text is in both (exact duplicates are dropped).
    skipped: "name: reason" of each file or row that is not UTF-8.  empty, duplicates: how many were dropped as such.
    """

    train: list[Document]
    held_out: list[Document]
    skipped: list[str] = field(default_factory=list)
    empty: int = 0
    duplicates: int = 0

    @property
    def bytes(self) -> int:
        return self.train_bytes + self.held_out_bytes

    @property
    def train_bytes(self) -> int:
        return sum(doc.size for doc in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(doc.size for doc in self.held_out)

    def summary(self) -> str:
        """One line for people: counts, bytes, and what was skipped, by name."""
        line = (
            f"{len(self.train) + len(self.held_out):,} documents, {self.bytes / 1e6:.2f} MB; "
            f"{len(self.held_out)} held out ({self.held_out_bytes / 1e6:.2f} MB)"
        )
        dropped = [f"{n} {what}" for n, what in ((self.empty, "empty"), (self.duplicates, "duplicate")) if n]
        if self.skipped:
            names = ", ".join(self.skipped[:5]) + (" ..." if len(self.skipped) > 5 else "")
            dropped.append(f"{len(self.skipped)} skipped: {names}")
        return line + (f" (left out: {'; '.join(dropped)})" if dropped else "")

    def xz_bits_per_byte(self) -> float | None:
        """What `xz -9e` needs for all held-out documents together (one stream, in order), in bits per byte of text;
        None where it is not known.

        Held out is held out from xz too: it sees nothing of the training documents, and starts from nothing. A language
        model that is trained on other documents must beat it to show that it learned anything that carries over.
        """
        text = b"".join(doc.text.encode("utf-8") for doc in self.held_out)
        return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def stdlib_files() -> list[Path]:
    """The standard library's `.py` files in a fixed order, without its tests, its build's record and other packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in NOT_LIBRARY and not s.startswith("config-"))
        found += [Path(folder, f) for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def load_corpus(
    sources: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    *,
    held_out: float = HELD_OUT,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Corpus:
    """Read documents and split them.

    sources: files, folders and globs of .txt .md .py .jsonl .parquet, and hub data sets (`hf:name`, `hf:name:config`,
        or a name that is no path here; needs the extra `data` and a network). None: the Python standard library's
    source. held_out: the fraction of documents to hold out. A document is held out when the hash of its bytes, read as
        a number in [0, 1), lies below it; so the choice never changes when other documents come or go.
    max_bytes: stop reading after this many bytes of text (a hub data set is streamed, so this bounds what is fetched).

    Neither side is ever empty. If the hash puts every document on one side, the document with the nearest hash crosses
    over; a corpus of one document is cut, and the last `held_out` part of its characters is held out.

    Raises ValueError (no text, a line without text, an unknown suffix, a bad fraction), FileNotFoundError (no such
    path) and ModuleNotFoundError (the extra `data` is missing), each with the name and the remedy.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}: it is the fraction of documents to hold out, between 0 and 1")
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes is {max_bytes}: give a positive number of bytes, or None to read everything")
    corpus = Corpus([], [])
    documents = _collect(_read(sources, progress), corpus, max_bytes)
    if not documents:
        what = "the standard library" if sources is None else ", ".join(map(str, _listed(sources)))
        raise ValueError(
            f"no text in {what}: {corpus.empty} empty and {len(corpus.skipped)} undecodable document(s) "
            f"{corpus.skipped[:5]}. Give at least one UTF-8 file with text in it"
        )
    if len(documents) == 1:
        documents = _cut(documents[0], held_out)
        corpus.train, corpus.held_out = documents[:1], documents[1:]
        return corpus
    corpus.held_out = [doc for doc in documents if doc.draw < held_out]
    corpus.train = [doc for doc in documents if doc.draw >= held_out]
    if not corpus.held_out:
        corpus.held_out = [min(documents, key=lambda doc: doc.draw)]
        corpus.train.remove(corpus.held_out[0])
    elif not corpus.train:
        corpus.train = [max(documents, key=lambda doc: doc.draw)]
        corpus.held_out.remove(corpus.train[0])
    return corpus


def _listed(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [sources] if isinstance(sources, str | os.PathLike) else list(sources)


def _read(
    sources: str | os.PathLike | Sequence[str | os.PathLike] | None, progress: bool
) -> Iterator[tuple[str, str | Skip]]:
    if sources is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files: list[tuple[str, Path | None]] = [(path.relative_to(root).as_posix(), path) for path in stdlib_files()]
    else:
        listed = _listed(sources)
        if not listed:
            raise ValueError(
                "the list of sources is empty: name files or folders, or give None for the standard library"
            )
        # Every path is looked at before the first is read: a typo in the last one should not cost the wait for the
        # others.
        files = [item for source in listed for item in expand(source)]
    with progress_bar("reading", len(files), progress) as advance:
        for name, path in files:
            yield from read_hub(name) if path is None else read_source(name, path)
            advance(1)


def _collect(texts: Iterable[tuple[str, str | Skip]], corpus: Corpus, max_bytes: int | None) -> list[Document]:
    documents, seen, total = [], set(), 0
    for name, text in texts:
        if isinstance(text, Skip):
            corpus.skipped.append(f"{name}: {text.reason}")
            continue
        if not text.strip():
            corpus.empty += 1
            continue
        try:
            document = Document.of(name, text)
        except UnicodeEncodeError:
            corpus.skipped.append(f"{name}: holds half of a surrogate pair, so it is no valid Unicode text")
            continue
        if document.digest in seen:
            corpus.duplicates += 1
            continue
        seen.add(document.digest)
        documents.append(document)
        total += document.size
        if max_bytes is not None and total >= max_bytes:
            break
    return documents


def _cut(document: Document, held_out: float) -> list[Document]:
    text = document.text
    if len(text) < 2:
        raise ValueError(f"{document.name} has one character: too little to train on and hold out; give more text")
    at = min(max(1, round(len(text) * (1 - held_out))), len(text) - 1)
    return [Document.of(f"{document.name}[:{at}]", text[:at]), Document.of(f"{document.name}[{at}:]", text[at:])]
