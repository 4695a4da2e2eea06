"""ZeRO-1: what is wrong is said, on every rank that can know it, before anything is sent."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3_book.optim import Kind, ZeRO1

pytestmark = pytest.mark.distributed


def mistakes() -> dict[str, str]:
    rank, told = dist.get_rank(), {}

    def attempt(name: str, work) -> None:
        try:
            work()
            told[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            told[name] = str(error)

    def made(*named: tuple[str, nn.Parameter], **settings) -> ZeRO1:
        return ZeRO1([Kind(list(named), dist.group.WORLD)], dist.group.WORLD, lr=0.1, **settings)

    def p(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape))

    attempt("shapes", lambda: made(("a", p(2)), ("b", p(3 + rank))))
    attempt("names", lambda: made(("a", p(2)), (f"b{rank}", p(2))))
    attempt("fewer", lambda: made(*[("a", p(2)), ("b", p(2))][: 2 - rank]))
    attempt("group", lambda: ZeRO1([Kind([("a", p(2))], dist.group.WORLD)], None, lr=0.1))
    good = made(("a", p(2)))
    attempt("order", good.step)
    attempt("backward", good.reduce)
    weight = good.shards.named()[0][1]
    weight.grad = torch.ones(2)
    weight.data = weight.data.clone()
    attempt("moved", good.reduce)
    return told


def test_bad_input_is_told(pool) -> None:
    one, other = pool(2).run(mistakes)
    assert one == other
    assert one["shapes"].endswith(
        "rank 1 of the group has ('b', (4,), 'torch.float32') where its rank 0 has ('b', (3,), 'torch.float32')"
    )
    assert "rank 1 of the group has ('b1'" in one["names"]
    assert "rank 1 of the group has no more where its rank 0 has ('b'" in one["fewer"]
    assert "`world`" in one["group"]
    assert one["order"].endswith("call reduce() first")
    assert "no gradient at all for a" in one["backward"]
    assert one["moved"].startswith("a has other memory than when the optimiser was made")


def test_settings_that_do_not_go_together() -> None:
    def made(dtype: torch.dtype = torch.float32, **settings) -> ZeRO1:
        return ZeRO1([Kind([("a", nn.Parameter(torch.ones(2, dtype=dtype)))], None)], None, lr=0.1, **settings)

    with pytest.raises(ValueError, match="weights must be one of fp32, bf16, got 'fp8'"):
        made(weights="fp8")
    with pytest.raises(ValueError, match="weights must be fp32, or zero True"):
        made(weights="bf16", zero=False)
    with pytest.raises(ValueError, match=r"a is torch\.bfloat16: give fp32 parameters"):
        made(torch.bfloat16)
    with pytest.raises(ValueError, match="listed twice: a"):
        ZeRO1([Kind([("a", nn.Parameter(torch.ones(1)))], None) for _ in range(2)], None, lr=0.1)
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="in two kinds"):
        ZeRO1([Kind([(name, p)], None) for name in "ab"], None, lr=0.1)
    optimizer = made()
    for _, p in optimizer.shards.named():
        p.grad = torch.ones(2)
    optimizer.reduce()
    with pytest.raises(RuntimeError, match="summed already"):
        optimizer.reduce()
    with pytest.raises(ValueError, match="max_norm must be positive, got nan"):
        optimizer.clip(float("nan"))
    optimizer.zero_grad()
    state = optimizer.tensors()
    with pytest.raises(ValueError, match=r"the optimiser's a\.exp_avg is missing"):
        optimizer.load({name: value for name, value in state.items() if name != "a.exp_avg"})
    with pytest.raises(ValueError, match=r"a\.exp_avg_sq has shape \(3,\); \(2,\) is needed"):
        optimizer.load(state | {"a.exp_avg_sq": torch.zeros(3)})
