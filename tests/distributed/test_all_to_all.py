"""Dispatch and combine between processes equal the local twin, outputs and gradients, for any routing."""

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_book.model.dispatch import Dispatch, LocalDispatch
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import Mesh, make_mesh
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


def check(case: Case, make) -> None:
    """On every rank: what `make(E)` gives is what the local twin gives for everybody's tokens at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, experts, gates, weights, dy = case.everything()
    here, held = mine(case, rank, size)
    found = work(make(case.E), x[here], experts[here], gates[here], weights[held], dy[here])
    y, dx, dgates, dweights, tokens, counts = work(LocalDispatch(case.E), x, experts, gates, weights, dy)
    assert found[5].tolist() == counts[held].tolist()
    start = int(counts[: held.start].sum())
    assert torch.equal(found[4], tokens[start : start + int(counts[held].sum())])  # sorted as if nothing had travelled
    expected = [y[here], dx[here], dgates[here], dweights[held]]
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[case.dtype]
    for name, a, b in zip(("y", "dx", "dgates", "dweights"), found, expected, strict=False):
        scale = float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


def direct(case: Case, asynchronous: bool) -> None:
    check(case, lambda E: AllToAll(None, E, asynchronous=asynchronous))


def two_hop(case: Case, per_node: int, asynchronous: bool) -> None:
    mesh = mesh_of(per_node)
    check(case, lambda E: TwoHop(mesh, E, asynchronous=asynchronous))


@functools.cache
def mesh_of(per_node: int) -> Mesh:
    """All ranks share the experts."""
    return make_mesh(ep=dist.get_world_size(), ranks_per_node=per_node)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_direct_equals_the_local_twin(pool, ranks, asynchronous):
    @settings(max_examples=20)
    @given(cases(ranks))
    def test(case):
        pool(ranks).run(direct, case, asynchronous)

    test()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 1), (4, 2), (4, 1), (4, 4)])
def test_two_hops_equal_the_local_twin(pool, ranks, per_node, asynchronous):
    @settings(max_examples=15)
    @given(cases(ranks))
    def test(case):
        pool(ranks).run(two_hop, case, per_node, asynchronous)

    test()
