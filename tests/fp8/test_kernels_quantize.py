"""The quantiser kernels against the reference, bit for bit: in Triton's interpreter, and on a GPU when there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
from kernelkit import DEVICE, awkward, same

from dsv3_book.fp8 import kernels, reference

# Interpreted, a kernel's infinities make NumPy speak up.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")]
pow2s = st.booleans()


@st.composite
def rooms(draw: st.DrawFn) -> torch.Tensor:
    """Counts of tokens for some experts, zeros among them."""
    lengths = st.sampled_from([0, 0, 1, 7, 127, 128, 129])
    counts = draw(st.lists(lengths, min_size=1, max_size=5))
    return torch.tensor(counts, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)


@given(awkward([0, 1, 5, 33], [1, 80, 128, 300]), pow2s)
@settings(max_examples=60)
def test_rows(x: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_rows(x, pow2), reference.quantize_rows(x, pow2))


@given(awkward([1, 2], [1, 128, 150], [1, 80, 128, 130]), pow2s)
@settings(max_examples=30)
def test_blocks(w: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_blocks(w, pow2), reference.quantize_blocks(w, pow2))


@given(awkward([1, 5, 128, 200], [1, 64, 80, 130]), pow2s)
@settings(max_examples=40)
def test_columns(x: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_columns(x, None, pow2), reference.quantize_columns(x, None, pow2))


@given(st.data(), rooms(), pow2s)
@settings(max_examples=40)
def test_columns_of_experts(data: st.DataObject, counts: torch.Tensor, pow2: bool) -> None:
    x = data.draw(awkward([int(counts.sum())], [1, 70]))
    assert same(kernels.quantize_columns(x, counts, pow2), reference.quantize_columns(x, counts, pow2))


@given(awkward([1, 5, 128, 200], [1, 64, 80, 130]), pow2s, pow2s)
@settings(max_examples=40)
def test_codes_to_columns(x: torch.Tensor, first: bool, pow2: bool) -> None:
    codes, scale = reference.quantize_rows(x, first)
    ours, expected = (m.requantize_columns(codes, scale, None, pow2) for m in (kernels, reference))
    assert same(ours, expected)


@given(st.data(), rooms(), pow2s)
@settings(max_examples=40)
def test_codes_to_columns_of_experts(data: st.DataObject, counts: torch.Tensor, pow2: bool) -> None:
    codes, scale = reference.quantize_rows(data.draw(awkward([int(counts.sum())], [1, 150])), True)
    ours, expected = (m.requantize_columns(codes, scale, counts, pow2) for m in (kernels, reference))
    assert same(ours, expected)


@given(awkward([1, 70], [1, 128]))
@settings(max_examples=20)
def test_tensor(x: torch.Tensor) -> None:
    assert same(kernels.quantize_tensor(x), reference.quantize_tensor(x))
