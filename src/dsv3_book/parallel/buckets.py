"""Parameters laid in a row and cut into buckets of one size: what data parallelism and ZeRO-1 send.

    parameters   |––– a –––|·|– b –|··|–––––––– c ––––––––|·······|      · padding
    buckets      |        bucket 0        |        bucket 1       |
    shards       |  rank 0   |   rank 1   |  rank 0   |  rank 1   |      of two ranks

All parameters of one *kind* (those that the same ranks hold alike) share a row. Every bucket is cut evenly among these
ranks, so a *shard*, one rank's part, may hold pieces of several parameters and cut one in two. A reduce-scatter leaves
every rank with the sum of its shard, an all-gather gives everybody all shards; one after the other they are an
all-reduce, and with the optimiser's step in between they are ZeRO-1 (`optim/zero.py`).

Cuts lie at multiples of `ALIGN` numbers from a parameter's beginning, always: a vectorised loop treats its last few
numbers differently from the others (torch's fused AdamW differs there in the last bit), so elsewhere a cut would show
in the result.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.parallel.lost import named

ALIGN = 64  # numbers; also 256 bytes of fp32, which suits every kernel that wants aligned weights
BUCKET = 2**22  # numbers in a bucket, 16 MiB of fp32 (our choice: much for a message, little beside a model)
IN_FLIGHT = 2  # buckets under way at a time: one travels while the next is filled

# torch 2.13 renamed these; 2.11 has the old names only.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Piece(NamedTuple):
    """Numbers `begin` to `end` of the flattened parameter number `parameter`, at `at` in what was asked for."""

    parameter: int
    begin: int
    end: int
    at: int


class Layout:
    """Where every number lies; no tensor is needed to know it.

    sizes: numbers in each parameter.  ranks: how many share every bucket.  bucket: numbers in one, rounded up so that
    it divides among the ranks; the last bucket is as short as that allows.
    """

    def __init__(self, sizes: Sequence[int], ranks: int, bucket: int = BUCKET) -> None:
        if ranks < 1 or bucket < 1 or any(size < 0 for size in sizes):
            raise ValueError(f"ranks ({ranks}) and bucket ({bucket}) must be positive, no size negative ({sizes})")
        self.sizes, self.ranks = list(sizes), ranks
        self.starts, total = [], 0
        for size in sizes:
            self.starts.append(total)
            total += _up(size, ALIGN)
        self.total = _up(total, ranks * ALIGN)
        step = _up(bucket, ranks * ALIGN)
        self.buckets = [(begin, min(begin + step, self.total)) for begin in range(0, self.total, step)]

    def shard(self, bucket: int, rank: int) -> tuple[int, int]:
        """Begin and end, in the row, of one rank's part of a bucket."""
        begin, end = self.buckets[bucket]
        part = (end - begin) // self.ranks
        return begin + rank * part, begin + (rank + 1) * part

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """What lies in the row between `begin` and `end`, padding left out."""
        found = []
        for number in range(max(bisect_right(self.starts, begin) - 1, 0), bisect_left(self.starts, end)):
            start = self.starts[number]
            low, high = max(begin, start), min(end, start + self.sizes[number])
            if low < high:
                found.append(Piece(number, low - start, high - start, low - begin))
        return found


class Buckets:
    """The row of the parameters of one kind, over the ranks of `group` that all hold them.

    named: (name, parameter) in the same order on every rank.  group: those ranks; None: this process alone.

    Raises:
        ValueError: none, or the same one twice; different devices; one that is not contiguous.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], group: dist.ProcessGroup | None, bucket: int = BUCKET
    ) -> None:
        self.names, self.parameters = [], []
        for name, p in named:
            self.names.append(name)
            self.parameters.append(p)
        if not self.parameters:
            raise ValueError("a kind of parameters must have at least one")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError(f"a parameter is listed twice among {', '.join(self.names)}")
        if len(devices := {str(p.device) for p in self.parameters}) > 1:
            raise ValueError(f"parameters of one kind must be on one device, found {', '.join(sorted(devices))}")
        if split := [name for name, p in self if not p.is_contiguous()]:
            raise ValueError(f"{split[0]} is not contiguous in memory: make it so before the buckets are laid out")
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group that is to hold {self.names[0]} …")
        self.group = group if self.size > 1 else None  # to itself a rank sends nothing
        self.layout = Layout([p.numel() for p in self.parameters], self.size, bucket)
        self.device = self.parameters[0].device

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter]]:
        return zip(self.names, self.parameters, strict=True)

    def __len__(self) -> int:
        return len(self.layout.buckets)

    def agree(self) -> None:
        """Raises ValueError on every rank if the ranks list other names or shapes, naming the first difference."""
        if self.group is None:
            return
        mine = [(name, tuple(p.shape), str(p.dtype)) for name, p in self]
        everyones: list[list[tuple[str, tuple[int, ...], str]]] = [[] for _ in range(self.size)]
        with self.named("the comparison"):
            dist.all_gather_object(everyones, mine, group=self.group)
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                pairs = zip([*theirs, None], [*everyones[0], None], strict=False)
                here, there = next((a, b) for a, b in pairs if a != b)
                raise ValueError(
                    f"ranks of one group must hold the same parameters in the same order: rank {rank} of the group has "
                    f"{here or 'no more'} where its rank 0 has {there or 'no more'}"
                )

    def shards(self) -> list[tuple[int, int]]:
        """This rank's part of every bucket: begin and end in the row."""
        return [self.layout.shard(b, self.rank) for b in range(len(self))]

    def pieces(self) -> list[list[Piece]]:
        """What this rank's part of every bucket holds."""
        return [self.layout.pieces(*shard) for shard in self.shards()]

    @torch.no_grad()
    def reduce(self, forget: bool = False) -> list[Float[Tensor, " _"]]:
        """Sums all gradients over the group, in fp32; this rank's shard of every bucket's sum.

        A parameter without a gradient counts as zero.  forget: drops each `.grad` once it is on its way, so that beside
        the gradients no more is needed than the shards and the buckets in flight.
        """
        self.require_gradients()
        under_way: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()  # the row must live until it has been sent
        sums: list[Tensor] = []
        for begin, end in self.layout.buckets:
            row = torch.zeros(end - begin, dtype=torch.float32, device=self.device)
            for number, low, high, at in self.layout.pieces(begin, end):
                p = self.parameters[number]
                if p.grad is not None:
                    row[at : at + high - low].copy_(p.grad.reshape(-1)[low:high])
                    if forget and high == p.numel():
                        p.grad = None
            with self.named("the sum of gradients"):
                under_way.append((row, start_reduce_scatter(row, self.group)))
                if len(under_way) == IN_FLIGHT:
                    sums.append(under_way.popleft()[1]())
        with self.named("the sum of gradients"):
            return sums + [finish() for _, finish in under_way]

    def require_gradients(self) -> None:
        """Raises ValueError if no parameter has one."""
        if all(p.grad is None for p in self.parameters):
            raise ValueError(f"no gradient at all for {self.names[0]} …: run the backward pass first")

    @torch.no_grad()
    def gather(self, shards: Iterable[Float[Tensor, " _"]], into: Sequence[Tensor]) -> None:
        """All ranks' shards of every bucket, put together in `into`: one contiguous tensor for each parameter."""
        flat = [t.view(-1) for t in into]
        under_way: deque[tuple[Tensor, list[Piece], dist.Work | None]] = deque()

        def finish() -> None:
            row, pieces, work = under_way.popleft()
            if work is not None:
                with self.named("the gathering"):
                    work.wait()
            for number, low, high, at in pieces:
                flat[number][low:high].copy_(row[at : at + high - low])

        for (begin, end), shard in zip(self.layout.buckets, shards, strict=True):
            row = shard.new_empty(end - begin)
            row.view(self.size, -1)[self.rank].copy_(shard)
            with self.named("the gathering"):
                under_way.append((row, self.layout.pieces(begin, end), start_all_gather(row, self.group)))
            if len(under_way) == IN_FLIGHT:
                finish()
        while under_way:
            finish()

    def named(self, what: str) -> AbstractContextManager[None]:
        """Around a message of this kind: an error of it says who waited for what."""
        return named(f"{what} of {self.names[0]} and {len(self.names) - 1} more", self.group)

    def gather_gradients(self, shards: Iterable[Float[Tensor, " _"]]) -> None:
        """All ranks' shards of the sum of gradients, into every parameter's `.grad`, which is made where there is none.

        A gradient of another dtype than fp32 is rounded to it only here.
        """
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=getattr(p, "grad_dtype", None) or p.dtype)
            elif not p.grad.is_contiguous():
                p.grad = p.grad.contiguous()
        self.gather(shards, [p.grad for p in self.parameters if p.grad is not None])


def start_reduce_scatter(row: Float[Tensor, " n"], group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begins to sum `row` over the ranks; what comes back waits for it and gives this rank's part [n / ranks].

    `row` must live, and stay as it is, until then.

    With gloo every rank sends each other rank its part as it is and adds up what it gets, in the order of the ranks:
    ((g₀ + g₁) + g₂) + …, whatever the bucket. That is half the bytes of gloo's own reduce-scatter, which is an
    all-reduce of which each rank keeps a part. With NCCL the order is NCCL's, and the same every time.
    """
    if group is None:
        return lambda: row
    size = dist.get_world_size(group)
    if dist.get_backend(group) != "gloo":
        shard = row.new_empty(row.numel() // size)
        sent = _REDUCE_SCATTER(shard, row, group=group, async_op=True)
        return lambda: (sent.wait(), shard)[1]
    arrived = torch.empty_like(row)
    work = dist.all_to_all_single(arrived, row, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        first, *others = arrived.view(size, -1).unbind()
        total = first.clone()
        for part in others:
            total += part
        return total

    return finish


def start_all_gather(row: Tensor, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Begins to fill `row` [n], in which this rank's part [n / ranks] is in its place already, with all others'."""
    if group is None:
        return None
    mine = row.view(dist.get_world_size(group), -1)[dist.get_rank(group)]
    return _ALL_GATHER(row, mine, group=group, async_op=True)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
