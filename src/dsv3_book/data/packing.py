"""Packed tokens: all documents one after another in one flat file, and windows cut from it in a reproducible order.

The file is memory-mapped, so a window costs one small read, whatever the file's size, and processes on one machine
share the pages. Documents are packed without masks between them (report §4.1): a window may hold the end of one and the
beginning of the next, and attention crosses.

The order of training sequences is a function, not a state: sequence number i of a run, counted from 0 and across
epochs, depends on the seed and i alone. A run that resumes, or runs on more processes, asks for other numbers of the
same list.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

MAGIC = b"DSV3TOK1"
HEADER = struct.Struct("<8sQIII")  # magic, tokens, bytes per token, vocabulary, CRC-32 of the tokens
HEADER_SIZE = 64


class CorruptShard(ValueError):
    """A shard file is not what its header says; build it again."""


class PackedTokens:
    """A flat array of token ids (uint16 or uint32, usually memory-mapped) and the order its windows are read in.

    tokens: the array.  seed: of the order.  vocab_size: every id is below it.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, seed: int = 0):
        self.tokens, self.vocab_size, self.seed = tokens, vocab_size, seed

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def write(path: str | os.PathLike, rows: Iterable[list[int]], vocab_size: int) -> int:
        """Write rows of ids as one shard, one row in memory at a time; returns the number of tokens.

        The header is written last, so a file cut short at any moment is seen to be corrupt.
        """
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        count = crc = 0
        with open(path, "wb") as file:
            file.write(bytes(HEADER_SIZE))
            for row in rows:
                ids = np.asarray(row, dtype=np.int64)
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                    raise ValueError(f"token ids {ids.min()} to {ids.max()} don't fit a vocabulary of {vocab_size}")
                raw = ids.astype(dtype).tobytes()
                file.write(raw)
                count, crc = count + len(ids), zlib.crc32(raw, crc)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, count, dtype.itemsize, vocab_size, crc))
            file.flush()
            os.fsync(file.fileno())
        return count

    @classmethod
    def open(cls, path: str | os.PathLike, seed: int = 0, checksum: bool = True) -> "PackedTokens":
        """Map a shard into memory, after a check of its header, its size and (unless told not to: it reads the whole
        file) its checksum.

        Raises CorruptShard (a ValueError) with what is wrong, FileNotFoundError if it is missing.
        """
        path = Path(path)
        with path.open("rb") as file:
            head = file.read(HEADER_SIZE)
        if len(head) < HEADER_SIZE or head[: len(MAGIC)] != MAGIC:
            raise CorruptShard(
                f"{path} has no header of a token shard: its writing was cut short, or it is another file"
            )
        _, count, itemsize, vocab_size, crc = HEADER.unpack(head[: HEADER.size])
        expected, size = HEADER_SIZE + count * itemsize, path.stat().st_size
        if itemsize not in (2, 4) or size != expected:
            raise CorruptShard(f"{path} has {size:,} bytes where its header says {expected:,}")
        if not count:
            return cls(np.zeros(0, dtype=f"<u{itemsize}"), vocab_size, seed)  # an empty file can't be mapped
        tokens = np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=HEADER_SIZE, shape=(count,))
        if not checksum:
            return cls(tokens, vocab_size, seed)
        step = 1 << 24
        found = 0
        for start in range(0, count, step):
            found = zlib.crc32(tokens[start : start + step].data, found)
        if found != crc:
            raise CorruptShard(f"{path} has the checksum {found:08x} where its header says {crc:08x}")
        return cls(tokens, vocab_size, seed)

    def windows(self, length: int, stride: int) -> int:
        """How many windows of `length` tokens, one every `stride` tokens, fit; ValueError if none does.

        With stride T and length T + 1 + J, every token but the first is a target of the main model once per epoch;
        fewer than length + stride tokens at the end are left over.
        """
        if length < 1 or stride < 1:
            raise ValueError(f"a window of {length} tokens every {stride}: both must be at least 1")
        if len(self) < length:
            raise ValueError(
                f"the corpus packs into {len(self):,} tokens, but one training sequence needs {length:,}: "
                "give more text, or a shorter sequence length"
            )
        return (len(self) - length) // stride + 1

    def sequences(self, first: int, count: int, length: int, stride: int) -> Int[Tensor, "count length"]:
        """Training sequences number `first` to `first + count - 1` of the run, int64.

        Sequence i is in epoch i // n, n = `windows(length, stride)`; each epoch shows every window once, in an order of
        its own. For T inputs and MTP depth J: length T + 1 + J, stride T.
        """
        n = self.windows(length, stride)
        if first < 0 or count < 0:
            raise ValueError(f"sequences {first} to {first + count - 1}: numbers count from 0 upwards")
        numbers = np.arange(first, first + count, dtype=np.int64)
        starts = np.zeros(count, dtype=np.int64)
        for epoch in np.unique(numbers // n).tolist():
            here = numbers // n == epoch
            starts[here] = stride * shuffled(numbers[here] % n, n, self.seed, epoch)
        return self.at(starts, length)

    def at(self, starts: np.ndarray, length: int) -> Int[Tensor, "count length"]:
        """The windows that begin at `starts`, int64; past the end of the shard the last token is repeated."""
        places = np.minimum(starts[:, None] + np.arange(length), len(self) - 1)
        return torch.from_numpy(self.tokens[places].astype(np.int64))


def shuffled(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where position `index` (an int64 array, each in [0, n)) goes in the shuffle of n things for (seed, epoch).

    A permutation that is computed, not stored: V3's 14.8T tokens make 3.6 billion windows, whose shuffled list would
    fill 29 GB. A Feistel network (two half-width words, each in turn xor-ed with a hash of the other) permutes the
    numbers below a power of four; a number that lands at n or above is sent through again until it falls below.
    Integers only, so it gives the same order on every machine and with every version of numpy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(f"order:{seed}:{epoch}".encode(), digest_size=32).digest()
    keys = np.frombuffer(digest, dtype="<u8")

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << half) | right

    out = once(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element (the finaliser of SplitMix64; products wrap around, as they should)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
