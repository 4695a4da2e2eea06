"""Whose is which number: parameters by kind, laid in rows, and the pieces of them that this rank answers for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dsv3_book.parallel.buckets import BUCKET, Buckets, Piece, start_all_gather


@dataclass(frozen=True)
class Kind:
    """Parameters that the very same ranks hold.

    named: (name, parameter), in the same order on all of them.
    group: these ranks, and *all* that hold these parameters: dp for what is not an expert, edp for experts; in DualPipe
        with the mirrored pipeline rank's; for copies of the embedding that are tied, both owners'. None: this process
        alone.
    """

    named: Sequence[tuple[str, nn.Parameter]]
    group: dist.ProcessGroup | None


class Shard(NamedTuple):
    """A piece of a parameter that this rank answers for: its numbers `begin` to `end`, flattened."""

    name: str
    begin: int
    end: int
    parameter: nn.Parameter  # the whole
    weight: nn.Parameter  # fp32 [end − begin], the master weights; `.grad`: the sum of the gradients over the ranks
    at: int  # where the piece begins in this rank's part of its bucket

    @property
    def key(self) -> str:
        """Name and range, e.g. "norm.weight[0:64]"."""
        return f"{self.name}[{self.begin}:{self.end}]"


class Shards:
    """The rows of all kinds, and this rank's pieces.

    dtype: of the weights. With fp32, a piece's master weights are views of the parameter's own memory; otherwise they
        are a copy, made from the parameters as they are given, before these get `dtype` (and fp32 gradients).
    rows: whether the parameters move into one row for each kind, from which weights can be gathered in place.

    Raises:
        ValueError: a name or parameter listed twice, another dtype than fp32 or `dtype`, or ranks of one group that
            list different parameters.
    """

    def __init__(self, kinds: Sequence[Kind], dtype: torch.dtype, rows: bool, bucket: int = BUCKET) -> None:
        self.kinds = [Buckets(kind.named, kind.group, bucket) for kind in kinds]
        self.dtype = dtype
        self._check()
        self.rows: list[Tensor | None] = []
        self.by_bucket: list[list[list[Shard]]] = []  # of each kind, of each of its buckets
        for kind in self.kinds:
            copies = self._cut(kind) if dtype != torch.float32 else None
            self.rows.append(self._lay(kind) if rows else None)
            self.by_bucket.append(copies or self._cut(kind))
        self.places = [p.data_ptr() for _, p in self.named()]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters, kind by kind."""
        return [pair for kind in self.kinds for pair in kind]

    def pieces(self) -> list[Shard]:
        """This rank's pieces, in the order of the rows."""
        return [shard for kind in self.by_bucket for bucket in kind for shard in bucket]

    @torch.no_grad()
    def reduce(self, forget: bool) -> list[list[Tensor]]:
        """Sums the gradients over every kind's group; this rank's part by kind, and as its pieces' `.grad`.

        forget: drops the parameters' own `.grad` as they are sent.
        """
        self.require_unmoved()
        sums: list[list[Tensor]] = []
        for kind, buckets in zip(self.kinds, self.by_bucket, strict=True):
            if forget and kind.group is None:
                sums.append(self._take_gradients(kind, buckets))
                continue
            sums.append(kind.reduce(forget))
            for shards, total in zip(buckets, sums[-1], strict=True):
                for s in shards:
                    s.weight.grad = total[s.at : s.at + s.weight.numel()]
        return sums

    def _take_gradients(self, kind: Buckets, buckets: list[list[Shard]]) -> list[Tensor]:
        """What `reduce` does for a process alone: the gradients are the sums, and nothing is copied."""
        kind.require_gradients()
        shards = [s for bucket in buckets for s in bucket]
        for s in shards:
            own = s.parameter.grad
            s.weight.grad = torch.zeros_like(s.weight) if own is None else own.reshape(-1)[s.begin : s.end].float()
        for p in kind.parameters:
            p.grad = None
        return [s.weight.grad for s in shards if s.weight.grad is not None]

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Fills the parameters of all ranks from everybody's master weights."""
        self.require_unmoved()
        if self.dtype != torch.float32:
            for s in self.pieces():
                s.parameter.view(-1)[s.begin : s.end].copy_(s.weight)
        works = [
            (kind, start_all_gather(row[begin:end], kind.group))
            for kind, row in zip(self.kinds, self.rows, strict=True)
            if row is not None
            for begin, end in kind.layout.buckets
        ]
        for kind, work in works:
            if work is not None:
                with kind.named("the gathering of weights"):
                    work.wait()
        increment_version([p for _, p in self.named()])  # what is derived from a weight and kept, FP8 codes, is stale

    @torch.no_grad()
    def take_weights(self) -> None:
        """Makes the master weights what the parameters are now."""
        self.require_unmoved()
        if self.dtype != torch.float32:
            for s in self.pieces():
                s.weight.copy_(s.parameter.view(-1)[s.begin : s.end])

    @torch.no_grad()
    def whole(self, values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """By name and in the parameters' shapes, what all ranks have for their `pieces()`. All ranks must call it.

        values: one tensor of `dtype` for each of this rank's pieces, [end − begin].
        """
        out: dict[str, Tensor] = {}
        rest = iter(values)
        for kind, buckets in zip(self.kinds, self.by_bucket, strict=True):
            rows = []
            for (begin, end), shards in zip(kind.shards(), buckets, strict=True):
                row = torch.zeros(end - begin, dtype=dtype, device=kind.device)
                for s in shards:
                    row[s.at : s.at + s.weight.numel()].copy_(next(rest))
                rows.append(row)
            found = [torch.empty(p.shape, dtype=dtype, device=kind.device) for p in kind.parameters]
            kind.gather(rows, found)
            out |= dict(zip(kind.names, found, strict=True))
        return out

    def require_unmoved(self) -> None:
        """Raises RuntimeError if a parameter is no longer where it was."""
        for place, (name, p) in zip(self.places, self.named(), strict=True):
            if p.data_ptr() != place:
                raise RuntimeError(
                    f"{name} has other memory than when the optimiser was made (moved by `.to`, or its data replaced): "
                    "move the model first, and fill its parameters in place"
                )

    def _lay(self, kind: Buckets) -> Tensor:
        """Moves the kind's parameters into one row."""
        row = torch.zeros(kind.layout.total, dtype=self.dtype, device=kind.device)
        for start, p in zip(kind.layout.starts, kind.parameters, strict=True):
            place = row[start : start + p.numel()].view(p.shape)
            place.copy_(p.detach())
            p.data = place
            if self.dtype != torch.float32:
                p.grad_dtype = torch.float32
        return row

    def _cut(self, kind: Buckets) -> list[list[Shard]]:
        """This rank's pieces of the kind's parameters, by bucket."""

        def shard(piece: Piece) -> Shard:
            p = kind.parameters[piece.parameter]
            weight = p.detach().view(-1)[piece.begin : piece.end]
            if self.dtype != torch.float32:
                weight = weight.to(torch.float32, copy=True)
            return Shard(kind.names[piece.parameter], piece.begin, piece.end, p, nn.Parameter(weight), piece.at)

        return [[shard(piece) for piece in bucket] for bucket in kind.pieces()]

    def _check(self) -> None:
        named = self.named()
        if twice := [name for name, times in Counter(name for name, _ in named).items() if times > 1]:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        if len({id(p) for _, p in named}) < len(named):
            raise ValueError("one parameter is listed in two kinds, under two names")
        for name, p in named:
            if p.dtype not in (torch.float32, self.dtype):
                raise ValueError(f"{name} is {p.dtype}: give fp32 parameters, of which master weights can be made")
        for kind in self.kinds:
            kind.agree()
