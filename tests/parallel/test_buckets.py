"""The row, its buckets and shards: every number in one place, cuts where they don't show."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dsv3_book.parallel.buckets import ALIGN, Buckets, Layout

SIZES = st.lists(st.integers(0, 700), max_size=12)


@given(SIZES, st.integers(1, 8), st.integers(1, 2000))
def test_every_number_lies_in_one_shard(sizes: list[int], ranks: int, bucket: int) -> None:
    layout = Layout(sizes, ranks, bucket)
    seen = [torch.zeros(size, dtype=torch.long) for size in sizes]
    for number, (begin, end) in enumerate(layout.buckets):
        parts = [layout.shard(number, rank) for rank in range(ranks)]
        assert parts[0][0] == begin and parts[-1][1] == end
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert len({high - low for low, high in parts}) == 1
        for low, high in parts:
            for piece in layout.pieces(low, high):
                seen[piece.parameter][piece.begin : piece.end] += 1
                assert piece.begin % ALIGN == 0 and piece.at % ALIGN == 0
                assert layout.starts[piece.parameter] + piece.begin == low + piece.at
    assert all((counts == 1).all() for counts in seen)
    assert all(a[1] == b[0] for a, b in pairwise(layout.buckets))


@given(SIZES, st.integers(1, 8), st.integers(1, 2000))
def test_padding_is_little(sizes: list[int], ranks: int, bucket: int) -> None:
    layout = Layout(sizes, ranks, bucket)
    assert sum(sizes) <= layout.total < sum(sizes) + ALIGN * (ranks + len(sizes))
    whole = {end - begin for begin, end in layout.buckets[:-1]}
    assert whole <= {-(-bucket // (ALIGN * ranks)) * ALIGN * ranks}


def test_one_process_sums_nothing_and_gathers_what_it_has() -> None:
    a, b = nn.Parameter(torch.zeros(70, 3)), nn.Parameter(torch.zeros(5))
    a.grad = torch.randn(70, 3)
    expected = a.grad.clone()
    buckets = Buckets([("a", a), ("b", b)], None, bucket=64)
    sums = buckets.reduce(forget=True)
    assert a.grad is None and len(sums) == len(buckets) == 5
    buckets.gather_gradients(sums)
    assert torch.equal(a.grad, expected) and torch.equal(b.grad, torch.zeros(5))


def test_gradients_of_other_dtypes_and_layouts() -> None:
    """Summed in fp32; what a bf16 parameter gets is rounded at the end."""
    a, b = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(6, 2))
    a.grad, b.grad = torch.ones(4, 3, dtype=torch.bfloat16), torch.arange(12.0).view(2, 6).t()
    buckets = Buckets([("a", a), ("b", b)], None)
    (total,) = buckets.reduce()
    assert total.dtype == torch.float32
    buckets.gather_gradients([2 * total])
    assert a.grad.dtype == torch.bfloat16 and (a.grad == 2).all()
    assert torch.equal(b.grad, 2 * torch.arange(12.0).view(2, 6).t())


def test_bad_input() -> None:
    p = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least one"):
        Buckets([], None)
    with pytest.raises(ValueError, match="twice among a, b"):
        Buckets([("a", p), ("b", p)], None)
    with pytest.raises(ValueError, match="t is not contiguous"):
        Buckets([("t", nn.Parameter(torch.zeros(4, 3).t()))], None)
    with pytest.raises(ValueError, match="one device, found cpu, meta"):
        Buckets([("p", p), ("m", nn.Parameter(torch.zeros(1, device="meta")))], None)
    with pytest.raises(ValueError, match=r"no gradient at all for p …: run the backward pass first"):
        Buckets([("p", p)], None).reduce()
    with pytest.raises(ValueError, match=r"ranks \(0\)"):
        Layout([1], 0)
