"""The adapter to DeepEP, held to a stand-in: it checks what it is given and answers as the library's own reference in
plain torch does. Nothing here has seen a GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.model.dispatch import LocalDispatch
from dsv3_book.parallel import choose, deep_ep
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.deep_ep import DeepEp
from dsv3_book.parallel.mesh import Layout, Mesh
from dsv3_book.parallel.transport import Transport


class Stream:
    def __init__(self) -> None:
        self.waited = False

    def current_stream_wait(self) -> None:
        self.waited = True


class ElasticBuffer:
    """Of a group of one, that is asked to leave out the experts from `here` on, as if another rank had them."""

    made: ClassVar[list] = []
    here = 10**6

    def __init__(self, group, *, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, deterministic):
        assert deterministic
        self.hidden, self.topk, self.limit, self.fp8 = hidden, num_topk, num_max_tokens_per_rank, use_fp8_dispatch
        ElasticBuffer.made.append(self)

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        async_with_compute_stream=False,
        handle=None,
    ):
        assert async_with_compute_stream
        assert isinstance(x, tuple) == self.fp8
        codes, scales = x if self.fp8 else (x, None)
        assert codes.dtype == (torch.float8_e4m3fn if self.fp8 else torch.bfloat16) and codes.is_contiguous()
        assert codes.shape[1] == self.hidden and len(codes) <= self.limit
        if scales is not None:
            assert scales.dtype == torch.float32 and scales.shape == (len(codes), -(-self.hidden // 128))
        if handle is None:
            assert topk_idx.dtype == torch.int64 and topk_idx.shape == (len(codes), self.topk)
            assert num_max_tokens_per_rank == self.limit and num_experts
            handle = SimpleNamespace(topk_idx=topk_idx, rows=((topk_idx < self.here).any(1)).nonzero()[:, 0])
        else:
            assert topk_idx is None and num_experts is None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.shape == handle.topk_idx.shape
            topk_weights = topk_weights[handle.rows]
        pick = lambda t: (
            t.view(torch.uint8)[handle.rows].view(t.dtype) if t.dtype == torch.float8_e4m3fn else t[handle.rows]
        )
        came = tuple(map(pick, x)) if self.fp8 else pick(x)
        experts = handle.topk_idx[handle.rows]
        return came, experts.masked_fill(experts >= self.here, -1), topk_weights, handle, Stream()

    def combine(self, x, handle, topk_weights=None, async_with_compute_stream=False):
        assert x.dtype == torch.bfloat16 and x.shape == (len(handle.rows), self.hidden) and async_with_compute_stream
        back = lambda t: torch.zeros(len(handle.topk_idx), t.shape[1], dtype=t.dtype).index_copy(0, handle.rows, t)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.shape == (len(handle.rows), self.topk)
            topk_weights = back(topk_weights)
        return back(x), topk_weights, Stream()


@pytest.fixture
def library(monkeypatch):
    module = ModuleType("deep_ep")
    module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(ElasticBuffer, "here", 10**6)
    ElasticBuffer.made.clear()
    return module


ALONE = dist.ProcessGroup(0, 1)


def travel(dispatch, x, experts, gates, dy):
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    handle = dispatch.start(x, experts, gates)
    tokens, arrived, counts = handle.wait()
    y = handle.combine(tokens * arrived[:, None].to(x.dtype)).wait()
    y.backward(dy)
    return tokens.detach(), counts, y.detach(), x.grad, gates.grad


@pytest.mark.parametrize("fp8", [False, True])
def test_it_gives_what_our_own_gives(library, fp8):
    @given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
    def test(N, K, seed):
        g = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(N, 130, generator=g).bfloat16() for _ in range(2))
        experts = torch.stack([torch.randperm(4, generator=g)[:K] for _ in range(N)])
        gates = torch.rand(N, K, generator=g)
        ours = travel(AllToAll(None, 4, fp8=fp8), x, experts, gates, dy)
        theirs = travel(DeepEp(ALONE, 4, 8, fp8=fp8), x, experts, gates, dy)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)

    test()
    assert ElasticBuffer.made[-1].limit == 8


def test_experts_elsewhere_are_left_out(library, monkeypatch):
    monkeypatch.setattr(ElasticBuffer, "here", 2)
    x, gates = torch.arange(3.0)[:, None].bfloat16(), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    exchange = DeepEp(ALONE, 4, 8).plan(torch.tensor([[1, 3], [2, 3], [0, 1]]))
    rows, numbers = exchange.scatter(x, gates).wait()
    assert exchange.counts.tolist() == [1, 2, 0, 0]
    assert rows[:, 0].tolist() == [2, 0, 2]
    torch.testing.assert_close(numbers, torch.tensor([0.5, 0.1, 0.6]))
    total, back = exchange.gather(torch.tensor([[1.0], [2.0], [4.0]]).bfloat16(), torch.tensor([1.0, 2.0, 4.0])).wait()
    assert total[:, 0].tolist() == [2, 0, 5]
    assert back.tolist() == [[2, 0], [0, 0], [1, 4]]


def test_what_it_cant_take_is_refused(library):
    exchange = DeepEp(ALONE, 4, 2).plan(torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match=r"3 rows of torch.bfloat16: DeepEP takes up to 2 \(max_tokens\) of bfloat16"):
        exchange.scatter(torch.zeros(3, 1).bfloat16(), None)
    with pytest.raises(AttributeError, match="must have arrived"):
        _ = exchange.counts


@pytest.mark.parametrize(
    ("cuda", "installed", "backend", "tokens", "transport", "expected"),
    [
        (True, True, "nccl", 8, None, DeepEp),
        (False, True, "nccl", 8, None, AllToAll),
        (True, False, "nccl", 8, None, AllToAll),
        (True, True, "gloo", 8, None, AllToAll),
        (True, True, "nccl", None, None, AllToAll),
        (True, True, "nccl", 8, Transport(), AllToAll),
    ],
)
def test_when_it_is_chosen(library, monkeypatch, cuda, installed, backend, tokens, transport, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(choose.dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(choose.deep_ep, "DeepEp", lambda *a, **k: DeepEp.__new__(DeepEp))
    monkeypatch.setattr(choose, "AllToAll", lambda *a, **k: AllToAll.__new__(AllToAll))
    layout = Layout(1, 2, 2, 2)
    mesh = Mesh(layout, 0, {"ep": ALONE}, None)
    assert type(choose.make_dispatch(mesh, 4, transport=transport, max_tokens=tokens)) is expected


def test_alone_nothing_travels():
    mesh = Mesh(Layout(1, 1, 1, 1), 0, {"ep": None}, None)
    assert type(choose.make_dispatch(mesh, 4)) is LocalDispatch
    assert not deep_ep.available()
