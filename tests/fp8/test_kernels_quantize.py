"""The quantiser kernels against the reference, bit for bit: in Triton's interpreter, and on a GPU when there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from kernelkit import awkward, same

from dsv3_book.fp8 import kernels, reference

pytestmark = pytest.mark.gpu
pow2s = st.booleans()


@given(awkward([0, 1, 5, 33], [0, 1, 80, 128, 300]), pow2s)
@settings(max_examples=40)
def test_rows(x: torch.Tensor, pow2: bool) -> None:
    assert same(kernels.quantize_rows(x, pow2), reference.quantize_rows(x, pow2))
