"""Graders of chapter 4: gate weights, the choice of experts, how many choices there are, dispatch as a permutation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, grader, same
from dsv3_book.exercises.rope import tensor_judge
from dsv3_book.model import router


def _scores(N: int, E: int) -> Tensor:
    """Affinities on a grid: no two of a token's are equal, so every choice has one right answer."""
    order = torch.rand(N, E, generator=torch.Generator().manual_seed(N * E)).argsort(-1)
    return (order + 1) / (E + 1)


# Gate weights --------------------------------------------------------------------------------------------------------
def _gates(scores: Tensor, experts: Tensor, scale: float) -> Tensor:
    return router.gate_weights(scores, experts, True, scale)


def _gates_over_all() -> Solution:
    return lambda scores, experts, scale: scores.gather(1, experts) / scores.sum(-1, keepdim=True) * scale


def _gates_unscaled() -> Solution:
    return lambda scores, experts, scale: _gates(scores, experts, 1.0)


def _gates_softmax() -> Solution:
    return lambda scores, experts, scale: scores.gather(1, experts).softmax(-1) * scale


@grader(
    "router.gate_weights",
    minutes=5,
    reference=lambda: _gates,
    wrong={"all experts": _gates_over_all, "routing scale": _gates_unscaled, "second softmax": _gates_softmax},
)
def gate_weights() -> Iterator[Case]:
    """How much each chosen expert counts."""
    for scores, experts, scale, says in (
        (torch.tensor([[0.6, 0.9, 0.3, 0.2]]), torch.tensor([[1, 2]]), 2.5, "0.9 and 0.3 chosen: 3/4 and 1/4 of 2.5"),
        (_scores(3, 8), torch.tensor([[0, 5, 2], [7, 1, 3], [4, 6, 0]]), 2.5, "three tokens, three experts each"),
    ):
        args = (scores, experts, scale)
        mistakes = {
            "That divides by the sum over all experts; only the chosen ones share.": _gates_over_all()(*args),
            "The routing scale is missing: a token's gates must sum to it.": _gates_unscaled()(*args),
            "That is a second softmax on top of the sigmoid: divide by the sum, nothing more.": _gates_softmax()(*args),
        }
        hint = "`scores.gather(1, experts)` takes the chosen affinities; divide by their sum (keepdim), then scale."
        yield Case(args, tensor_judge(_gates(*args), mistakes), says=says, hint=hint)


# The choice ----------------------------------------------------------------------------------------------------------
def _variant(worth: Callable[[Tensor], Tensor], fill: float = -torch.inf, grouped_by_bias: bool = True) -> Solution:
    """The package's rule with one thing changed: what a group is worth, how a masked group is filled."""

    def select(scores: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int) -> Tensor:
        biased = scores + bias
        value = worth((biased if grouped_by_bias else scores).unflatten(-1, (n_group, -1)))
        kept = torch.zeros_like(value, dtype=torch.bool).scatter_(1, value.topk(topk_group).indices, True)
        mask = kept.repeat_interleave(scores.shape[1] // n_group, 1)
        return biased.masked_fill(~mask, fill).topk(k).indices

    return select


def _best_two(grouped: Tensor) -> Tensor:
    return grouped.topk(2).values.sum(-1)


def _no_bias() -> Solution:
    return lambda scores, bias, n_group, topk_group, k: router.select(scores, bias * 0, n_group, topk_group, k)


def _no_groups() -> Solution:
    return lambda scores, bias, n_group, topk_group, k: (scores + bias).topk(k).indices


def _in_place() -> Solution:
    def select(scores: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int) -> Tensor:
        scores += bias
        return router.select(scores, bias * 0, n_group, topk_group, k)

    return select


def _chosen(scores: Tensor, expected: Tensor) -> Callable[[Any], str | None]:
    """Judges a choice of experts as a set for each token, and checks that the scores were left alone."""
    before = scores.clone()

    def judge(answer: Any) -> str | None:
        untouched = torch.equal(scores, before)
        scores.copy_(before)
        if not isinstance(answer, Tensor) or answer.is_floating_point() or answer.shape != expected.shape:
            shape = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            return f"returned {shape}, expected expert numbers (int64) of shape {tuple(expected.shape)}"
        for n, (got, want) in enumerate(zip(answer.sort(-1).values, expected.sort(-1).values, strict=True)):
            if not torch.equal(got, want):
                return f"token {n}: chose experts {got.tolist()}, expected {want.tolist()}"
        if not untouched:
            return "The choice is right, but your function changed `scores` in place: the gates need them unbiased."
        return None

    return judge


@grader(
    "router.select",
    minutes=20,
    level="medium",
    reference=lambda: router.select,
    wrong={
        "best single": lambda: _variant(lambda grouped: grouped.amax(-1)),
        "−inf": lambda: _variant(_best_two, fill=0.0),
        "add the bias": _no_bias,
        "dearest groups": _no_groups,
        "biased scores too": lambda: _variant(_best_two, grouped_by_bias=False),
        "all its experts": lambda: _variant(lambda grouped: grouped.sum(-1)),
        "in place": _in_place,
    },
)
def select() -> Iterator[Case]:
    """Which experts a token goes to."""

    def case(scores: Tensor, bias: Tensor, groups: tuple[int, int, int], says: str, hint: str) -> Case:
        args = (scores, bias, *groups)
        return Case(args, _chosen(scores, router.select(*args)), says=says, hint=hint)

    plain, zero = torch.tensor([[0.1, 0.8, 0.5, 0.6]]), torch.zeros(4)
    yield case(plain, zero, (1, 1, 2), "one group, no bias: the two best", "`topk(k).indices` along the last axis.")
    yield case(plain.clone(), torch.tensor([0.0, -0.3, 0.2, 0.0]), (1, 1, 2), "a bias lifts expert 2 above expert 1",
               "To choose, add the bias to the scores, into a new tensor.")  # fmt: skip
    yield case(torch.tensor([[0.7, 0.6, 0.9, 0.1, 0.5, 0.4]]), torch.zeros(6), (3, 1, 2),
               "three groups of two, one kept: experts 0 and 1",
               "Keep the dearest groups first, then choose inside them. A group is worth the sum of its two best, "
               "not its best single expert.")  # fmt: skip
    yield case(torch.tensor([[0.5, 0.5 - 1 / 64, 0.45, 0.6, 0.51, 0.1]]), torch.zeros(6), (2, 1, 2),
               "groups of three: 0.5 + 0.48 + 0.45 against 0.6 + 0.51 + 0.1",
               "A group is worth its two best, not the sum of all its experts.")  # fmt: skip
    yield case(torch.tensor([[0.7, 0.6, 0.5, 0.4]]), torch.tensor([-0.5, -0.5, 0.0, 0.0]), (2, 1, 2),
               "the bias changes which group is kept", "Groups are compared by their biased scores too.")  # fmt: skip
    yield case(torch.tensor([[0.7, 0.6, 0.5, 0.4]]), -torch.ones(4), (2, 1, 2),
               "all biased scores are negative", "Fill masked groups with −inf: 0 beats negative scores.")  # fmt: skip
    bias = torch.linspace(-0.7, 0.3, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    yield case(_scores(20, 32), bias, (8, 4, 8), "twenty tokens, 8 groups of 4, 4 kept, 8 chosen",
               "The parts are right; look at how they meet at this size.")  # fmt: skip


# Dispatch ------------------------------------------------------------------------------------------------------------
def _permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    K = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    return order // K, order.argsort().view(-1, K), torch.bincount(experts.flatten(), minlength=num_experts)


def _permute_unsorted() -> Solution:
    def permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.arange(experts.numel())
        K = experts.shape[1]
        return slots // K, slots.view(-1, K), torch.bincount(experts.flatten(), minlength=num_experts)

    return permute


def _permute_not_inverted() -> Solution:
    def permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        order, K = experts.flatten().argsort(stable=True), experts.shape[1]
        return order // K, order.view(-1, K), _permute(experts, num_experts)[2]

    return permute


def _permute_short() -> Solution:
    def permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        return *_permute(experts, num_experts)[:2], torch.bincount(experts.flatten())

    return permute


def _permute_slots() -> Solution:
    def permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        return experts.flatten().argsort(stable=True), *_permute(experts, num_experts)[1:]

    return permute


def _journey(experts: Tensor, num_experts: int) -> Callable[[Any], str | None]:
    """Judges a dispatch by what it does, so that any order within an expert is right."""
    N, K = experts.shape

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, tuple | list) or len(answer) != 3:
            return "expected three tensors: source [S], back [N, K], counts [E]"
        source, back, counts = (torch.as_tensor(part) for part in answer)
        if counts.shape != (num_experts,):
            return f"counts has shape {tuple(counts.shape)}, expected one number for each of {num_experts} experts"
        if not torch.equal(counts, torch.bincount(experts.flatten(), minlength=num_experts)):
            return f"counts is {counts.tolist()}: they must say how many slots each expert got"
        if source.shape != (N * K,) or back.shape != (N, K):
            shapes = f"{tuple(source.shape)} and back {tuple(back.shape)}"
            return f"source has shape {shapes}, expected ({N * K},) and ({N}, {K})"
        if int(source.max()) >= N:
            return f"source names token {int(source.max())}, but there are {N}: it holds tokens, not slots"
        if sorted(back.flatten().tolist()) != list(range(N * K)):
            return "back must name every place once: a slot is lost, or two share a place"
        if not torch.equal(source[back], torch.arange(N)[:, None].expand(N, K)):
            return "source[back[n, k]] must be n: a result would come back to another token"
        held = torch.empty(N * K, dtype=torch.int64)
        held[back.flatten()] = experts.flatten()
        if not bool((held.diff() >= 0).all()):
            return f"the slots' experts are {held.tolist()}, which is not sorted"
        return None

    return judge


@grader(
    "router.permute",
    minutes=15,
    level="medium",
    reference=lambda: _permute,
    wrong={
        "not sorted": _permute_unsorted,
        "another token": _permute_not_inverted,
        "for each of": _permute_short,
        "tokens, not slots": _permute_slots,
    },
)
def permute() -> Iterator[Case]:
    """Rows sorted by expert, and the way back."""
    for experts, num_experts, says in (
        (torch.tensor([[2, 0], [0, 1], [2, 1]]), 3, "three tokens, two experts each: the page's example"),
        (torch.tensor([[1], [1], [1], [1]]), 4, "all tokens on one expert, the last experts idle"),
        (_scores(9, 8).topk(3).indices, 8, "nine tokens, three of eight experts"),
    ):
        hint = (
            "`order = experts.flatten().argsort()` lists slots by expert; slot i is token i // K's. `back` is the "
            "inverse of `order`: `back[order] = arange(S)`. `bincount` wants `minlength`."
        )
        yield Case((experts, num_experts), _journey(experts, num_experts), says=says, hint=hint)


# How many choices the node limit leaves ------------------------------------------------------------------------------
def _allowed(num_experts: int, n_group: int, topk_group: int, k: int) -> int:
    size, total = num_experts // n_group, 0
    for used in range(1, topk_group + 1):
        exactly = sum((-1) ** i * math.comb(used, i) * math.comb((used - i) * size, k) for i in range(used + 1))
        total += math.comb(n_group, used) * exactly
    return total


def _allowed_twice() -> Solution:
    return lambda E, G, kept, k: math.comb(G, kept) * math.comb(E // G * kept, k)


def _allowed_one_choice() -> Solution:
    return lambda E, G, kept, k: math.comb(E // G * kept, k)


@grader(
    "router.allowed_sets",
    minutes=20,
    level="medium",
    reference=lambda: _allowed,
    wrong={"more than once": _allowed_twice, "any of the groups": _allowed_one_choice},
)
def allowed_sets() -> Iterator[Case]:
    """Sets of K experts that touch at most `topk_group` groups."""
    anywhere = "The experts may lie in any of the groups, not in some fixed ones: first count the ways to pick groups."
    for args, says, hint in (
        ((4, 2, 1, 1), "one of four experts: the limit forbids nothing", anywhere),
        ((4, 2, 1, 2), "two of four experts, groups of two: {0, 1} and {2, 3}", anywhere),
        ((6, 3, 2, 2), "two of six experts, two of three groups: all 15 pairs",
         "Picking groups first counts {0, 1} more than once: once for each second group, which it doesn't use. Count "
         "the sets that use *exactly* 1, 2, … groups."),
        ((256, 8, 4, 8), "V3", "Inclusion and exclusion: sets inside j groups, minus those with one of them empty …"),
    ):  # fmt: skip
        yield Case(args, same(_allowed(*args)), says=says, hint=hint)
