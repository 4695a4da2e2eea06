"""What the tests of Triton kernels share: where they run, and matrices that break quantisers."""

import math

import torch
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A GPU when there is one; else the kernels are interpreted (`conftest.py` asks Triton for it)."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e-38, 1e4, 448.0, 464.0]


@st.composite
def awkward(draw: st.DrawFn, *lengths: list[int]) -> torch.Tensor:
    """A tensor on DEVICE with one of the given lengths along each axis; contents with outliers, rows of zeros,
    subnormals, the largest numbers, NaN and infinities."""
    shape = [draw(st.sampled_from(choices)) for choices in lengths]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=random)
    x *= 10.0 ** draw(st.integers(-44, 37))
    if x.numel():
        flat = x.view(-1)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=8)):
            flat[torch.randint(flat.numel(), (1,), generator=random)] = value
        if draw(st.booleans()):
            x[torch.randint(shape[0], (1,), generator=random)] = 0
    return x.to(draw(st.sampled_from(DTYPES))).to(DEVICE)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of x: equal exactly when every bit is, NaN and the sign of zero included."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Are codes and scales the same, bit for bit, and of one shape?"""
    return len(ours) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(ours, expected)
    )
