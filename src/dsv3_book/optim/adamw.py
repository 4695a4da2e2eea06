"""AdamW as V3 uses it: β = (0.9, 0.95), weight decay 0.1 (report §4.2), and moments kept in BF16 (§3.3) or FP32.

The update itself is torch's own fused AdamW, one pass over each tensor; there is nothing in it that V3 does otherwise.
Its parameters are the FP32 master weights themselves (report §3.3): the model casts them where it uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIECE = {"cpu": 2**19, "cuda": 2**24}  # numbers updated at a time: on a CPU what its caches hold, on a GPU more
CUT = 64  # numbers: a tensor is cut at multiples of this only
_KEYS = ("exp_avg", "exp_avg_sq")

Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, both moments, the parameter's step


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose two moments rest in fp32 or in bf16 between steps.

    With bf16, a step widens a piece of both moments to fp32 (exactly), runs the very same fused update on it, in which
    the parameter sees the new moments *before* they are rounded, and rounds them to bf16, to the nearest and ties to
    even. (The report says only that the moments are BF16; this order is our choice.) Piece by piece, so that besides
    half the memory for the moments a step needs 4 MiB on a CPU, 128 MiB on a GPU, whatever the model's size.

    `moments` is "fp32" or "bf16". bf16 wants fp32 parameters, and β of at most 1 − 2⁻⁸ ≈ 0.996: nearer to one, a moment
    shrinks in one step by less than half of bf16's spacing, rounds back to what it was, and never decays. V3's 0.95 is
    far from that; Adam's usual 0.999 is not.
    """

    def __init__(self, groups: list[dict[str, Any]], moments: str = "fp32", **settings: Any) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
        self.moments = MOMENTS[moments]
        super().__init__(groups, fused=True, **settings)
        if self.moments == torch.float32:
            return
        for group in self.param_groups:
            if max(group["betas"]) > 1 - 2**-8:
                raise ValueError(
                    f"betas {group['betas']} do not go with bf16 moments: beyond 1 - 2^-8 a moment that should decay "
                    "rounds back to what it was; lower them, or keep the moments in fp32"
                )
            if others := {p.dtype for p in group["params"]} - {torch.float32}:
                raise ValueError(f"bf16 moments belong to fp32 master weights, got parameters of {others}")

    def state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for `p`. Made here if there is none yet, as AdamW makes it at its first step: zeros."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in _KEYS:
                dtype = p.dtype if self.moments == torch.float32 else self.moments
                state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; parameters without one are left alone.

        torch's fused update leaves the parameters' version counters as they were; here they count it, because what is
        derived from a weight and kept (its FP8 codes) is known to be stale by them.
        """
        if self.moments == torch.float32:
            loss = super().step(closure)
        else:
            loss = self._step_in_pieces(closure)
        increment_version([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    def _step_in_pieces(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            for device, parameters in groupby(having, key=lambda p: p.device):
                self._step(list(parameters), group, PIECE.get(device.type, PIECE["cuda"]))
        return loss

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any], most: int) -> None:
        states = [self.state_of(p) for p in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        size = min(most, sum(p.numel() for p in parameters))
        scratch = torch.empty(2, size, dtype=torch.float32, device=parameters[0].device)
        for batch in _batches(zip(parameters, states, strict=True), most):
            p, g, *resting, steps = (list(column) for column in zip(*batch, strict=True))
            sizes = [piece.numel() for piece in p]
            m, v = ([*row[: sum(sizes)].split(sizes)] for row in scratch)
            for wide, narrow in zip((m, v), resting, strict=True):
                torch._foreach_copy_(wide, narrow)
            torch._fused_adamw_(
                p,
                g,
                m,
                v,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for wide, narrow in zip((m, v), resting, strict=True):
                torch._foreach_copy_(narrow, wide)  # torch rounds to bf16 to the nearest, ties to even

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which gives all state the parameters' dtype; the moments go back to theirs."""
        super().load_state_dict(state_dict)
        if self.moments != torch.float32:
            for state in self.state.values():
                state.update({key: state[key].to(self.moments) for key in _KEYS if key in state})


def _batches(owners: Iterable[tuple[nn.Parameter, dict[str, Tensor]]], most: int) -> Iterator[list[Piece]]:
    """Pieces of the flattened parameters and what belongs to them, together at most `most` numbers at a time."""
    batch: list[Piece] = []
    room = most = max(most, CUT)
    for p, state in owners:
        assert p.grad is not None
        flat = [p.detach().view(-1), p.grad.reshape(-1), *(state[key].view(-1) for key in _KEYS)]
        begin = 0
        while begin < p.numel():
            # The last numbers of a piece are not vectorised and differ in the last bit: cut where no such rest is left.
            end = p.numel() if p.numel() - begin <= room else begin + room // CUT * CUT
            if end > begin:
                param, grad, m, v = (t[begin:end] for t in flat)
                batch.append((param, grad, m, v, state["step"]))
            room -= end - begin
            begin = end
            if room < CUT:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    moments: str = "fp32",
    dims: Mapping[str, int] | None = None,
) -> AdamW:
    """The optimiser for these parameters, in two groups: matrices decay, vectors do not.

    The report gives the decay (0.1) and not what it applies to. That the gains of the norms are left alone is our
    choice, and the field's custom: decay pulls towards zero, but a gain's neutral value is one. Embedding and head do
    decay. The routing bias is no parameter and never comes here. ε is not in the report either: 1e-8, the usual.

    moments: "fp32", or "bf16" as in the report (§3.3), which halves their memory. See `AdamW`.
    dims: by name, how many dimensions that has of which the parameter is a flat piece (ZeRO's shards; None: its own).

    Raises:
        ValueError: other moments; bf16 moments with parameters that are not fp32, or with a β too near to one.
    """
    named = [(p, dims[name] if dims else p.dim()) for name, p in named_parameters]
    groups = [
        {"params": [p for p, dim in named if dim >= 2], "weight_decay": weight_decay},
        {"params": [p for p, dim in named if dim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], moments, lr=lr, betas=betas, eps=eps)


def optimizer_tensors(named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: AdamW) -> dict[str, Tensor]:
    """The optimiser's state by parameter name ("….exp_avg", "….exp_avg_sq", "….step"), to be saved or filled in place.

    State that AdamW would only make at its first step is made here. The moments have the dtype in which they rest.
    """
    return {f"{name}.{key}": value for name, p in named_parameters for key, value in optimizer.state_of(p).items()}
