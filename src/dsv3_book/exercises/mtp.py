"""Graders of chapter 6: tokens a depth reads and foretells, the merge, the loss, accepted drafts, a wrong order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3_book.exercises.grading import Case, Solution, close, grader
from dsv3_book.exercises.rope import random_tensor, tensor_judge
from dsv3_book.model.ops import rms_norm


# Which tokens --------------------------------------------------------------------------------------------------------
def _targets(tokens: Tensor, depth: int, J: int) -> tuple[Tensor, Tensor]:
    T = tokens.shape[1] - 1 - J
    return tokens[:, depth : T + depth], tokens[:, depth + 1 : T + depth + 1]


def _targets_seen() -> Solution:
    return lambda tokens, depth, J: (_targets(tokens, depth - 1, J)[0], _targets(tokens, depth, J)[1])


def _targets_next() -> Solution:
    return lambda tokens, depth, J: (_targets(tokens, depth, J)[0],) * 2


def _targets_to_the_end() -> Solution:
    return lambda tokens, depth, J: (tokens[:, depth:-1], tokens[:, depth + 1 :])


def _targets_judge(tokens: Tensor, depth: int, J: int) -> Callable[[Any], str | None]:
    inputs, targets = _targets(tokens, depth, J)

    def judge(answer: Any) -> str | None:
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            return "expected two tensors: the tokens that the depth reads, and those that it foretells"
        shapes = [tuple(torch.as_tensor(part).shape) for part in answer]
        if shapes != [tuple(inputs.shape)] * 2:
            return f"returned shapes {shapes[0]} and {shapes[1]}, expected T tokens a row: {tuple(inputs.shape)} twice"
        if torch.equal(answer[0], inputs) and torch.equal(answer[1], targets):
            return None
        why = ""
        if torch.equal(answer[0], _targets(tokens, depth - 1, J)[0]):
            why = "\nThat reads a token the hidden state has already seen: the input at place i is token i + depth."
        elif torch.equal(answer[1], inputs):
            why = "\nThat asks for the very token it was given: the target lies one place beyond the input."
        got = f"{answer[0].tolist()} and {answer[1].tolist()}"
        return f"returned  {got}\nexpected  {inputs.tolist()} and {targets.tolist()}{why}"

    return judge


@grader(
    "mtp.targets",
    minutes=10,
    reference=lambda: _targets,
    wrong={"already seen": _targets_seen, "very token": _targets_next, "T tokens a row": _targets_to_the_end},
)
def targets() -> Iterator[Case]:
    """Slices of a row of T + 1 + J tokens."""
    row = torch.tensor([[10, 11, 12, 13, 14, 15]])
    rows = torch.arange(18).view(2, 9)
    for tokens, depth, J, says in (
        (row, 1, 1, "one extra token: T = 4, so place 0 reads token 1 and foretells token 2"),
        (row, 1, 2, "J = 2, depth 1: T = 3, the last token is not used yet"),
        (row, 2, 2, "J = 2, depth 2: place 0 reads token 2 and foretells token 3"),
        (rows, 3, 4, "two rows, depth 3 of 4"),
    ):
        hint = "T = width − 1 − J, the same at every depth. Input: T tokens from place `depth` on; target: one further."
        yield Case((tokens, depth, J), _targets_judge(tokens, depth, J), says=says, hint=hint)


# The merge -----------------------------------------------------------------------------------------------------------
def _merge(hidden: Tensor, embedded: Tensor, hnorm: Tensor, enorm: Tensor, eh_proj: Tensor) -> Tensor:
    return torch.cat([rms_norm(embedded, enorm, 1e-6), rms_norm(hidden, hnorm, 1e-6)], -1) @ eh_proj.T


def _merge_reversed() -> Solution:
    return lambda h, e, hn, en, w: torch.cat([rms_norm(h, hn, 1e-6), rms_norm(e, en, 1e-6)], -1) @ w.T


def _merge_gains_swapped() -> Solution:
    return lambda h, e, hn, en, w: _merge(h, e, en, hn, w)


def _merge_raw_hidden() -> Solution:
    return lambda h, e, hn, en, w: torch.cat([rms_norm(e, en, 1e-6), h], -1) @ w.T


def _merge_one_norm() -> Solution:
    return lambda h, e, hn, en, w: rms_norm(torch.cat([e, h], -1), torch.cat([en, hn]), 1e-6) @ w.T


@grader(
    "mtp.merge",
    minutes=10,
    reference=lambda: _merge,
    wrong={
        "report's order": _merge_reversed,
        "gains are swapped": _merge_gains_swapped,
        "has no norm": _merge_raw_hidden,
        "a mean of its own": _merge_one_norm,
    },
)
def merge() -> Iterator[Case]:
    """eh_proj of two normed vectors."""
    names = {
        "That is the report's order; the released `eh_proj` reads the embedding first.": _merge_reversed,
        "The gains are swapped: `enorm` is the embedding's, `hnorm` the hidden state's.": _merge_gains_swapped,
        "The hidden state has no norm; both halves go through one.": _merge_raw_hidden,
        "One norm over both halves: each half has a mean of its own.": _merge_one_norm,
    }
    for B, T, D, says in ((1, 1, 2, "one token, D = 2"), (2, 3, 4, "two sequences of three tokens, D = 4")):
        hidden, embedded = 3 * random_tensor(B, T, D), random_tensor(B, T, D, 1).squeeze(-1)
        args = (hidden, embedded, 1 + 0.3 * random_tensor(D), 1 - 0.3 * random_tensor(D), random_tensor(D, 2 * D))
        judge = tensor_judge(_merge(*args), {text: wrong()(*args) for text, wrong in names.items()})
        hint = "norm(x) = x / sqrt(mean(x²) + 1e-6) · gain, each half by itself; then cat([embedding, hidden]) @ Wᵀ."
        yield Case(args, judge, says=says, hint=hint)


# The loss ------------------------------------------------------------------------------------------------------------
def _loss(main: float, depths: list[float], weight: float) -> float:
    return main + weight * sum(depths) / len(depths) if depths else main


def _loss_sum() -> Solution:
    return lambda main, depths, weight: main + weight * sum(depths)


def _loss_powers() -> Solution:
    return lambda main, depths, weight: main + sum(weight ** (k + 1) * loss for k, loss in enumerate(depths))


def _loss_never_empty() -> Solution:
    return lambda main, depths, weight: main + weight * sum(depths) / len(depths)


def _loss_convex() -> Solution:
    return lambda main, depths, weight: (1 - weight) * main + weight * _loss(0.0, depths, 1.0)


@grader(
    "mtp.loss",
    minutes=5,
    reference=lambda: _loss,
    wrong={
        "divides by J": _loss_sum,
        "same weight": _loss_powers,
        "ZeroDivisionError": _loss_never_empty,
        "stays whole": _loss_convex,
    },
)
def loss() -> Iterator[Case]:
    """main + λ/J Σ L_k."""
    yield Case((2.0, [3.0], 0.3), close(2.9), says="one depth: 2 + 0.3 · 3", hint="The main loss stays whole.")
    hint = "Every depth has the same weight, and the report divides by J: the weight of the mean is λ."
    yield Case((2.0, [3.0, 5.0], 0.3), close(3.2), says="two depths: the mean of 3 and 5 is 4", hint=hint)
    yield Case((2.0, [], 0.3), close(2.0), says="no MTP: J = 0", hint="Without depths there is nothing to divide.")


# Drafts --------------------------------------------------------------------------------------------------------------
def _accepted(draft: Tensor, own: Tensor) -> float:
    return float((draft[:, :-1] == own[:, 1:]).double().mean())


def _accepted_unshifted() -> Solution:
    return lambda draft, own: float((draft == own).double().mean())


def _accepted_backwards() -> Solution:
    return lambda draft, own: float((draft[:, 1:] == own[:, :-1]).double().mean())


def _accepted_count() -> Solution:
    return lambda draft, own: int((draft[:, :-1] == own[:, 1:]).sum())


@grader(
    "mtp.accepted",
    minutes=10,
    level="medium",
    reference=lambda: _accepted,
    wrong={"same place": _accepted_unshifted, "wrong way": _accepted_backwards, "share": _accepted_count},
)
def accepted() -> Iterator[Case]:
    """Drafts that the main model would have written itself."""
    hint = (
        "At place i the main model chooses token i + 1, the draft is for token i + 2: draft[i] belongs to own[i + 1]. "
        "The last draft has nothing to be compared with. Answer with a share, between 0 and 1."
    )
    # The main model writes 5 5 1 2; a perfect drafter is one token ahead of it.
    own, ahead = torch.tensor([[5, 5, 1, 2]]), torch.tensor([[5, 1, 2, 5]])
    mixed = torch.tensor([[2, 3, 9, 5], [7, 8, 8, 1]]), torch.tensor([[1, 2, 3, 4], [8, 7, 8, 8]])
    for draft, main, says in ((ahead, own, "a perfect drafter"), (*mixed, "two rows, five of six accepted")):
        mistakes = {
            "That compares drafts and choices at the same place: they are for different tokens.": _accepted_unshifted(),
            "Shifted the wrong way: the draft runs ahead of the main model.": _accepted_backwards(),
        }
        answers = {text: torch.tensor(wrong(draft, main)) for text, wrong in mistakes.items()}
        judge = tensor_judge(torch.tensor(_accepted(draft, main)), answers)
        yield Case((draft, main), judge, says=says, hint=hint)


# Repair --------------------------------------------------------------------------------------------------------------
def _reorder(weight: Tensor) -> Tensor:
    return weight.roll(weight.shape[0], 1)


def _reorder_nothing() -> Solution:
    return lambda weight: weight


def _reorder_flipped() -> Solution:
    return lambda weight: weight.flip(1)


def _reorder_rows() -> Solution:
    return lambda weight: weight.roll(weight.shape[0] // 2, 0)


@grader(
    "mtp.reorder",
    minutes=10,
    level="medium",
    reference=lambda: _reorder,
    wrong={"unchanged": _reorder_nothing, "mirrored": _reorder_flipped, "rows": _reorder_rows},
)
def reorder() -> Iterator[Case]:
    """An eh_proj trained in the report's order, made to fit the released one."""
    for D in (2, 4):
        weight = torch.arange(2.0 * D * D).view(D, 2 * D)
        mistakes = {
            "The weight came back unchanged.": weight,
            "That is mirrored: the halves change places, their columns keep their order.": weight.flip(1),
            "Those are rows, the outputs; what changes places are columns, the inputs.": weight.roll(D // 2, 0),
        }
        hint = "weight is [D, 2·D]: columns 0 … D − 1 read the first half of the input. Swap the two halves of columns."
        judge = tensor_judge(_reorder(weight), mistakes)
        yield Case((weight,), judge, says=f"a weight [{D}, {2 * D}] that reads [hidden; embedding]", hint=hint)
