"""ZeRO-1 equals plain data parallelism bit for bit, keeps what it should, and says what is wrong."""

from collections.abc import Iterable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.costs_memory import ema_bytes, zero1_bytes
from dsv3_book.model import Transformer
from dsv3_book.optim import EMA, Kind, ZeRO1
from dsv3_book.parallel import DataParallel, buckets
from dsv3_book.parallel.buckets import ALIGN

pytestmark = pytest.mark.distributed

STEPS, BUCKET, CLIP = 3, 5000, 0.05  # buckets so small that parameters are cut; a norm that clips every step


def tiny() -> ModelConfig:
    return ModelConfig.preset("tiny").replace(num_hidden_layers=2)


def kinds(model: Transformer) -> list[Kind]:
    """Experts apart: two ranks share all; of four, ranks 0 and 2 hold the same experts, 1 and 3 the others."""
    size, rank = dist.get_world_size(), dist.get_rank()
    edp = dist.group.WORLD
    if size == 4:
        edp = [dist.new_group([first, first + 2]) for first in range(2)][rank % 2]
    named = list(model.named_parameters())
    experts = [(name, p) for name, p in named if ".experts." in name]
    return [Kind([pair for pair in named if ".experts." not in pair[0]], dist.group.WORLD), Kind(experts, edp)]


def model() -> Transformer:
    """Ranks of one edp group begin with the same experts, the groups with different ones."""
    made = Transformer(tiny(), seed=0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".experts." in name:
                p.mul_(1 + dist.get_rank() % 2 * (dist.get_world_size() == 4))
    return made


def gradients(model: Transformer, step: int, rank: int | None = None) -> None:
    """A micro-batch of this rank's own, or of another's."""
    draw = torch.Generator().manual_seed(100 * step + (dist.get_rank() if rank is None else rank))
    tokens = torch.randint(model.cfg.vocab_size, (1, 18), generator=draw)
    losses = model.losses(tokens)
    (losses.main + 0.3 * losses.mtp + losses.balance).backward()


def train(zero: bool, moments: str, bucket: int = BUCKET, **settings) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of all steps; weights and state at the end."""
    net = model()
    optimizer = ZeRO1(kinds(net), dist.group.WORLD, lr=1e-2, moments=moments, zero=zero, bucket=bucket, **settings)
    norms = []
    for step in range(STEPS):
        gradients(net, step)
        optimizer.reduce()
        norms.append(optimizer.clip(CLIP).item())
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return norms, weights | optimizer.tensors()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_zero1_is_data_parallel_bit_for_bit(pool, ranks: int, moments: str) -> None:
    """Weights, moments and clipping norm, three steps; with four ranks experts are held by two, the rest by all."""
    plain = pool(ranks).run(train, zero=False, moments=moments)
    sharded = pool(ranks).run(train, zero=True, moments=moments)
    for rank, (one, other) in enumerate(zip(plain, sharded, strict=True)):
        assert one[0] == other[0] == plain[0][0], rank
        assert all(norm > CLIP for norm in one[0])
        assert one[1].keys() == other[1].keys()
        assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []
        for name in one[1]:
            same = rank % 2 == 0 or ranks == 2 or ".experts." not in name or name.endswith(".step")
            assert torch.equal(one[1][name], plain[0][1][name]) == same, (rank, name)


def sums_three_ways() -> tuple[list[str], list[str]]:
    """Names whose gradients, summed over ranks, differ: as ZeRO-1 sums them from `DataParallel`'s, and these from those
    of one process that runs all ranks' micro-batches one after the other."""
    size, net = dist.get_world_size(), Transformer(tiny(), seed=0)
    for rank in range(size):
        gradients(net, 0, rank)
    alone = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    gradients(net, 0)
    own = [p.grad.clone() for p in net.parameters()]
    DataParallel(dist.get_rank(), size).sum_gradients(net.parameters())
    summed = {name: p.grad.clone() for name, p in net.named_parameters()}
    for p, grad in zip(net.parameters(), own, strict=True):
        p.grad = grad
    optimizer = ZeRO1([Kind(list(net.named_parameters()), dist.group.WORLD)], dist.group.WORLD, lr=0.1, bucket=BUCKET)
    optimizer.reduce()
    assert all(p.grad is None for p in net.parameters())
    sharded = optimizer.shards.whole([s.weight.grad for s in optimizer.shards.pieces()])
    names = list(alone)
    return (
        [n for n in names if not torch.equal(sharded[n], summed[n])],
        [n for n in names if not torch.equal(summed[n], alone[n])],
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_are_in_the_order_of_the_ranks(pool, ranks: int) -> None:
    """((g0 + g1) + g2) + g3: with one micro-batch a rank, bit for bit what one process adds up in `.grad`."""
    assert pool(ranks).run(sums_three_ways) == [([], [])] * ranks


def norm_of_many_kinds(zero: bool) -> float:
    """Two pipeline stages of two ranks each; what all hold, what a stage holds, what one rank holds."""
    rank = dist.get_rank()
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tied, stage, expert = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    held = [Kind([("tied", tied)], dist.group.WORLD), Kind([("stage", stage)], stages[rank // 2])]
    optimizer = ZeRO1([*held, Kind([("expert", expert)], None)], dist.group.WORLD, lr=0.1, zero=zero)
    # Sums: tied 4 · 3 = 12, the stages 2 · 4 and 2 · 8, the experts 1, 2, 3, 4.
    tied.grad, stage.grad, expert.grad = (torch.tensor([x]) for x in (3.0, 4.0 * (1 + rank // 2), 1.0 + rank))
    optimizer.reduce()
    return optimizer.clip(1.0).item()


@pytest.mark.parametrize("zero", [False, True])
def test_the_norm_counts_every_parameter_once(pool, zero: bool) -> None:
    exact = (12**2 + 8**2 + 16**2 + 1 + 4 + 9 + 16) ** 0.5
    assert pool(4).run(norm_of_many_kinds, zero) == [pytest.approx(exact, rel=1e-6)] * 4


def held_bytes(moments: str, weights: str) -> tuple[dict[str, int], int, int]:
    """Bytes of what this rank keeps, counted by memory (each storage once), and its weights by kind."""
    net = model()
    others, experts = kinds(net)
    numbers = [sum(p.numel() for _, p in kind.named) for kind in (others, experts)]
    optimizer = ZeRO1([others, experts], dist.group.WORLD, lr=1e-2, moments=moments, weights=weights, bucket=BUCKET)
    gradients(net, 0)
    gradient = storage(p.grad for p in net.parameters())
    optimizer.reduce()
    optimizer.step()
    pieces, weight = optimizer.shards.pieces(), storage(net.parameters())
    states = [optimizer.optimizer.state_of(s.weight) for s in pieces]
    found = {
        "weights": weight,
        "master": storage([*net.parameters(), *(s.weight for s in pieces)]) - weight,
        "gradients": gradient,
        "moments": storage(state[key] for state in states for key in ("exp_avg", "exp_avg_sq")),
    }
    return found, *numbers


def storage(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("moments", "weights"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_memory_is_as_computed(pool, moments: str, weights: str) -> None:
    """Per rank, to the padding of the buckets; over all ranks, not a number of state too many."""
    answers = pool(4).run(held_bytes, moments, weights)
    _, others, experts = answers[0]
    expected = zero1_bytes(others, experts, dp=4, edp=2, weights=weights, moments=moments)
    padding = 8 * ALIGN * (4 + 2 + len(list(Transformer(tiny()).parameters())))
    assert padding < 0.2 * expected.moments
    for found, *_ in answers:
        for name, count in found.items():
            assert abs(count - getattr(expected, name)) <= padding, name
    each = 2 * {"fp32": 4, "bf16": 2}[moments]
    assert sum(found["moments"] for found, *_ in answers) == each * (others + 2 * experts)
    alone = zero1_bytes(others, experts, 1, 1, weights, moments)
    assert alone.moments / expected.moments > 2.5


def go_on(tensors: dict[str, Tensor] | None, weights: str, ranks: int) -> dict[str, Tensor] | None:
    """Trains two steps (from there); the first `ranks` ranks take part, and all of these run the same micro-batches."""
    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() >= ranks:
        return None
    net = Transformer(tiny(), seed=0)
    if tensors:
        net.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    named = list(net.named_parameters())
    optimizer = ZeRO1([Kind(named, group)], group, lr=1e-2, moments="bf16", weights=weights, bucket=BUCKET)
    if tensors:
        optimizer.load(tensors)
        again = optimizer.tensors()
        assert all(
            torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype for name, value in again.items()
        )
    for step in range(2):
        gradients(net, step, 0)
        for p in net.parameters():
            p.grad /= ranks  # so that the sum is the same on 1, 2 and 4 ranks, to the last bit
        optimizer.reduce()
        optimizer.step()
    return optimizer.tensors() | {f"model.{name}": value.detach().clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_state_goes_on_with_another_number_of_ranks(pool, weights: str) -> None:
    """Two steps on one, two, four ranks, then two more on another number: the same bits."""
    first = [pool(4).run(go_on, None, weights, ranks)[0] for ranks in (1, 2, 4)]
    for other in first[1:]:
        assert [name for name in other if not torch.equal(other[name], first[0][name])] == []
    assert first[0]["lm_head.weight.step"] == 2 and first[0]["lm_head.weight.exp_avg"].dtype == torch.bfloat16
    second = [pool(4).run(go_on, first[2 - i], weights, ranks)[0] for i, ranks in enumerate((1, 2, 4))]
    for other in second:
        assert [name for name in other if not torch.equal(other[name], second[0][name])] == []
        assert other["lm_head.weight.step"] == 4


def masters(weights: str) -> tuple[dict[str, Tensor], list[bool]]:
    """Steps from gradients that are given: master weights, and whether the parameters are these, rounded."""
    net = model()
    optimizer = ZeRO1(kinds(net), dist.group.WORLD, lr=1e-2, moments="bf16", weights=weights, bucket=BUCKET)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        versions = [p._version for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.reduce()
        optimizer.clip(CLIP)
        optimizer.step()
        assert all(p._version > before for p, before in zip(net.parameters(), versions, strict=True))
    whole = optimizer.shards.whole([s.weight for s in optimizer.shards.pieces()])
    return whole, [torch.equal(p, whole[name].to(p.dtype)) for name, p in net.named_parameters()]


def test_bf16_weights_are_the_fp32_master_weights_rounded(pool) -> None:
    """The masters start from the fp32 numbers and take the very steps that fp32 weights take."""
    wide, narrow = (pool(4).run(masters, weights) for weights in ("fp32", "bf16"))
    for (one, equal), (other, rounded) in zip(wide, narrow, strict=True):
        assert all(equal) and all(rounded)
        assert all(torch.equal(one[name], other[name]) for name in one)


def trained_in_bf16() -> tuple[set[torch.dtype], set[torch.dtype], list[float]]:
    net = Transformer(tiny(), seed=0, compute_dtype=torch.bfloat16)
    named = list(net.named_parameters())
    optimizer = ZeRO1([Kind(named, dist.group.WORLD)], dist.group.WORLD, lr=1e-2, moments="bf16", weights="bf16")
    norms = []
    for _ in range(4):
        gradients(net, 0)
        gradients(net, 0)
        dtypes = {p.grad.dtype for p in net.parameters()}
        optimizer.reduce()
        norms.append(optimizer.clip(1.0).item())
        optimizer.step()
    return {p.dtype for p in net.parameters()}, dtypes, norms


def test_bf16_weights_get_fp32_gradients(pool) -> None:
    for dtypes, gradient_dtypes, norms in pool(2).run(trained_in_bf16):
        assert dtypes == {torch.bfloat16} and gradient_dtypes == {torch.float32}
        assert all(0 < norm < 100 for norm in norms)


def average() -> tuple[bool, bool, bool, int]:
    net = model()
    optimizer = ZeRO1(kinds(net), dist.group.WORLD, lr=1e-2, bucket=BUCKET)
    ema = EMA(optimizer.masters(), 0.9)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(STEPS):
        gradients(net, step)
        optimizer.reduce()
        ema.before_step()
        optimizer.step()
        ema.update()
        expected = {name: torch.lerp(expected[name], p.detach(), 1 - 0.9) for name, p in net.named_parameters()}
    found = optimizer.shards.whole(list(ema.tensors().values()))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with ema.swapped(optimizer.gather_weights):
        inside = all(torch.equal(p, expected[name]) for name, p in net.named_parameters())
    after = all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    return all(torch.equal(found[n], expected[n]) for n in found), inside, after, storage(ema.average.values())


def test_the_average_of_shards_is_the_average(pool) -> None:
    """Each rank averages its shard; put together, and in the weights' place, it is the definition's, bit for bit."""
    answers = pool(4).run(average)
    assert [answer[:3] for answer in answers] == [(True, True, True)] * 4
    net = Transformer(tiny())
    experts = sum(p.numel() for name, p in net.named_parameters() if ".experts." in name)
    others = sum(p.numel() for p in net.parameters()) - experts
    assert sum(answer[3] for answer in answers) == 4 * (others + 2 * experts)
    assert answers[0][3] == pytest.approx(ema_bytes(others, experts, 4, 2) / 2, rel=0.2)


def natively_summed() -> tuple[bool, bool]:
    """The library's own reduce-scatter, which NCCL gets, here asked of gloo."""
    group, row = dist.group.WORLD, torch.arange(256.0) * (1 + dist.get_rank())
    mine = row.view(2, -1)[dist.get_rank()] / (1 + dist.get_rank()) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "another")
        native = buckets.start_reduce_scatter(row.clone(), group)()
    return torch.equal(native, mine), torch.equal(buckets.start_reduce_scatter(row, group)(), mine)


def test_the_librarys_own_reduce_scatter_gives_the_same_shards(pool) -> None:
    assert pool(2).run(natively_summed) == [(True, True)] * 2


def left_alone(rank_that_leaves: int) -> str:
    """What this rank says when another never sums its gradients."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    net = model()
    optimizer = ZeRO1([Kind(list(net.named_parameters()), group)], group, lr=1e-2)
    if dist.get_rank() == rank_that_leaves:
        return "left"
    gradients(net, 0)
    try:
        optimizer.reduce()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_never_comes_is_missed_by_name(pool) -> None:
    said, left = pool(2).run(left_alone, 1)
    assert left == "left"
    assert said.startswith("rank 0: the sum of gradients of embed_tokens.weight and 50 more with ranks [0, 1] did not")
