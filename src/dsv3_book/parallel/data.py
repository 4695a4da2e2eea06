"""Plain data parallel: every process holds the whole model and works on its own share of the step's micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_book.parallel.buckets import Buckets
from dsv3_book.parallel.meeting import meet

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process met an error and has reported it; this one only has to end."""


@dataclass(frozen=True)
class DataParallel:
    """`size` processes, of which this is number `rank`; with one process nothing is ever sent.

    group: the processes that share the work (None: torch's default group).  device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def from_environment(timeout: float | None = None) -> DataParallel:
        """The processes that `torchrun` started (one, if it didn't), joined over NCCL if each has a GPU, else gloo.

        timeout: seconds that a message between them may take (None: torch's own, half an hour on gloo).
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            limit, store = timedelta(seconds=timeout) if timeout else None, meet(rank, size, timeout)
            whom: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": size}
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit, **whom)
        return DataParallel(rank, size, None, device)

    def close(self) -> None:
        """Leaves the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group(self.group)

    def share(self, count: int) -> range:
        """This process's part of `count` things: contiguous, equally long on all processes."""
        if count % self.size:
            raise ValueError(
                f"{count} micro-batches don't divide among {self.size} processes: change the batch or their number"
            )
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place: the same bits on all of them."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums every parameter's gradient over the processes in fp32, bucket by bucket, in the order given.

        A reduce-scatter and an all-gather of the very buckets that ZeRO-1 uses (`buckets.py`): each process adds up one
        part of every bucket, so all hold the same bits. A parameter that got no gradient here counts as zero.
        """
        if self.size == 1:
            return
        named = [(f"parameter {number}", p) for number, p in enumerate(parameters)]
        if named:
            buckets = Buckets(named, self.group if self.group is not None else dist.group.WORLD)
            buckets.gather_gradients(buckets.reduce())

    def require_same(self, what: str, value: Any) -> None:
        """Raises ValueError on all processes, naming who has what, unless all have the same `value`."""
        if self.size == 1:
            return
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, value, group=self.group)
        if other := next((rank for rank, theirs in enumerate(heard) if theirs != heard[0]), None):
            raise ValueError(
                f"{what} are not the same on all processes: {heard[0]} on rank 0, {heard[other]} on rank {other}"
            )

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on process 0, on every process.

        If it raises there, the error is process 0's to report; the others raise PeerError, so that one mistake is one
        message and nobody waits for ever.
        """
        if self.size == 1:
            return work()
        box: list = [None, False]
        error: Exception | None = None
        if self.rank == 0:
            try:
                box = [work(), True]
            except Exception as caught:
                error = caught
        dist.broadcast_object_list(box, src=0, group=self.group)
        if error is not None:
            raise error
        if not box[1]:
            raise PeerError("process 0 met an error and has reported it")
        return box[0]
