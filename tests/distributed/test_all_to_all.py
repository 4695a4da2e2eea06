"""Dispatch and combine between processes equal the local twin, outputs and gradients, for any routing."""

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_book.fp8 import dequantize_activation, quantize_activation
from dsv3_book.model.dispatch import Dispatch, Done, LocalDispatch, LocalExchange
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import Mesh, make_mesh
from dsv3_book.parallel.traffic import Traffic, traffic_of
from dsv3_book.parallel.two_hop import TwoHop

pytestmark = pytest.mark.distributed


@dataclass
class Case:
    """One routing of all ranks' tokens: tokens per rank, and what a test needs by rank."""

    tokens: list[int]
    K: int
    E: int
    D: int
    dtype: torch.dtype
    crowd: str  # how experts are chosen
    seed: int

    def everything(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, experts, gates, a weight per expert [E, D], the outputs' gradient: of all ranks' tokens."""
        g = torch.Generator().manual_seed(self.seed)
        N = sum(self.tokens)
        among = {"spread": self.E, "few": max(self.K, self.E // 4), "one": self.K}[self.crowd]
        shift = int(torch.randint(self.E, (), generator=g))
        chosen = [torch.randperm(among, generator=g)[: self.K] for _ in range(N)]
        experts = (torch.stack(chosen) + shift) % self.E if N else torch.zeros(0, self.K, dtype=torch.int64)
        rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)
        gates = torch.rand(N, self.K, generator=g).to(torch.promote_types(self.dtype, torch.float32))
        return rand(N, self.D), experts, gates, rand(self.E, self.D), rand(N, self.D)


@st.composite
def cases(draw, ranks: int, dtypes=(torch.float64, torch.float32, torch.bfloat16), widths=(1, 3, 8)):
    tokens = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    E = draw(st.sampled_from([1, 2, 4])) * ranks
    K = draw(st.integers(1, min(4, E)))
    crowd = draw(st.sampled_from(["spread", "few", "one"]))
    D, dtype = draw(st.sampled_from(widths)), draw(st.sampled_from(dtypes))
    return Case(tokens, K, E, D, dtype, crowd, draw(st.integers(0, 10**6)))


def edges(ranks: int) -> list[Case]:
    """One token each for everybody; nothing at all; only the last rank has tokens; all tokens to the same experts."""
    K = min(ranks, 4)
    kinds = (
        ([1] * ranks, "spread"),
        ([0] * ranks, "spread"),
        ([0] * (ranks - 1) + [3], "spread"),
        ([5] * ranks, "one"),
    )
    return [Case(tokens, K, ranks, 2, torch.float64, crowd, 0) for tokens, crowd in kinds]


def work(dispatch: Dispatch, x: Tensor, experts: Tensor, gates: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
    """Through the experts (a product with the expert's weight, then with the gate) and back, and the gradients."""
    x, gates, weights = (t.clone().requires_grad_() for t in (x, gates, weights))
    handle = dispatch.start(x, experts, gates)
    tokens, arrived_gates, counts = handle.wait()
    expert = torch.arange(len(weights)).repeat_interleave(counts)
    y = handle.combine(tokens * weights[expert] * arrived_gates[:, None].to(x.dtype)).wait()
    y.backward(dy)
    return [y.detach(), x.grad, gates.grad, weights.grad, tokens.detach(), counts]


def mine(case: Case, rank: int, size: int) -> tuple[slice, slice]:
    """This rank's tokens and experts among all."""
    start, each = sum(case.tokens[:rank]), case.E // size
    return slice(start, start + case.tokens[rank]), slice(rank * each, (rank + 1) * each)


def transpose(case: Case, per_node: int | None) -> tuple[float, float]:
    """⟨scatter(x), y⟩ and ⟨x, gather(y)⟩, and the same for gates, over all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, experts, gates, *_ = case.everything()
    here, _ = mine(case, rank, size)
    dispatch = TwoHop(mesh_of(per_node), case.E) if per_node else AllToAll(None, case.E)
    exchange = dispatch.plan(experts[here])  # a plan may do without x
    rows, numbers = exchange.scatter(x[here], gates[here]).wait()
    assert torch.equal(exchange.scatter(x[here], gates[here]).wait()[1], numbers)  # and gates may travel again
    g = torch.Generator().manual_seed(case.seed + rank)
    y, w = torch.randn(rows.shape, generator=g).to(x), torch.randn(len(rows), generator=g).to(gates)
    sums, back = exchange.gather(y, w).wait()
    assert sums.shape == x[here].shape and back.shape == gates[here].shape
    both = torch.stack([(rows * y).sum() + (numbers * w).sum(), (x[here] * sums).sum() + (gates[here] * back).sum()])
    dist.all_reduce(both)
    return both[0].item(), both[1].item()


class Fp8Twin(LocalDispatch):
    """Nothing travels, but what would have travelled as FP8 is quantised all the same."""

    def plan(self, experts: Tensor, x: Tensor | None = None) -> LocalExchange:
        exchange = super().plan(experts)
        scatter = exchange.scatter

        def quantised(x: Tensor, gates: Tensor | None) -> Done:
            codes, scale = quantize_activation(x, pow2=True)
            return scatter(dequantize_activation(codes, scale, x.dtype), gates)

        exchange.scatter = quantised
        return exchange


def check(case: Case, make, twin=LocalDispatch) -> None:
    """On every rank: what `make(E)` gives is what the local twin gives for everybody's tokens at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, experts, gates, weights, dy = case.everything()
    here, held = mine(case, rank, size)
    found = work(make(case.E), x[here], experts[here], gates[here], weights[held], dy[here])
    y, dx, dgates, dweights, tokens, counts = work(twin(case.E), x, experts, gates, weights, dy)
    assert found[5].tolist() == counts[held].tolist()
    start = int(counts[: held.start].sum())
    assert torch.equal(found[4], tokens[start : start + int(counts[held].sum())])  # sorted as if nothing had travelled
    whole = y, dx, dgates, dweights
    expected = [y[here], dx[here], dgates[here], dweights[held]]
    # Sums round by the size of what is added, which may nearly cancel: so the scale is that of all ranks' numbers.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[case.dtype]
    for name, a, b, every in zip(("y", "dx", "dgates", "dweights"), found, expected, whole, strict=False):
        scale = float(every.abs().max()) if every.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


def direct(case: Case, asynchronous: bool) -> None:
    check(case, lambda E: AllToAll(None, E, asynchronous=asynchronous))


def two_hop(case: Case, per_node: int, asynchronous: bool) -> None:
    mesh = mesh_of(per_node)
    check(case, lambda E: TwoHop(mesh, E, asynchronous=asynchronous))


def fp8(case: Case, per_node: int | None) -> None:
    make = (lambda E: TwoHop(mesh_of(per_node), E, fp8=True)) if per_node else (lambda E: AllToAll(None, E, fp8=True))
    check(case, make, Fp8Twin)


@functools.cache
def mesh_of(per_node: int) -> Mesh:
    """All ranks share the experts."""
    return make_mesh(ep=dist.get_world_size(), ranks_per_node=per_node)


@pytest.mark.parametrize(("ranks", "per_node"), [(2, None), (4, 2)])
def test_gather_is_scatter_transposed(pool, ranks, per_node):
    @settings(max_examples=15)
    @given(cases(ranks, dtypes=(torch.float64,)))
    def test(case):
        there, back = pool(ranks).run(transpose, case, per_node)[0]
        assert there == pytest.approx(back, rel=1e-12, abs=1e-11)

    test()


@pytest.mark.parametrize(("ranks", "per_node"), [(2, None), (4, None), (4, 2)])
def test_an_fp8_payload_equals_the_twin_with_the_same_quantisation(pool, ranks, per_node):
    @settings(max_examples=15)
    @given(cases(ranks, dtypes=(torch.float32, torch.bfloat16), widths=(1, 8, 130)))
    def test(case):
        pool(ranks).run(fp8, case, per_node)

    test()


def count(case: Case, per_node: int, hops: int, fp8: bool) -> None:
    """What is counted while tokens travel is what the routing foretells, on every rank, there and back."""
    size, rank = dist.get_world_size(), dist.get_rank()
    kinds = {"fp8": fp8}
    dispatch = (
        TwoHop(mesh_of(per_node), case.E, **kinds)
        if hops == 2
        else AllToAll(None, case.E, ranks_per_node=per_node, **kinds)
    )
    x, experts, gates, weights, dy = case.everything()
    here, held = mine(case, rank, size)
    work(dispatch, x[here], experts[here], gates[here], weights[held], dy[here])
    source = torch.arange(size).repeat_interleave(torch.tensor(case.tokens))
    sizes = {"width": case.D, "element_bytes": x.element_size(), "gate_bytes": gates.element_size()}
    for at in (rank, None):
        expected = [
            traffic_of(
                experts,
                case.E,
                size,
                per_node,
                two_hop=hops == 2,
                source=source,
                rank=at,
                backward=backward,
                **sizes,
                **kinds,
            )
            for backward in (False, True)
        ]
        found: list = [dispatch.traffic]
        if at is None:
            found = [None] * size
            dist.all_gather_object(found, dispatch.traffic)
        for way in ("scatter", "gather"):
            assert sum((f[way] for f in found), Traffic()) == expected[0][way] + expected[1][way], (way, at)
    dispatch.forget_traffic()
    assert dispatch.traffic == {"scatter": Traffic(), "gather": Traffic()}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_direct_equals_the_local_twin(pool, ranks, asynchronous):
    @settings(max_examples=20)
    @given(cases(ranks))
    def test(case):
        pool(ranks).run(direct, case, asynchronous)

    for case in edges(ranks):
        pool(ranks).run(direct, case, asynchronous)
    test()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 1), (4, 2), (4, 1), (4, 4)])
def test_two_hops_equal_the_local_twin(pool, ranks, per_node, asynchronous):
    @settings(max_examples=15)
    @given(cases(ranks))
    def test(case):
        pool(ranks).run(two_hop, case, per_node, asynchronous)

    for case in edges(ranks):
        pool(ranks).run(two_hop, case, per_node, asynchronous)
    test()


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 1), (4, 2)])
def test_bytes_per_link_are_as_foretold(pool, ranks, per_node, hops):
    @settings(max_examples=15)
    @given(cases(ranks), st.booleans())
    def test(case, fp8):
        pool(ranks).run(count, case, per_node, hops, fp8)

    test()
