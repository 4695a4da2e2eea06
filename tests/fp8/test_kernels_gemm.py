"""The products' kernels against their dequantised operands in fp64: in Triton's interpreter, or on a GPU."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
from kernelkit import DEVICE

from dsv3_book.fp8 import kernels, reference
from dsv3_book.fp8.accumulate import hopper_tolerance
from dsv3_book.fp8.kernels.gemm import gemm_kernel
from dsv3_book.fp8.kernels.groups import group_starts
from dsv3_book.fp8.kernels.tuning import CONFIGS, possible, split_count

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
inner = st.sampled_from([1, 16, 80, 127, 128, 129, 300, 576])
outs = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)


@given(lengths, lengths, inner, st.booleans(), outs, seeds)
@settings(max_examples=20)
def test_dense(M: int, N: int, K: int, by_blocks: bool, out: torch.dtype, seed: int) -> None:
    a, a_scale, a_value = rows_of(M, K, seed, pow2=seed % 2 == 0)
    if by_blocks:
        b, b_scale, b_value = (x[0] for x in blocks_of(1, N, K, seed + 1))
    else:
        b, b_scale, b_value = rows_of(N, K, seed + 1)
    assert_product(kernels.gemm(a, a_scale, b, b_scale, out), a_value, b_value)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_few_tiles_are_cut_along_k(out: torch.dtype) -> None:
    """Parts of K for several programs, one of them short: summed in order, the same bits again."""
    M, N, K = 3, 70, 2600
    assert split_count(M, N, K, torch.device(DEVICE)) > 1
    a, a_scale, a_value = rows_of(M, K, 0)
    b, b_scale, b_value = (x[0] for x in blocks_of(1, N, K, 1))
    once = kernels.gemm(a, a_scale, b, b_scale, out)
    assert_product(once, a_value, b_value)
    assert torch.equal(once, kernels.gemm(a, a_scale, b, b_scale, out))


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("candidate", CONFIGS, ids=lambda c: f"{c.kwargs}".replace(" ", ""))
def test_every_candidate_gives_the_same_bits(
    candidate: triton.Config, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autotuning picks by time alone, so all it picks from must agree: order of the sums, edges, both halves of a wide
    tile, descriptors made in the kernel."""
    if not possible(candidate, by_blocks, 2):
        pytest.skip("never chosen here")
    M, N, K = 140, 300, 200
    a, a_scale, a_value = rows_of(M, K, 0)
    b, b_scale, b_value = (x[0] for x in blocks_of(1, N, K, 1)) if by_blocks else rows_of(N, K, 1)
    usual = kernels.gemm(a, a_scale, b, b_scale, torch.bfloat16)
    assert_product(usual, a_value, b_value)
    monkeypatch.setattr(gemm_kernel, "configs", [candidate])
    monkeypatch.setattr(gemm_kernel, "cache", {})
    assert torch.equal(kernels.gemm(a, a_scale, b, b_scale, torch.bfloat16), usual)


def test_zeros_and_nan_stay_where_they_are() -> None:
    """A row of zeros gives zeros (its scale is the smallest there is); a NaN spoils its row of C, and nothing else; so
    does an infinity, which has the code NaN."""
    x = random_matrix(70, 200, 0)
    x[3], x[5, 7], x[66, 199] = 0, float("nan"), float("inf")
    a, a_scale = reference.quantize_rows(x, False)
    b, b_scale, _ = (y[0] for y in blocks_of(1, 80, 200, 1))
    c = kernels.gemm(a, a_scale, b, b_scale, torch.float32)
    spoilt = torch.tensor([5, 66], device=DEVICE)
    assert c[spoilt].isnan().all() and (c[3] == 0).all()
    assert c.index_fill(0, spoilt, 0.0).isfinite().all()
    c = kernels.gemm(b, b_scale.repeat_interleave(128, 0)[:80].contiguous(), a, a_scale, torch.float32)
    assert c[:, spoilt].isnan().all() and c.index_fill(1, spoilt, 0.0).isfinite().all()


def test_views_and_empty_operands() -> None:
    """Rows that TMA can't address are copied; nothing to do is nothing done."""
    a, a_scale, a_value = rows_of(40, 256, 0)
    b, b_scale, b_value = rows_of(30, 256, 1)
    wide = torch.zeros(40, 300, dtype=torch.uint8, device=DEVICE).view(a.dtype)
    wide.view(torch.uint8)[:, 3:259] = a.view(torch.uint8)
    for view in (wide[:, 3:259], a.t().contiguous().t()):
        assert_product(kernels.gemm(view, a_scale, b, b_scale.t().contiguous().t(), torch.float32), a_value, b_value)
    assert kernels.gemm(a[:0], a_scale[:0], b, b_scale, torch.float32).shape == (0, 30)
    assert (kernels.gemm(a[:, :0], a_scale[:, :0], b[:, :0], b_scale[:, :0], torch.float32) == 0).all()


counts_of_rows = st.lists(st.sampled_from([0, 0, 1, 3, 64, 65, 130]), min_size=1, max_size=5)


@given(counts_of_rows, lengths, inner, outs, seeds)
@example([0, 0, 0], 80, 80, torch.float32, 0)
@example([0, 0, 200, 0], 80, 129, torch.float32, 0)
@settings(max_examples=20)
def test_grouped(counts: list[int], N: int, K: int, out: torch.dtype, seed: int) -> None:
    """Any counts: experts without a row, all rows to one, tiles that reach into the next expert's rows."""
    a, a_scale, a_value = rows_of(sum(counts), K, seed)
    b, b_scale, b_value = blocks_of(len(counts), N, K, seed + 1)
    c = kernels.grouped_gemm(a, a_scale, b, b_scale, torch.tensor(counts, device=DEVICE), out)
    assert c.shape == (sum(counts), N)
    for e, (ours, mine) in enumerate(zip(c.split(counts), a_value.split(counts))):
        assert_product(ours, mine, b_value[e])


@given(st.lists(st.sampled_from([0, 1, 63, 65, 70]), min_size=1, max_size=4), lengths, inner, outs, seeds)
@settings(max_examples=15)
def test_masked(counts: list[int], N: int, K: int, out: torch.dtype, seed: int) -> None:
    """Rows beyond the count become zeros, though there are NaNs in what they would have been computed from."""
    E, room = len(counts), 70
    a, a_scale, a_value = (x.view(E, room, -1) for x in rows_of(E * room, K, seed))
    b, b_scale, b_value = blocks_of(E, N, K, seed + 1)
    for e, n in enumerate(counts):
        a[e, n:].view(torch.uint8).fill_(0x7F)
    c = kernels.masked_gemm(a, a_scale, b, b_scale, torch.tensor(counts, dtype=torch.int32, device=DEVICE), out)
    for e, n in enumerate(counts):
        assert_product(c[e, :n], a_value[e, :n], b_value[e])
        assert (c[e, n:] == 0).all()


@given(st.lists(st.sampled_from([0, 0, 1, 100, 128, 129, 300]), min_size=1, max_size=5), lengths, lengths, seeds)
@example([0, 0], 80, 80, 0)
@example([0, 300, 0], 80, 129, 0)
@settings(max_examples=12)
def test_grouped_wgrad(counts: list[int], N1: int, N2: int, seed: int) -> None:
    """Each expert contracts its own room; one without tokens gets zeros."""
    on_device = torch.tensor(counts, device=DEVICE)
    a, a_scale = reference.quantize_columns(random_matrix(sum(counts), N1, seed), on_device, False)
    b, b_scale = reference.quantize_columns(random_matrix(sum(counts), N2, seed + 1), on_device, seed % 2 == 0)
    a_value = reference.dequantize_rows(a, a_scale).double()
    b_value = reference.dequantize_rows(b, b_scale).double()
    c = kernels.grouped_wgrad(a, a_scale, b, b_scale, on_device, torch.float32)
    starts = reference.rooms(on_device)
    for e in range(len(counts)):
        room = slice(starts[e], starts[e + 1])
        assert_product(c[e], a_value[:, room], b_value[:, room])


def test_groups_of_many_experts() -> None:
    """The table that tiles are looked up in, for every tile of 256 experts, most of them empty."""
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 300, (256,), generator=random) * (torch.rand(256, generator=random) < 0.2)
    starts = group_starts(counts.to(DEVICE), int(counts.sum())).cpu()
    for line, height in ((1, 64), (2, 128)):
        tiles = (counts + height - 1) // height
        assert starts[line].tolist() == [0, *tiles.cumsum(0).tolist()]
    assert starts[0].tolist() == [0, *counts.cumsum(0).tolist()]
    # More rows promised than there are: what is beyond does not exist.
    assert group_starts(torch.tensor([3, 100, 5], device=DEVICE), 50).tolist()[0] == [0, 3, 50, 50, 50]


def test_no_product_reads_the_counts_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that waits for the GPU to tell the counts leaves it without work meanwhile."""
    a, a_scale, _ = rows_of(20, 80, 0)
    b, b_scale, _ = blocks_of(3, 80, 80, 1)
    counts = torch.tensor([5, 0, 15], device=DEVICE)

    def refuse(*_: object) -> None:
        raise AssertionError("the counts were read")

    for name in ("tolist", "item", "__int__", "__index__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    kernels.grouped_gemm(a, a_scale, b, b_scale, counts, torch.float32)
    kernels.masked_gemm(a.view(1, 20, 80), a_scale.view(1, 20, 1), b[:1], b_scale[:1], counts[:1], torch.float32)
    kernels.grouped_wgrad(b[0], b_scale[0].expand(80, 1), b[0], b_scale[0].expand(80, 1), counts[:1], torch.float32)
