"""Graders of chapter 11: a rank's place, ZeRO-1's bytes, a norm over ranks, an all-reduce that sends little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader, same


# A rank's place ------------------------------------------------------------------------------------------------------
def _place(rank: int, dp: int, ep: int, ranks_per_node: int) -> tuple[int, int, int, int]:
    return rank // dp, rank % dp // ep, rank % ep, rank // ranks_per_node


def _experts_outermost() -> Solution:
    return lambda rank, dp, ep, per_node: (rank // dp, rank % (dp // ep), rank % dp // (dp // ep), rank // per_node)


def _pipeline_innermost() -> Solution:
    return lambda rank, dp, ep, per_node: (rank % (2048 // dp), *_place(rank, dp, ep, per_node)[1:])


@grader(
    "processes.place",
    minutes=5,
    level="easy",
    reference=lambda: _place,
    wrong={"side by side": _experts_outermost, "furthest": _pipeline_innermost},
)
def place() -> Iterator[Case]:
    yield Case(
        (4, 4, 2, 2),
        same((1, 0, 0, 2)),
        says="rank 4 of the eight above: dp = 4, ep = 2, nodes of 2",
        hint="Pipeline ranks are furthest apart: the first dp ranks are stage 0, the next dp are stage 1.",
    )
    yield Case(
        (710, 128, 64, 8),
        same((5, 1, 6, 88)),
        says="rank 710 of V3's 2048",
        hint=(
            "Ranks of one ep group stand side by side, so the expert rank changes fastest: 710 = (5 · 2 + 1) · 64 + 6. "
            "A node is the rank divided by the ranks per node."
        ),
    )


# ZeRO-1's bytes ------------------------------------------------------------------------------------------------------
def _state_bytes(experts: int, others: int, dp: int, ep: int, mirrored: bool) -> float:
    copies = 2 if mirrored else 1
    return 8 * (experts / (copies * dp / ep) + others / (copies * dp))


def _all_over_dp() -> Solution:
    return lambda experts, others, dp, ep, mirrored: 8 * (experts + others) / (dp * (2 if mirrored else 1))


def _over_ep() -> Solution:
    return lambda experts, others, dp, ep, mirrored: _state_bytes(experts, others, dp, dp // ep, mirrored)


def _no_mirror() -> Solution:
    return lambda experts, others, dp, ep, mirrored: _state_bytes(experts, others, dp, ep, False)


def _fp32_moments() -> Solution:
    return lambda *args: 1.5 * _state_bytes(*args)


@grader(
    "processes.state_bytes",
    minutes=10,
    level="easy",
    reference=lambda: _state_bytes,
    wrong={"same experts": _all_over_dp, "dp / ep": _over_ep, "mirror": _no_mirror, "BF16": _fp32_moments},
)
def state_bytes() -> Iterator[Case]:
    yield Case(
        (0, 1000, 4, 1, False),
        close(2000.0),
        says="1000 weights that are not experts, on four ranks",
        hint="8 bytes a weight: 4 of FP32 master weight and 2 for each of two BF16 moments. All four ranks share them.",
    )
    yield Case(
        (1000, 0, 128, 64, False),
        close(4000.0),
        says="1000 weights of experts; dp = 128, ep = 64",
        hint="The other ranks of the ep group hold other experts. Only dp / ep ranks hold the very same experts.",
    )
    yield Case(
        (1000, 2560, 128, 64, True),
        close(2080.0),
        says="both, under DualPipe",
        hint="The mirrored pipeline rank holds the same stages, with the same weights: twice as many holders of each.",
    )


# A norm over ranks ---------------------------------------------------------------------------------------------------
def _norm(experts: Tensor, others: Tensor, ep: int) -> Tensor:
    return (experts[:ep].square().sum() + others[0].square().sum()).sqrt()


def _per_rank() -> Solution:
    return lambda experts, others, ep: (experts[0].square().sum() + others[0].square().sum()).sqrt()


def _everything() -> Solution:
    return lambda experts, others, ep: (experts.square().sum() + others.square().sum()).sqrt()


def _experts_of_all() -> Solution:
    return lambda experts, others, ep: (experts.square().sum() + others[0].square().sum()).sqrt()


def _mean_of_norms() -> Solution:
    return lambda experts, others, ep: (experts.square().sum(1) + others.square().sum(1)).sqrt().mean()


def _sum_of_norms() -> Solution:
    return lambda experts, others, ep: experts[:ep].norm() + others[0].norm()


@grader(
    "processes.global_norm",
    minutes=15,
    level="medium",
    reference=lambda: _norm,
    wrong={
        "all experts": _per_rank,
        "copies": _everything,
        "replica": _experts_of_all,
        "mean": _mean_of_norms,
        "Squares": _sum_of_norms,
    },
)
def global_norm() -> Iterator[Case]:
    attention = torch.tensor([[3.0, 0.0]])
    yield Case(
        (torch.tensor([[4.0]]), attention, 1),
        close(5.0),
        says="one rank: 3 and 4",
        hint="Squares add up, norms don't: √(3² + 4²) = 5.",
    )
    yield Case(
        (torch.tensor([[4.0], [12.0]]), attention.expand(2, 2), 2),
        close(13.0),
        says="two ranks with different experts and the same attention",
        hint=(
            "√(3² + 4² + 12²) = 13: all experts, on whatever rank they live, and attention once, for the other rank's "
            "gradients of it are copies. A mean of the ranks' norms is something else."
        ),
    )
    yield Case(
        (torch.tensor([[4.0], [12.0], [4.0], [12.0]]), attention.expand(4, 2), 2),
        close(13.0),
        says="four ranks, ep = 2: ranks 2 and 3 hold the same as ranks 0 and 1",
        hint="The model is the same as on two ranks, so the norm is too: one replica of the experts counts.",
    )


# An all-reduce that sends little -------------------------------------------------------------------------------------
class Wires:
    """`send(source, target, tensor)` gives what arrives, and counts the numbers that each rank sent."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent = ranks, Counter[int]()

    def __call__(self, source: int, target: int, tensor: Tensor) -> Tensor:
        if not (0 <= source < self.ranks and 0 <= target < self.ranks):
            raise ValueError(f"send from rank {source} to rank {target}: there are ranks 0 to {self.ranks - 1}")
        if source != target:
            self.sent[source] += tensor.numel()
        return tensor.clone()

    def __repr__(self) -> str:
        return "send"


Rows = list[Tensor]


def _ring(rows: Rows, send: Wires) -> Rows:
    size = len(rows)
    parts = [list(row.clone().chunk(size)) for row in rows]
    for step in range(size - 1):
        going = [(r, (r - step - 1) % size) for r in range(size)]
        arrived = [send(r, (r + 1) % size, parts[r][part]) for r, part in going]
        for (r, part), value in zip(going, arrived, strict=True):
            parts[(r + 1) % size][part] = parts[(r + 1) % size][part] + value
    for step in range(size - 1):
        going = [(r, (r - step) % size) for r in range(size)]
        arrived = [send(r, (r + 1) % size, parts[r][part]) for r, part in going]
        for (r, part), value in zip(going, arrived, strict=True):
            parts[(r + 1) % size][part] = value
    return [torch.cat(row) for row in parts]


def _by_rank_0() -> Solution:
    def solution(rows: Rows, send: Wires) -> Rows:
        total = torch.stack([send(r, 0, row) for r, row in enumerate(rows)]).sum(0)
        return [send(0, r, total) for r in range(len(rows))]

    return solution


def _to_everybody() -> Solution:
    return lambda rows, send: [sum(send(r, q, row) for r, row in enumerate(rows)) for q in range(len(rows))]


def _no_wires() -> Solution:
    return lambda rows, send: [sum(rows) for _ in rows]


def _half_way() -> Solution:
    def solution(rows: Rows, send: Wires) -> Rows:
        size, out = len(rows), [row.clone() for row in rows]
        for q in range(size):
            part = slice(q * len(rows[0]) // size, (q + 1) * len(rows[0]) // size)
            out[q][part] = sum(send(r, q, rows[r][part]) for r in range(size))
        return out

    return solution


def _means() -> Solution:
    return lambda rows, send: [row / len(rows) for row in _ring(rows, send)]


def _frugal(expected: Tensor, wires: Wires) -> Callable[[Any], str | None]:
    most = 2 * (wires.ranks - 1) * len(expected) // wires.ranks

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, list | tuple) or len(answer) != wires.ranks:
            return f"returned a {type(answer).__name__}, expected a list of {wires.ranks} tensors, one for each rank"
        for rank, row in enumerate(answer):
            if wrong := close(expected)(row):
                return f"rank {rank} {wrong}"
        if not wires.sent:
            return "the sums are right, but nothing was sent: how does one rank know the numbers of another?"
        rank, numbers = wires.sent.most_common(1)[0]
        if numbers > most:
            return f"the sums are right, but rank {rank} sent {numbers} numbers; {most} are enough"
        return None

    return judge


@grader(
    "processes.all_reduce",
    minutes=30,
    level="medium",
    reference=lambda: _ring,
    wrong={
        "rank 0": _by_rank_0,
        "own part": _to_everybody,
        "nothing was sent": _no_wires,
        "all-gather": _half_way,
        "sum": _means,
    },
)
def all_reduce() -> Iterator[Case]:
    for ranks, n in ((2, 4), (4, 8), (5, 20)):
        wires = Wires(ranks)
        rows = [torch.arange(n) + 100.0 * rank for rank in range(ranks)]
        yield Case(
            (rows, wires),
            _frugal(torch.stack(rows).sum(0), wires),
            says=f"{ranks} ranks with {n} numbers each",
            hint=(
                "Every rank needs the whole sum. First a reduce-scatter: each rank answers for its own part of the "
                "row, and nobody, not even rank 0, adds up everything. Then an all-gather of the finished parts."
            ),
        )
