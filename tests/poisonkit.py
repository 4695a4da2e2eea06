"""Numbers that are not finite, put into a trainer at known places: a weight, an activation, a gradient."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_book.model import Transformer
from dsv3_book.train.config import Batch, Every, Optim, TrainConfig
from dsv3_book.train.trainer import Trainer

GUILTY, PLACE = 2, "layers.1.self_attn"  # the micro-batch of the first step; of the activation and its gradient


def poisonable(make: Callable[..., TrainConfig], *where: Any, **changes: Any) -> TrainConfig:
    """Four micro-batches a step, of one sequence each; an average of the weights, and saves to compare."""
    base: dict[str, Any] = {
        "batch": Batch(sequence_length=16, start=4, end=4, multiple=4, micro=1),
        "optim": Optim(lr=3e-3, warmup_steps=2, ema=0.9),
        "every": Every(checkpoint=100, validation=100, validation_windows=4),
    }
    return make(*where, **base | changes)


def weight(trainer: Trainer) -> int:
    """A NaN in the embedding of a token that only one micro-batch of the first step has; which one."""
    tokens = [set(trainer.micro_batch(m).flatten().tolist()) for m in range(4)]
    inputs = set(trainer.micro_batch(GUILTY)[:, :16].flatten().tolist())
    only = inputs.difference(*(t for m, t in enumerate(tokens) if m != GUILTY))
    with torch.no_grad():
        trainer.pipeline.parameters_by_name()["embed_tokens.weight"][min(only), 3] = math.nan
    return GUILTY


def activation(trainer: Trainer, value: float = math.inf) -> int:
    """One number of an attention's output, for one micro-batch of the first step; which one."""

    def spoil(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 3, 5] = value
        return output

    _on_guilty(trainer, spoil)
    return GUILTY


def gradient(trainer: Trainer, place: str = PLACE) -> int:
    """The gradient of that output instead, or of another module's: all forwards are fine."""

    def spoil(output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda g: g * math.nan)
        return output

    _on_guilty(trainer, spoil, place)
    return GUILTY


def late_gradient(trainer: Trainer) -> int:
    """The gradient of the last norm's output, which then goes back through all routed experts."""
    return gradient(trainer, "norm")


def parameter_gradient(trainer: Trainer, name: str) -> None:
    """A parameter's, whatever the micro-batch."""
    p = trainer.pipeline.parameters_by_name().get(name)
    if p is not None:
        p.register_hook(lambda g: torch.full_like(g, math.inf))


def _on_guilty(trainer: Trainer, spoil: Callable[[Tensor], Tensor], place: str = PLACE) -> None:
    """Lets a module's output for the guilty micro-batch be spoiled, wherever and however often it is computed: it
    is known by its input, which the whole model with the same seed has too."""
    came: list[Tensor] = []
    model = Transformer(trainer.config.model, trainer.config.seed)
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: came.append(inputs[0].detach()))
    with torch.no_grad():
        model.losses(trainer.micro_batch(GUILTY))

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        same = inputs[0].shape == came[0].shape and torch.allclose(inputs[0], came[0], rtol=1e-4, atol=1e-5)
        return spoil(output) if same else output

    for stage in trainer.pipeline.stages.values():
        if place in dict(stage.named_modules()):
            stage.get_submodule(place).register_forward_hook(hook)
