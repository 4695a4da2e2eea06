"""AdamW as V3 uses it (report §4.2): β = (0.9, 0.95), weight decay 0.1.

The step itself is torch's own fused AdamW, one pass over each tensor; there is nothing in it that V3 does otherwise.
Its parameters are the FP32 master weights themselves (report §3.3): the model casts them where it uses them. The
moments are FP32 here; the report keeps them in BF16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """The optimiser for these parameters, in two groups: matrices decay, vectors do not.

    The report gives the decay (0.1) and not what it applies to. That the gains of the norms are left alone is our
    choice, and the field's custom: decay pulls towards zero, but a gain's neutral value is one. Embedding and head do
    decay. The routing bias is no parameter and never comes here. ε is not in the report either: 1e-8, the usual.
    """
    named = list(named_parameters)
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_tensors(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    """The optimiser's state by parameter name ("….exp_avg", "….exp_avg_sq", "….step"), to be saved or filled in place.

    State that AdamW would only make at its first step is made here, as AdamW makes it: zeros.
    """
    tensors = {}
    for name, p in named_parameters:
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
    return tensors
