"""ZeRO-1 equals plain data parallelism bit for bit, keeps what it should, and says what is wrong."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.optim.shards import Kind
from dsv3_book.optim.zero import ZeRO1

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


def gradients(model: Transformer, step: int) -> None:
    """A micro-batch of this rank's own."""
    draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
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
