"""Packing: shards that are whole or refused, and an order that depends on seed and number only."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.data import CorruptShard, PackedTokens
from dsv3_book.data.packing import HEADER_SIZE, shuffled


def packed(n: int, seed: int = 0) -> PackedTokens:
    return PackedTokens(np.arange(n, dtype=np.uint16), vocab_size=2**16, seed=seed)


@given(n=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_a_shuffle_is_a_permutation(n, seed, epoch):
    order = shuffled(np.arange(n), n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(shuffled(np.array([n - 1]), n, seed, epoch), order[-1:])


def test_a_shuffle_scales_and_mixes():
    n = 3_600_000_000  # V3's corpus in windows of 4096
    places = shuffled(np.arange(10_000), n, 0, 0)
    assert places.min() >= 0 and places.max() < n and len(set(places.tolist())) == 10_000
    assert abs(places.mean() / n - 0.5) < 0.02
    orders = [shuffled(np.arange(1000), 1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[one] == orders[two]) < 0.01
    assert abs(np.corrcoef(np.arange(1000), orders[0])[0, 1]) < 0.1


def test_the_shuffle_never_changes():
    """A resume with a later version must go on in the same order, so these numbers are for ever."""
    assert shuffled(np.arange(10), 10, seed=7, epoch=1).tolist() == [4, 2, 7, 9, 3, 5, 8, 1, 6, 0]


@given(
    n=st.integers(40, 400),
    first=st.integers(0, 300),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    T=st.integers(1, 16),
    J=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_sequences_do_not_depend_on_how_they_are_asked_for(n, first, counts, T, J, seed):
    shard = packed(n, seed)
    whole = shard.sequences(first, sum(counts), T + 1 + J, T)
    starts = np.cumsum([first, *counts])
    parts = [packed(n, seed).sequences(int(s), c, T + 1 + J, T) for s, c in zip(starts, counts)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.int64 and whole.shape == (sum(counts), T + 1 + J)


def test_eight_at_once_are_four_and_four():
    shard = packed(1000)
    halves = [shard.sequences(first, 4, 18, 16) for first in (0, 4)]
    assert torch.equal(shard.sequences(0, 8, 18, 16), torch.cat(halves))
    by_rank = torch.stack([shard.sequences(i, 1, 18, 16)[0] for i in range(8)])
    assert torch.equal(shard.sequences(0, 8, 18, 16), by_rank)


def test_an_epoch_shows_every_window_once_then_in_another_order():
    shard = packed(1000)
    n = shard.windows(length=18, stride=16)
    assert n == 62
    epochs = shard.sequences(0, 2 * n, 18, 16).view(2, n, 18)
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == [16 * i for i in range(n)]
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(18))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], packed(1000, seed=1).sequences(0, n, 18, 16))


def test_every_token_but_the_first_is_a_target_once_an_epoch():
    targets = packed(1001).sequences(0, 62, 17, 16)[:, 1:17]
    assert sorted(targets.flatten().tolist()) == list(range(1, 62 * 16 + 1))


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="packs into 17 tokens, but one training sequence needs 18"):
        packed(17).sequences(0, 1, 18, 16)
    assert packed(18).sequences(5, 1, 18, 16).tolist() == [list(range(18))]
    with pytest.raises(ValueError, match="count from 0"):
        packed(100).sequences(-1, 1, 18, 16)
    with pytest.raises(ValueError, match="at least 1"):
        packed(100).sequences(0, 1, 18, 0)


@given(rows=st.lists(st.lists(st.integers(0, 69_999))), vocab=st.sampled_from([70_000, 2**20]))
def test_shards_round_trip_in_four_bytes(tmp_path_factory, rows, vocab):
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    flat = [index for row in rows for index in row]
    assert PackedTokens.write(path, rows, vocab) == len(flat)
    shard = PackedTokens.open(path)
    assert shard.tokens.tolist() == flat and shard.tokens.dtype == np.uint32 and shard.vocab_size == vocab


def test_shards_use_two_bytes_where_the_vocabulary_allows(tmp_path):
    for vocab, itemsize in ((2**16, 2), (2**16 + 1, 4)):
        PackedTokens.write(tmp_path / "x.bin", [[vocab - 1, 0]], vocab)
        assert (tmp_path / "x.bin").stat().st_size == HEADER_SIZE + 2 * itemsize
        assert PackedTokens.open(tmp_path / "x.bin").tokens.tolist() == [vocab - 1, 0]
    for row in ([5], [-1]):
        with pytest.raises(ValueError, match="don't fit a vocabulary of 5"):
            PackedTokens.write(tmp_path / "x.bin", [row], 5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "201 bytes where its header says"),
        (lambda raw: raw + b"\0", "bytes where its header says"),
        (lambda raw: raw[:30], "no header of a token shard"),
        (lambda raw: b"", "no header of a token shard"),
        (lambda raw: bytes(HEADER_SIZE) + raw[HEADER_SIZE:], "no header of a token shard"),  # killed before the header
        (lambda raw: raw[:-5] + b"\xff" + raw[-4:], "checksum"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, damage, message):
    path = tmp_path / "x.bin"
    PackedTokens.write(path, [list(range(69))], 300)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptShard, match=message.replace("201", r"\d+")):
        PackedTokens.open(path)
