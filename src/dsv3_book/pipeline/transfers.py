"""What travels between stages: outputs to the next one, gradients to the previous one, by the schedule's own rule."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.pipeline.schedule import Schedule, Transfer

AHEAD = 2  # messages from one rank for which room is made before they are needed


class Transfers:
    """One step's messages of one rank. All are [B, T, D] in one dtype, and both ends know their order in advance.

    Sends are begun when their content is there, receives `AHEAD` messages before they are needed, both without waiting:
    so a message travels while both ends compute, and two ranks that send to each other don't block. Messages between
    two ranks are received in the order in which they are sent, which is all NCCL knows; gloo also compares a number.

    group: the pipeline's ranks.  opposite: the same ranks in another group, for what travels towards lower ranks. NCCL
    works off the messages between two ranks in one queue per group: two that both send first would wait for ever. Over
    gloo one group does.
    """

    def __init__(
        self,
        schedule: Schedule,
        group: dist.ProcessGroup | None,
        opposite: dist.ProcessGroup | None,
        like: Tensor,
        timeout: timedelta,
    ) -> None:
        self.groups, self.like, self.timeout = (group, opposite or group), like, timeout
        self.rank = dist.get_rank(group) if schedule.num_ranks > 1 else 0
        self.nccl = schedule.num_ranks > 1 and dist.get_backend(group) == "nccl"
        self.outgoing = {(t.kind, t.stage, t.microbatch): n for n, t in enumerate(schedule.sends(self.rank))}
        self.expected: dict[int, deque[tuple[Transfer, int]]] = {}
        for source in range(schedule.num_ranks):
            mine = [(t, n) for n, t in enumerate(schedule.sends(source)) if t.target == self.rank]
            if mine:
                self.expected[source] = deque(mine)
        self.arriving: dict[tuple[str, int, int], tuple[Any, Tensor]] = {}
        self.leaving: list[tuple[Any, Tensor]] = []
        self.waited = 0.0  # seconds in which this rank stood still for others (on a GPU: its CPU did)
        for source in self.expected:
            for _ in range(AHEAD):
                self._expect(source)

    def _who(self, rank: int) -> int:
        """A rank of the pipeline, as it is called among all processes."""
        group = self.groups[0]
        return rank if group is None else dist.get_global_rank(group, rank)

    def _group(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self.groups[source > target]

    def _expect(self, source: int) -> None:
        if not self.expected[source]:
            return
        t, number = self.expected[source].popleft()
        room = torch.empty_like(self.like)
        work = dist.irecv(room, group=self._group(source, self.rank), group_src=source, tag=number)
        self.arriving[t.kind, t.stage, t.microbatch] = work, room

    def receive(self, transfer: Transfer) -> Tensor:
        """Waits for this message, and makes room for another one from the same rank.

        Raises:
            RuntimeError: it did not come; says which one, and from where.
        """
        key = transfer.kind, transfer.stage, transfer.microbatch
        try:
            while key not in self.arriving:
                self._expect(transfer.source)
            work, room = self.arriving.pop(key)
            self._expect(transfer.source)
            self._wait(work)
        except RuntimeError as error:
            who = self._who(transfer.source)
            raise RuntimeError(f"{_what(transfer)} did not come from rank {who}: {error}") from error
        return room

    def send(self, transfer: Transfer, content: Tensor) -> None:
        """Begins to send; `content` is kept until it has left.

        Raises:
            RuntimeError: it can't be sent; says which one, and to where.
        """
        self.leaving = [(work, kept) for work, kept in self.leaving if not work.is_completed()]
        content = content.contiguous()
        number = self.outgoing[transfer.kind, transfer.stage, transfer.microbatch]
        group = self._group(self.rank, transfer.target)
        try:
            self.leaving.append((dist.isend(content, group=group, group_dst=transfer.target, tag=number), content))
        except RuntimeError as error:
            who = self._who(transfer.target)
            raise RuntimeError(f"{_what(transfer)} can't be sent to rank {who}: {error}") from error

    def finish(self) -> None:
        """Waits until everything has left."""
        for work, _ in self.leaving:
            self._wait(work)
        self.leaving.clear()

    def _wait(self, work: dist.Work) -> None:
        """Over NCCL a wait with a timeout would stop the CPU; there the group itself ends what takes too long."""
        began = time.perf_counter()
        if self.nccl:
            work.wait()
        else:
            work.wait(self.timeout)
        self.waited += time.perf_counter() - began


def _what(transfer: Transfer) -> str:
    made = "output" if transfer.kind == "F" else "input gradient"
    return f"the {made} of stage {transfer.stage}, micro-batch {transfer.microbatch},"


def sum_over(tensors: list[Tensor], holders: list[int], rank: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sum of these tensors over the ranks that hold the same ones: added up in the order of the ranks, so that all
    get the same bits. Each sends to each; there are seldom more than two."""
    mine = torch.cat([t.reshape(-1) for t in tensors])
    theirs = {other: mine if other == rank else torch.empty_like(mine) for other in sorted(holders)}
    operations = []
    for other, room in theirs.items():
        if other != rank:
            operations.append(dist.P2POp(dist.isend, mine, group=group, group_peer=other))
            operations.append(dist.P2POp(dist.irecv, room, group=group, group_peer=other))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    total = torch.stack(list(theirs.values())).sum(0) if len(theirs) > 2 else sum(theirs.values())
    sizes = [t.numel() for t in tensors]
    return [part.view_as(t) for part, t in zip(total.split(sizes), tensors, strict=True)]  # type: ignore[union-attr]
