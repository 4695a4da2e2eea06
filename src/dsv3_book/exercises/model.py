"""Graders of chapter 7: the first loss, released names, the loss in chunks, and where two models part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.exercises.grading import Case, Solution, close, grader
from dsv3_book.model import Transformer


# The first loss ------------------------------------------------------------------------------------------------------
def _first_loss(V: int, D: int, std: float) -> float:
    return math.log(V) + std**2 * D / 2


@grader(
    "model.first_loss",
    minutes=5,
    reference=lambda: _first_loss,
    wrong={
        "knows nothing": lambda: lambda V, D, std: math.log(V),
        "half": lambda: lambda V, D, std: math.log(V) + std**2 * D,
        "variance": lambda: lambda V, D, std: math.log(V) + std * D**0.5 / 2,
        "natural": lambda: lambda V, D, std: math.log2(V) + std**2 * D / 2,
    },
)
def first_loss() -> Iterator[Case]:
    """Expected loss of an untrained model."""
    for args, says in (((4096, 256, 0.02), "the laptop model"), ((129280, 7168, 0.006), "V3 as the report starts it")):
        V, D, std = args
        mistakes = {
            math.log(V): "a model that knows nothing; but these logits are not quite zero",
            math.log(V) + std**2 * D: "only half of the logits' variance is added",
            math.log(V) + std * D**0.5 / 2: "that adds a standard deviation: take the variance",
            math.log2(V) + std**2 * D / 2: "that is in bits: a loss in nats has the natural logarithm",
        }
        hint = "ln V, and half the variance of a sum of D products of a number of size one with a weight."
        yield Case(args, _number(_first_loss(*args), mistakes), says=says, hint=hint)


def _number(expected: float, mistakes: Mapping[float, str]) -> Callable[[Any], str | None]:
    def judge(answer: Any) -> str | None:
        if math.isclose(answer, expected, rel_tol=1e-9):
            return None
        why = next((f" ({text})" for value, text in mistakes.items() if math.isclose(answer, value)), "")
        return f"returned {answer!r}{why}, expected {expected!r}"

    return judge


# Released names ------------------------------------------------------------------------------------------------------
def _unstack(name: str, stacked: Tensor) -> dict[str, Tensor]:
    stem, _, matrix = name.rpartition(".")
    return {f"model.{stem}.{e}.{matrix}.weight": row for e, row in enumerate(stacked)}


def _renamed(change: Callable[[str], str]) -> Solution:
    return lambda name, stacked: {change(k): v for k, v in _unstack(name, stacked).items()}


def _same_tensors(expected: dict[str, Tensor]) -> Callable[[Any], str | None]:
    def judge(answer: Any) -> str | None:
        if not isinstance(answer, dict):
            return f"returned a {type(answer).__name__}, expected a dictionary of name → tensor"
        if set(answer) != set(expected):
            got, want = sorted(set(answer) - set(expected))[:1], sorted(set(expected) - set(answer))[:1]
            return f"has the name {got[0] if got else 'of nothing new'}, lacks {want[0] if want else 'nothing'}"
        for name, tensor in expected.items():
            if answer[name].shape != tensor.shape:
                return f"{name} has shape {tuple(answer[name].shape)}, a released tensor {tuple(tensor.shape)}"
            if not torch.equal(answer[name], tensor):
                return f"{name} holds the numbers of another expert"
        return None

    return judge


@grader(
    "model.unstack",
    minutes=10,
    reference=lambda: _unstack,
    wrong={
        "model.": lambda: _renamed(lambda k: k.removeprefix("model.")),
        "weight": lambda: _renamed(lambda k: k.removesuffix(".weight")),
        "another expert": lambda: lambda name, s: _unstack(name, s.flip(0)),
        "shape": lambda: lambda name, s: _unstack(name, s.transpose(1, 2)),
    },
)
def unstack() -> Iterator[Case]:
    """A stacked parameter as the tensors of a released file."""
    numbers = torch.arange(24.0)
    for name, shape in (
        ("layers.3.mlp.experts.gate_proj", (3, 2, 4)),
        ("layers.61.mlp.experts.down_proj", (2, 4, 3)),
    ):
        stacked = numbers.view(shape)
        hint = "In a file: model.layers.3.mlp.experts.0.gate_proj.weight, a matrix of its own for each expert."
        judge = _same_tensors(_unstack(name, stacked))
        yield Case((name, stacked), judge, says=f"{shape[0]} experts of {name.split('.')[1]}", hint=hint)


# The loss in chunks --------------------------------------------------------------------------------------------------
class _Watched(torch.Tensor):
    """A tensor whose descendants' sizes are noted."""

    largest = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                _Watched.largest = max(_Watched.largest, t.numel())
        return result


def _chunked_loss(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    total = x.new_zeros(())
    for start in range(0, x.shape[0], chunk):
        rows = slice(start, start + chunk)
        total = total + F.cross_entropy(x[rows] @ weight.T, targets[rows], reduction="sum")
    return total / x.shape[0]


def _all_at_once() -> Solution:
    return lambda x, weight, targets, chunk: F.cross_entropy(x @ weight.T, targets)


def _mean_of_means() -> Solution:
    def loss(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        pairs = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([F.cross_entropy(a @ weight.T, b) for a, b in pairs]).mean()

    return loss


def _only_whole_chunks() -> Solution:
    return lambda x, weight, targets, chunk: _chunked_loss(
        x[: len(x) // chunk * chunk], weight, targets[: len(x) // chunk * chunk], chunk
    )


def _loss_judge(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Callable[[Any], str | None]:
    plain = F.cross_entropy(x @ weight.T, targets).item()
    mistakes = {
        _mean_of_means()(x, weight, targets, chunk).item(): "the mean of the chunks' means: the last chunk is short",
        _only_whole_chunks()(x, weight, targets, chunk).item(): "the rows behind the last whole chunk are left out",
    }

    def judge(answer: Any) -> str | None:
        largest, _Watched.largest = _Watched.largest, 0
        if problem := close(plain, atol=1e-5)(answer.as_subclass(torch.Tensor) if torch.is_tensor(answer) else answer):
            value = float(answer)
            why = next((text for wrong, text in mistakes.items() if abs(value - wrong) < 1e-5), "")
            return f"{problem}\n{why}" if why else problem
        if largest > max(chunk * weight.shape[0], x.numel(), weight.numel()):
            return (
                f"right, but a tensor of {largest:,} numbers was made: all logits at once are {len(x)} × {len(weight)}"
            )
        return None

    return judge


@grader(
    "model.chunked_loss",
    minutes=20,
    level="medium",
    reference=lambda: _chunked_loss,
    wrong={"all logits at once": _all_at_once, "last chunk": _mean_of_means, "left out": _only_whole_chunks},
)
def chunked_loss() -> Iterator[Case]:
    """Mean cross-entropy, never with more than `chunk` rows of logits."""
    g = torch.Generator().manual_seed(0)
    for N, D, V, chunk, says in ((6, 2, 5, 3, "two chunks"), (50, 3, 40, 16, "a short last chunk")):
        x, weight = torch.randn(N, D, generator=g) * 2, torch.randn(V, D, generator=g)
        targets = torch.randint(V, (N,), generator=g)
        judge = _loss_judge(x, weight, targets, chunk)
        _Watched.largest = 0
        watched = x.as_subclass(_Watched), weight.as_subclass(_Watched)
        hint = "Sum the losses of each chunk's rows, and divide once, by the number of all rows."
        yield Case((*watched, targets, chunk), judge, says=says, hint=hint)


# Where two models part -----------------------------------------------------------------------------------------------
def _states(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What comes out of the embedding and of each block."""
    states, at = [model.embed(tokens)], model.angles(tokens.shape[1])
    for block in model.blocks():
        states.append(block(states[-1], at, model.dispatch)[0])
    return states


def _differences(a: Transformer, b: Transformer, tokens: Tensor) -> list[float]:
    with torch.no_grad():
        pairs = zip(_states(a, tokens), _states(b, tokens), strict=True)
        return [float((x - y).norm() / x.norm()) for x, y in pairs]


def _first_difference(a: Transformer, b: Transformer, tokens: Tensor) -> int | None:
    """−1 stands for the embedding."""
    return next((i - 1 for i, d in enumerate(_differences(a, b, tokens)) if d > 1e-4), None)


def _largest_difference() -> Solution:
    return lambda a, b, tokens: max(range(-1, 4), key=lambda i: _differences(a, b, tokens)[i + 1])


def _bits() -> Solution:
    return lambda a, b, tokens: next((i - 1 for i, d in enumerate(_differences(a, b, tokens)) if d > 0), -2)


def _blind_to_embedding() -> Solution:
    return lambda a, b, tokens: next((i for i, d in enumerate(_differences(a, b, tokens)[1:]) if d > 1e-4), -2)


def _place(expected: int, largest: int) -> Callable[[Any], str | None]:
    def judge(answer: Any) -> str | None:
        if answer == expected:
            return None
        why = " (the largest difference is not the first: differences grow on their way)" if answer == largest else ""
        return f"returned {answer!r}{why}, expected {expected}"

    return judge


@grader(
    "model.first_difference",
    minutes=30,
    level="hard",
    reference=lambda: _first_difference,
    wrong={"largest": _largest_difference, "rounding": _bits, "embedding": _blind_to_embedding},
)
def first_difference() -> Iterator[Case]:
    """The first block after which two models' hidden states are apart by more than rounding; −1: the embedding."""
    cfg = ModelConfig.preset("tiny").replace(initializer_range=0.1, num_nextn_predict_layers=0)
    tokens = torch.randint(cfg.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    for layer, says, hint in (
        (2, "block 2 differs", "Run embedding and blocks by hand in both models, and compare after each."),
        (0, "a last bit in the embedding, a mistake in block 0", "Relative differences below 1e-4 are rounding."),
        (-1, "the embedding differs", "Compare before the first block, too: the embedding is −1."),
    ):
        a, b = Transformer(cfg, seed=1), Transformer(cfg, seed=1)
        with torch.no_grad():
            if layer == -1:
                b.embed_tokens.weight.mul_(1.1)
            else:
                b.blocks()[layer].self_attn.o_proj.weight.mul_(2.0)
            if layer == 0:
                b.embed_tokens.weight.mul_(1 + 1e-6)
        found = _differences(a, b, tokens)
        yield Case((a, b, tokens), _place(layer, found.index(max(found)) - 1), says=says, hint=hint)
