"""Text to numbers and back: a byte-level BPE in the style of V3's.

Three steps. The text is first cut into short pieces that a token never spans (`V3_PIECES`); each piece is written as
UTF-8 bytes, and byte pairs that were frequent in training are merged, most frequent first. Every byte is a token of its
own, so any text can be encoded and comes back unchanged.

Special tokens mark structure (a document's begin and end, the holes of Fill-in-Middle). They are only ever added by
code: `encode` treats a special token's *name* inside a text like any other characters, so a document cannot end itself.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIALS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)  # the released tokenizer's names
RESERVED = "<｜reserved▁{}｜>"  # fills the vocabulary when the corpus has too few pairs to merge

# Released code: three cuts, one after the other. Digits go in threes from the left; runs of Chinese characters and kana
# stand alone; the rest is cut into words and marks. (Same cuts as the released tokenizer's, written our way.)
DIGITS = r"\p{N}{1,3}"
CJK = "[\u4e00-\u9fa5\u3040-\u30ff]+"
ASCII_WORD = r"[!-/:-@\[-`{-~][A-Za-z]+"  # an ASCII mark takes the ASCII letters after it: `.join`, `(self`, `_name`
WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # letters, with the one blank before them
MARKS = r" ?[\p{P}\p{S}]+[\r\n]*"  # marks take the line ends after them: `):\n` is one piece
LINE_ENDS, BLANKS = r"\s*[\r\n]+", r"\s+(?!\S)|\s+"  # blanks leave the last one to the word they stand before
V3_PIECES = (DIGITS, CJK, "|".join((ASCII_WORD, WORD, MARKS, LINE_ENDS, BLANKS)))
# Our choice, for code: a line end also takes the next line's indentation but for its last blank (`):\n       `).
INDENT = r"(?:[ \t]+(?!\S))?"
CODE_MARKS, CODE_LINE_ENDS = rf" ?[\p{{P}}\p{{S}}]+(?:[\r\n]+{INDENT})?", rf"\s*[\r\n]+{INDENT}"
CODE_PIECES = (DIGITS, CJK, "|".join((ASCII_WORD, WORD, CODE_MARKS, CODE_LINE_ENDS, BLANKS)))
STYLES = {"v3": V3_PIECES, "code": CODE_PIECES}


def byte_letters() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for each byte: letter -> byte.

    Bytes that print stand for themselves; the other 68 get the letters from U+0100 on, in order (GPT-2's convention).
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer: `Tokenizer.train(texts, vocab_size)` or `Tokenizer.load(path)`.

    vocab_size: rows an embedding needs (highest id + 1, special tokens included).
    bos_id, eos_id, pad_id: ids of the special tokens (pad is eos where a loaded tokenizer has no pad).
    fim_ids: ids of (begin, hole, end) of Fill-in-Middle, or None where a loaded tokenizer has none.
    """

    def __init__(self, spec: str):
        """From the text of a `tokenizer.json`; ValueError if it is none, or not byte-level BPE, or has no bos or
        eos.
        """
        try:
            fields = json.loads(spec)
            full = tokenizers.Tokenizer.from_str(spec)
            # A second copy that knows no special tokens at all encodes the texts. `encode_special_tokens` would not do:
            # released files list some (the Fill-in-Middle ones) as added tokens that are not "special", and those it
            # still matches.
            plain = tokenizers.Tokenizer.from_str(json.dumps(fields | {"added_tokens": [], "post_processor": None}))
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"not the content of a tokenizer.json: {str(error)[:200]}") from None
        kinds = json.dumps([fields.get("pre_tokenizer"), fields.get("decoder")])
        if fields["model"].get("type", "BPE") != "BPE" or "ByteLevel" not in kinds:
            raise ValueError("the tokenizer is no byte-level BPE: the model's vocabulary must hold every byte")
        self._spec, self._plain = spec, plain
        ids = full.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self._added = {token["id"]: token["content"] for token in fields.get("added_tokens", [])}
        self._letters = byte_letters()
        self._bytes = [b""] * self.vocab_size
        for token, index in ids.items():
            if index not in self._added:
                if not self._letters.keys() >= set(token):
                    raise ValueError(
                        f"token {index} ({token!r}) is not written in byte letters: only byte-level BPE can be used"
                    )
                self._bytes[index] = bytes(self._letters[letter] for letter in token)
        names = {name: index for index, name in self._added.items()}
        for name in (BOS, EOS):
            if name not in names:
                raise ValueError(f"the tokenizer has no special token {name}, which marks a document's begin or end")
        self.bos_id, self.eos_id = names[BOS], names[EOS]
        self.pad_id = names.get(PAD, self.eos_id)
        self.fim_ids: tuple[int, int, int] | None = None
        if names.keys() >= {FIM_BEGIN, FIM_HOLE, FIM_END}:
            self.fim_ids = (names[FIM_BEGIN], names[FIM_HOLE], names[FIM_END])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, style: str = "v3") -> "Tokenizer":
        """Learn `vocab_size` tokens from texts: 6 special ones, 256 bytes, then merges. The same texts give the same
        tokenizer.

        style: "v3", the released tokenizer's pieces, or "code", where a line end also takes the indentation after it.
        Where the texts have too few pairs to merge, reserved tokens that no text produces fill the rest, so that
        `vocab_size` is always what was asked for. ValueError if it is below 262, or the style unknown.
        """
        smallest = len(SPECIALS) + 256
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {vocab_size}: byte-level BPE needs {smallest} ({len(SPECIALS)} special, 256 bytes)"
            )
        if style not in STYLES:
            raise ValueError(f"unknown tokenizer style {style!r}: choose one of {', '.join(STYLES)}")
        bpe = tokenizers.Tokenizer(models.BPE())
        cuts = [pre_tokenizers.Split(Regex(pieces), "isolated") for pieces in STYLES[style]]
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(SPECIALS), show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        bpe.add_special_tokens([RESERVED.format(i) for i in range(vocab_size - bpe.get_vocab_size())])
        return cls(bpe.to_str())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`, one of ours or a released one, or a folder that holds one."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.json, or a folder that holds one")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> Path:
        """Write `tokenizer.json` (into `path`, if that is a folder), whole or not at all; returns where it lies."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(self._spec)
        os.chmod(file.name, 0o644)  # temporary files are private; a run folder's are as readable as the rest of it
        os.replace(file.name, path)
        return path

    @property
    def spec(self) -> str:
        """The text of `tokenizer.json`: all that defines this tokenizer."""
        return self._spec

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, after bos and before eos if asked for. Names of special tokens in the text are plain
        characters.
        """
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def pieces(self, text: str) -> list[str]:
        """The pieces that `text` is cut into before bytes are merged; no token spans two of them."""
        cut = self._plain.pre_tokenizer.pre_tokenize_str(text)
        return [text[start:end] for _, (start, end) in cut]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; special tokens stand for none. ValueError for an id outside the vocabulary."""
        return b"".join(self._bytes[self._checked(index)] for index in ids)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text that ids stand for; `specials` shows special tokens by name. Bytes that are no whole character show
        as U+FFFD.
        """
        ids = [self._checked(index) for index in ids]
        if specials:
            raw = b"".join(self._added[i].encode() if i in self._added else self._bytes[i] for i in ids)
        else:
            raw = self.decode_bytes(ids)
        return raw.decode("utf-8", errors="replace")

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return int(index)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [V]: how many bytes of text each token stands for, 0 for special tokens; what bits per byte is divided
        by.
        """
        return np.array([len(token) for token in self._bytes], dtype=np.int64)
