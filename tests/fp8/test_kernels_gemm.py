"""The products' kernels against their dequantised operands in fp64: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from kernelkit import DEVICE

from dsv3_book.fp8 import kernels, reference
from dsv3_book.fp8.accumulate import hopper_tolerance

pytestmark = pytest.mark.gpu


def tolerance(K: int) -> float:
    """Of ‖a‖‖b‖: fp32's rounding in the interpreter, on a Hopper GPU what the model of its accumulator predicts."""
    return 2e-6 if DEVICE == "cpu" else hopper_tolerance(K)


def rows_of(M: int, K: int, seed: int, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales by 1×128 tiles of a random matrix with outliers, and the same dequantised in fp64."""
    codes, scale = reference.quantize_rows(random_matrix(M, K, seed), pow2)
    return codes, scale, reference.dequantize_rows(codes, scale).double()


def blocks_of(E: int, N: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for weights [E, N, K] by 128×128 blocks."""
    codes, scale = reference.quantize_blocks(random_matrix(E * N, K, seed).view(E, N, K), False)
    return codes, scale, reference.dequantize_blocks(codes, scale).double()


def random_matrix(M: int, K: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=random)
    x[torch.rand(M, K, generator=random) < 0.01] *= 50  # the outliers that tiles are for
    return x.mul_(torch.exp2(torch.randint(-6, 7, (M, 1), generator=random))).to(DEVICE)


def assert_product(ours: Tensor, a: Tensor, b: Tensor) -> None:
    """ours [M, N] is a [M, K] · b [N, K]ᵀ: each number within the tolerance of its row's and column's norms, or, if it
    was stored in bf16, within half a unit in bf16's last place of that."""
    exact = a @ b.t()
    allowed = tolerance(a.shape[1]) * a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :]
    if ours.dtype == torch.bfloat16:
        allowed = allowed * (1 + 2**-8) + exact.abs() * 2**-8
    assert ours.shape == exact.shape
    worst = ((ours.double() - exact).abs() - allowed).max() if exact.numel() else torch.tensor(0.0)
    assert worst <= 0, f"{worst:.2e} beyond the tolerance"


lengths = st.sampled_from([1, 2, 63, 64, 65, 80, 128, 129, 200])
outs = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)


@given(lengths, lengths, st.sampled_from([1, 16, 80, 127, 128, 129, 300, 576]), st.booleans(), outs, seeds)
@settings(max_examples=25)
def test_dense(M: int, N: int, K: int, by_blocks: bool, out: torch.dtype, seed: int) -> None:
    a, a_scale, a_value = rows_of(M, K, seed, pow2=seed % 2 == 0)
    if by_blocks:
        b, b_scale, b_value = (x[0] for x in blocks_of(1, N, K, seed + 1))
    else:
        b, b_scale, b_value = rows_of(N, K, seed + 1)
    assert_product(kernels.gemm(a, a_scale, b, b_scale, out), a_value, b_value)
