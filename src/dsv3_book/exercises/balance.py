"""Graders of chapter 5: the measure of imbalance, the bias rule, the sequence-wise loss, a step of many parts."""

import torch

from dsv3_book.exercises.grading import Case, Solution, close, grader
from dsv3_book.model import balance


def _counts(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows[0] if len(rows) == 1 else list(rows), dtype=torch.float32)


# MaxVio --------------------------------------------------------------------------------------------------------------
def _range() -> Solution:
    return lambda load: (load.max() - load.min()) / load.mean()


def _ratio() -> Solution:
    return lambda load: load.max() / load.mean()


def _by_sum() -> Solution:
    return lambda load: (load.max() - load.mean()) / load.sum()


@grader(
    "balance.max_violation",
    minutes=5,
    level="easy",
    reference=lambda: lambda load: balance.max_violation(load),
    wrong={"smallest": _range, "even": _ratio, "mean load": _by_sum},
)
def max_violation():
    yield Case(
        (_counts([4, 4, 4, 4]),),
        close(0.0),
        says="an even load",
        hint="For an even load the answer is 0: the *excess* over the mean, not the ratio to it.",
    )
    yield Case(
        (_counts([12, 2, 1, 1]),),
        close(2.0),
        says="12 of 16 tokens on one of four experts",
        hint=(
            "The mean is 4, the largest load exceeds it by 8. Divide by the mean load; the smallest load plays no part."
        ),
    )
    yield Case(
        (_counts([0, 0, 8]),),
        close(2.0),
        says="everything on one expert: the worst case, E/K − 1 with K = 1",
        hint="Divide the excess by the mean load, 8/3.",
    )


# The bias rule -------------------------------------------------------------------------------------------------------
def _update(bias: torch.Tensor, load: torch.Tensor, gamma: float) -> torch.Tensor:
    new = bias.clone()
    balance.update_bias(new, load, gamma)
    return new


def _flipped() -> Solution:
    return lambda bias, load, gamma: bias + gamma * torch.sign(load - load.mean())


def _by_size() -> Solution:
    return lambda bias, load, gamma: bias + gamma * (load.mean() - load)


def _median() -> Solution:
    return lambda bias, load, gamma: bias + gamma * torch.sign(load.median() - load)


def _centred() -> Solution:
    def solution(bias, load, gamma):
        delta = gamma * torch.sign(load.mean() - load)
        return bias + delta - delta.mean()

    return solution


@grader(
    "balance.update_bias",
    minutes=10,
    level="easy",
    reference=lambda: _update,
    wrong={"direction": _flipped, "sign": _by_size, "mean load": _median, "recentre": _centred},
)
def update_bias():
    start = torch.zeros(4)
    yield Case(
        (start, _counts([6, 2, 4, 4]), 0.1),
        close(_update(start, _counts([6, 2, 4, 4]), 0.1)),
        says="one expert over the mean, one under, two exactly at it",
        hint=(
            "Check the direction: an expert with too much load must become less attractive. Every "
            "bias moves by γ exactly: only the sign of the error counts."
        ),
    )
    load = _counts([9, 2, 3, 2])
    yield Case(
        (start, load, 0.001),
        close(_update(start, load, 0.001), atol=1e-8),
        says="one expert over, three under",
        hint=(
            "Compare with the mean load, 4 here; not the median. And don't recentre: three biases "
            "rise, one falls, so their sum grows."
        ),
    )
    bias = torch.tensor([0.5, -0.5, 0.0, 0.25])
    load = _counts([4, 5, 4, 3])
    yield Case(
        (bias, load, 0.01),
        close(_update(bias, load, 0.01)),
        says="two experts exactly at the mean, biases not at zero",
        hint=(
            "An expert exactly at the mean load stays where it is: torch.sign(0) is 0. The new bias "
            "starts from the old one."
        ),
    )


# A step of many parts ------------------------------------------------------------------------------------------------
def _whole_step(bias: torch.Tensor, loads: torch.Tensor, gamma: float) -> torch.Tensor:
    return _update(bias, loads.sum((0, 1)), gamma)


def _each_part() -> Solution:
    def solution(bias, loads, gamma):
        for load in loads.flatten(0, 1):
            bias = _update(bias, load, gamma)
        return bias

    return solution


def _last_part() -> Solution:
    return lambda bias, loads, gamma: _update(bias, loads[-1].sum(0), gamma)


def _own_rank() -> Solution:
    return lambda bias, loads, gamma: _update(bias, loads[:, 0].sum(0), gamma)


@grader(
    "balance.whole_step",
    minutes=10,
    level="medium",
    reference=lambda: _whole_step,
    wrong={"once": _each_part, "all micro-batches": _last_part, "all ranks": _own_rank},
)
def whole_step():
    bias = torch.zeros(4)
    two = torch.tensor([[[8.0, 0, 4, 4]], [[0.0, 6, 5, 5]]])  # 2 micro-batches, 1 rank
    yield Case(
        (bias, two, 0.1),
        close(_whole_step(bias, two, 0.1)),
        says="two micro-batches on one rank",
        hint=("Sum over all micro-batches first, then move the biases once: a step changes every bias by γ at most."),
    )
    four = torch.tensor(
        [[[5.0, 1, 1, 1], [1.0, 5, 1, 1]], [[1.0, 1, 5, 1], [1.0, 2, 1, 4]]]
    )  # 2 micro-batches, 2 ranks
    yield Case(
        (bias, four, 0.1),
        close(_whole_step(bias, four, 0.1)),
        says="two micro-batches on each of two ranks",
        hint=("Sum over all ranks too: every rank must arrive at the same biases, or they no longer train one model."),
    )


# The sequence-wise loss ----------------------------------------------------------------------------------------------
def _batch_wise() -> Solution:
    return lambda scores, k, alpha: balance.sequence_balance_loss(scores.flatten(0, 1)[None], k, alpha)


def _unnormalised() -> Solution:
    def solution(scores, k, alpha):
        T, E = scores.shape[1:]
        f = torch.stack([torch.bincount(s.topk(k).indices.flatten(), minlength=E) for s in scores]) * (E / (k * T))
        return alpha * (f * scores.mean(1)).sum(-1).mean()

    return solution


def _frequency() -> Solution:
    return lambda scores, k, alpha: balance.sequence_balance_loss(scores, k, alpha) / scores.shape[-1]


def _through_f() -> Solution:
    def solution(scores, k, alpha):
        p = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return alpha * scores.shape[-1] * (p * p).sum(-1).mean()

    return solution


def _differentiable(expected: torch.Tensor):
    judge = close(expected)

    def judged(answer):
        if wrong := judge(answer):
            return wrong
        return None if isinstance(answer, torch.Tensor) and answer.requires_grad else "the answer carries no gradient"

    return judged


def _detached() -> Solution:
    return lambda scores, k, alpha: balance.sequence_balance_loss(scores.detach(), k, alpha)


@grader(
    "balance.sequence_loss",
    minutes=20,
    level="medium",
    reference=lambda: balance.sequence_balance_loss,
    wrong={
        "its own sequence": _batch_wise,
        "share": _unnormalised,
        "E/(K·T)": _frequency,
        "counted": _through_f,
        "gradient": _detached,
    },
)
def sequence_loss():
    even = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])
    yield Case(
        (even, 1, 0.5),
        close(0.5),
        says="one sequence of two tokens, one for each expert: perfectly even",
        hint=(
            "P is the mean *share*: each score divided by the token's sum. f has the factor E/(K·T), "
            "so that it is 1 when all is even; the answer is then α."
        ),
    )
    lopsided = torch.tensor([[[0.8, 0.4], [0.6, 0.3]]])
    yield Case(
        (lopsided, 1, 1.0),
        close(4 / 3),
        says="both tokens choose expert 0, with shares 2/3 and 1/3",
        hint=(
            "f is *counted*: how often an expert is among the K best, here 2 and 0. Σ f·P = 2 · 2/3. "
            "P uses the share of each score in the token's sum."
        ),
    )
    pair = torch.tensor([[[0.8, 0.2], [0.8, 0.2]], [[0.2, 0.8], [0.2, 0.8]]])
    yield Case(
        (pair, 1, 1.0),
        close(1.6),
        says="two sequences, each on an expert of its own",
        hint=(
            "Each sequence is judged by its own sequence's counts, then the mean is taken. Over the "
            "whole batch all would look even."
        ),
    )
    live = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    yield Case(
        (live, 2, 0.1),
        _differentiable(balance.sequence_balance_loss(live, 2, 0.1).detach()),
        says="random scores, and a loss that can be differentiated",
        hint=("The gradient must flow through P; only the counts f are constants. Detach f, not the scores."),
    )
