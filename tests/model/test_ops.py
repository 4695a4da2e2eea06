"""The hand-written backward passes against autograd on the plain formulas, and the loss in chunks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.model import ops

sizes = st.integers(1, 9)


def both(fast, slow, *inputs):
    """Asserts equal outputs and equal gradients of a weighted sum of them."""
    answers = []
    for fn in (fast, slow):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
        y = fn(*leaves)
        (y * torch.linspace(0.5, 2, y.numel()).view_as(y)).sum().backward()
        answers.append([y.detach(), *(t.grad for t in leaves if t.is_floating_point())])
    for a, b in zip(*answers):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, st.integers(0, 99), st.sampled_from([1e-6, 1e-3]))
def test_rms_norm(n, width, seed, eps):
    both(
        lambda x, w: ops.rms_norm(x, w, eps),
        lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w,
        noise(seed, 2, n, width) + 0.1,
        noise(seed + 1, width),
    )


@given(sizes, sizes, st.integers(0, 99))
def test_swiglu(n, width, seed):
    both(ops.swiglu, lambda a, b: F.silu(a) * b, noise(seed, n, width), noise(seed + 1, n, width))


def test_rms_norm_of_bf16_keeps_its_mean_in_fp32():
    x = (noise(0, 4, 4096) * 30).bfloat16()
    y = ops.rms_norm(x, torch.ones(4096), 1e-6)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float().pow(2).mean(-1), torch.ones(4), atol=0.01, rtol=0)
    assert not ops.rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-6).any()


@given(st.integers(1, 20), sizes, st.integers(2, 30), st.none() | st.integers(1, 25), st.integers(0, 99))
def test_cross_entropy_in_chunks_is_plain_cross_entropy(n, width, vocab, chunk, seed):
    targets = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
    both(
        lambda x, w: ops.linear_cross_entropy(x, w, targets, chunk),
        lambda x, w: F.cross_entropy(x @ w.T, targets),
        noise(seed, n, width),
        noise(seed + 1, vocab, width),
    )


def test_cross_entropy_without_gradients_and_with_huge_logits():
    x, w = noise(0, 7, 5) * 300, noise(1, 11, 5)
    targets = torch.arange(7)
    expected = F.cross_entropy(x @ w.T, targets)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(x, w, targets, 3), expected)
    torch.testing.assert_close(ops.linear_cross_entropy(x.requires_grad_(), w, targets, 3), expected)


def test_no_tensor_of_all_logits_exists():
    """While the loss and its gradients are computed, no single tensor is as large as N·V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    x, w = noise(0, 8192, 8).requires_grad_(), noise(1, 1024, 8).requires_grad_()
    with Watch():
        ops.linear_cross_entropy(x, w, torch.zeros(8192, dtype=torch.int64)).backward()
    assert 0 < largest <= 8192 * 1024 / 4


def test_a_chunk_is_gone_before_the_next_is_made():
    """Two matrices of a chunk's logits are alive at a time: a third would be the chunk before, held by a name."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocab, most = 16, 64, 0
    alive: dict[int, StorageWeakRef] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() == 4 * rows * vocab:
                    alive[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())
            most = max(most, sum(not ref.expired() for ref in alive.values()))
            return out

    x, w = noise(0, 5 * rows, 8).requires_grad_(), noise(1, vocab, 8).requires_grad_()
    with Watch():
        ops.linear_cross_entropy(x, w, torch.zeros(5 * rows, dtype=torch.int64), rows).backward()
    assert most == 2


@pytest.mark.parametrize("enabled", [False, True])
def test_recomputed_gives_the_same_bits(enabled):
    x, w = noise(0, 6, 8).requires_grad_(), noise(1, 3, 8).requires_grad_()
    calls = []

    def fn(t):
        calls.append(1)
        return torch.tanh(t) * 2

    with ops.recomputed(fn, x, enabled=enabled) as y:
        z = F.linear(y, w)
    z.square().sum().backward()
    a, b = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    F.linear(torch.tanh(a) * 2, b).square().sum().backward()
    assert torch.equal(x.grad, a.grad) and torch.equal(w.grad, b.grad)
    assert len(calls) == (2 if enabled else 1)


def test_recomputed_without_gradients_computes_once():
    with torch.no_grad(), ops.recomputed(torch.exp, torch.zeros(2)) as y:
        assert y.tolist() == [1.0, 1.0]
