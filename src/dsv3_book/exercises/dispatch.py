"""Graders of chapter 12: what a rank sends, the order at the experts, rows on each kind of link, nodes reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader


def _routing(N: int, E: int, K: int, seed: int = 0) -> Tensor:
    return torch.rand(N, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices


def _numbers(expected: list[int], mistakes: dict[str, list[int]]) -> Callable[[Any], str | None]:
    """Judges whole numbers in a list, tuple or tensor; knows what some wrong ones come from."""

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, Tensor | list | tuple):
            return f"returned {type(answer).__name__}, expected {len(expected)} whole numbers"
        got = torch.as_tensor(answer)
        if got.shape != (len(expected),):
            return f"returned the shape {tuple(got.shape)}, expected {len(expected)} numbers"
        if got.tolist() == expected:
            return None
        for says, wrong in mistakes.items():
            if got.tolist() == wrong and wrong != expected:
                return f"returned {got.tolist()}, expected {expected}. {says}"
        return f"returned {got.tolist()}, expected {expected}"

    return judge


# What a rank sends ---------------------------------------------------------------------------------------------------
def _copies(experts: Tensor, num_experts: int, ranks: int) -> list[int]:
    owners = [{e // (num_experts // ranks) for e in row} for row in experts.tolist()]
    return [sum(rank in owner for owner in owners) for rank in range(ranks)]


def _slots(experts: Tensor, num_experts: int, ranks: int) -> list[int]:
    return torch.bincount(experts.flatten() // (num_experts // ranks), minlength=ranks).tolist()


def _dealt_out(experts: Tensor, num_experts: int, ranks: int) -> list[int]:
    return [sum(rank in {e % ranks for e in row} for row in experts.tolist()) for rank in range(ranks)]


@grader(
    "dispatch.copies_to",
    minutes=10,
    reference=lambda: _copies,
    wrong={"once per expert": lambda: _slots, "contiguous": lambda: _dealt_out},
)
def copies_to() -> Iterator[Case]:
    """Rows from one rank to each."""
    for experts, num_experts, ranks, says in (
        (torch.tensor([[0, 2], [4, 7]]), 8, 4, "two tokens of the page's kind, no two experts of one on a rank"),
        (torch.tensor([[6, 7], [0, 1], [6, 1]]), 8, 4, "tokens with both experts on one rank: one row for both"),
        (torch.zeros(0, 3, dtype=torch.int64), 8, 2, "a rank without tokens"),
        (_routing(9, 16, 4), 16, 4, "nine tokens, four of 16 experts each"),
    ):
        args = (experts, num_experts, ranks)
        mistakes = {
            "That sends a row once per expert; a rank needs it once.": _slots(*args),
            "Experts lie in contiguous ranges: with 8 on 4 ranks, rank 0 holds 0 and 1.": _dealt_out(*args),
        }
        hint = "`experts // (num_experts // ranks)` is the owner; for each token count every owner once."
        yield Case(args, _numbers(_copies(*args), mistakes), says=says, hint=hint)


# Sorted twice --------------------------------------------------------------------------------------------------------
def _by_expert(counts: Tensor) -> Tensor:
    ranks, experts = counts.shape
    return torch.arange(experts).repeat(ranks).repeat_interleave(counts.flatten()).argsort(stable=True)


def _as_they_came() -> Solution:
    return lambda counts: torch.arange(int(counts.sum()))


def _its_inverse() -> Solution:
    return lambda counts: _by_expert(counts).argsort()


def _last_rank_first() -> Solution:
    return lambda counts: torch.cat([part.flip(0) for part in _by_expert(counts).split(counts.sum(0).tolist())])


def _order(counts: Tensor) -> Callable[[Any], str | None]:
    ranks, experts = counts.shape
    expert = torch.arange(experts).repeat(ranks).repeat_interleave(counts.flatten())
    total, expected = len(expert), _by_expert(counts)

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, Tensor | list | tuple):
            return f"returned {type(answer).__name__}, expected a permutation of {total} places"
        got = torch.as_tensor(answer, dtype=torch.int64)
        if got.shape != (total,) or sorted(got.tolist()) != list(range(total)):
            return f"returned {got.tolist()}, expected every number from 0 to {total - 1} once"
        if torch.equal(got, expected):
            return None
        held = expert[got].tolist()
        if held != sorted(held):
            inverse = " It is the inverse of the right answer." if torch.equal(got.argsort(), expected) else ""
            return f"the rows' experts are then {held}, which is not sorted by expert.{inverse}"
        return f"sorted by expert, but not by source within an expert: {got.tolist()}, expected {expected.tolist()}"

    return judge


@grader(
    "dispatch.by_expert",
    minutes=20,
    level="medium",
    reference=lambda: _by_expert,
    wrong={"not sorted by expert": _as_they_came, "inverse": _its_inverse, "source within": _last_rank_first},
)
def by_expert() -> Iterator[Case]:
    """From the order of arrival to the order of the experts."""
    hint = (
        "Write down the expert of every row as it arrived, rank after rank (`repeat_interleave`); a *stable* `argsort` "
        "of that is the answer."
    )
    for counts, says in (
        (torch.tensor([[3], [1]]), "one expert: they lie right as they came"),
        (torch.tensor([[1, 1], [1, 1]]), "two ranks, two experts, one row each"),
        (torch.tensor([[2, 0, 1], [0, 0, 2], [1, 3, 0]]), "three ranks, three experts, some empty"),
        (torch.tensor([[0, 2], [3, 0], [0, 0], [1, 2]]), "four ranks, one of which sent nothing"),
    ):
        yield Case((counts,), _order(counts), says=says, hint=hint)


# Which wires ---------------------------------------------------------------------------------------------------------
def _wires(
    experts: Tensor, num_experts: int, ranks: int, ranks_per_node: int, me: int, *,
    own_node: bool = False, relay_too: bool = False, each_rank: bool = False,
) -> tuple[int, int]:  # fmt: skip
    ib = nvlink = 0
    for row in experts.tolist():
        owners = {e // (num_experts // ranks) for e in row}
        for node in {owner // ranks_per_node for owner in owners}:
            here = [owner for owner in owners if owner // ranks_per_node == node]
            relay = node * ranks_per_node + me % ranks_per_node
            if own_node or node != me // ranks_per_node:
                ib += len(here) if each_rank else 1
            nvlink += sum(relay_too or owner != relay for owner in here)
    return ib, nvlink


@grader(
    "dispatch.wires",
    minutes=20,
    level="medium",
    reference=lambda: _wires,
    wrong={
        "own node": lambda: lambda *args: _wires(*args, own_node=True),
        "relay itself": lambda: lambda *args: _wires(*args, relay_too=True),
        "once per node": lambda: lambda *args: _wires(*args, each_rank=True),
    },
)
def wires() -> Iterator[Case]:
    """Rows over IB and over NVLink, in two hops."""
    for args, says in (
        ((torch.tensor([[0, 1]]), 8, 4, 2, 0), "rank 0's first token on the page: both experts at home"),
        ((torch.tensor([[4, 6]]), 8, 4, 2, 0), "two ranks of the other node: once over IB, then once over NVLink"),
        ((torch.tensor([[0, 2], [3, 7]]), 8, 4, 2, 3), "rank 3's two tokens on the page"),
        ((_routing(10, 32, 5, seed=3), 32, 8, 4, 6), "ten tokens on rank 6 of 8, nodes of four ranks"),
    ):
        expected = _wires(*args)
        mistakes = {
            "Your own node needs no IB: the token is there.": list(_wires(*args, own_node=True)),
            "The relay itself needs no NVLink: the row is there.": list(_wires(*args, relay_too=True)),
            "In two hops a row crosses IB once per node, not once per rank.": list(_wires(*args, each_rank=True)),
        }
        hint = (
            "For each token: the set of owners, the set of their nodes; the relay in node n is n · ranks_per_node + "
            "me % ranks_per_node."
        )
        yield Case(args, _numbers(list(expected), mistakes), says=says, hint=hint)


# Nodes without a limit -----------------------------------------------------------------------------------------------
def _mean_nodes(num_experts: int, nodes: int, k: int) -> float:
    return nodes * (1 - comb(num_experts - num_experts // nodes, k) / comb(num_experts, k))


def _with_replacement() -> Solution:
    return lambda num_experts, nodes, k: nodes * (1 - (1 - 1 / nodes) ** k)


def _as_many_as_experts() -> Solution:
    return lambda num_experts, nodes, k: float(min(nodes, k))


@grader(
    "dispatch.mean_nodes",
    minutes=15,
    level="medium",
    reference=lambda: _mean_nodes,
    wrong={"twice": _with_replacement, "share a node": _as_many_as_experts},
)
def mean_nodes() -> Iterator[Case]:
    """Nodes that k experts fall on."""
    shared = "Two experts may share a node: what is the chance that a given node gets none of the k?"
    again = "An expert can't be drawn twice: the chance of none is comb(all − this node's, k) / comb(all, k)."
    for args, says, hint in (
        ((8, 4, 1), "one expert: one node", shared),
        ((4, 2, 2), "two of four experts on two nodes: two of six pairs share a node, 10/6 on average", again),
        ((256, 8, 8), "V3's sizes", shared),
        ((64, 64, 5), "one expert on each node: five nodes", again),
    ):
        expected = _mean_nodes(*args)
        judge = close(expected, 1e-9)

        def judged(answer: Any, judge: Any = judge, args: Any = args) -> str | None:
            if isinstance(answer, int | float) and abs(answer - min(args[1], args[2])) < 1e-9:
                return judge(answer) and f"returned {answer}: {shared}"
            return judge(answer) and f"{judge(answer)}. {again}"

        yield Case(args, judged, says=says, hint=hint)
