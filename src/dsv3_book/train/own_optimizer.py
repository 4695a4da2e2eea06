"""Any optimiser in AdamW's place: a trial of it, and the face that ZeRO-1 and checkpoints know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dsv3_book.train.contracts import OwnOptimizer, need
from dsv3_book.train.probes import asked, can_be_called

Factory = Callable[..., Any]
Kept = dict[str, bool]  # what is kept for a parameter: name -> whether it has the parameter's shape (else one number)
DECAYS = (True, False)


class Trial(NamedTuple):
    """What a trial found out about a factory."""

    kept: dict[bool, Kept]  # for parameters that decay, and for those that don't
    by_number: bool  # the update of a number depends on its own gradients only: ZeRO-1 may cut parameters


class Own:
    """An optimiser of one's own, with the face of `optim.adamw.AdamW`: param_groups, state_of, step, moments."""

    moments = torch.float32

    def __init__(self, optimizer: OwnOptimizer, decays: Mapping[nn.Parameter, bool], kept: dict[bool, Kept]) -> None:
        self.optimizer, self.decays, self.kept = optimizer, decays, kept

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's, in which the trainer sets the learning rate."""
        return self.optimizer.param_groups

    def state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for `p`, by name: tensors of its shape, or of no dimension. Before the first step they are made
        here, to be filled from a checkpoint."""
        state = self.optimizer.state.setdefault(p, {})
        for key, like in self.kept[self.decays[p]].items():
            if state.get(key) is None:
                state[key] = torch.zeros_like(p.detach()) if like else torch.zeros((), device=p.device)
        return {key: state[key] for key in self.kept[self.decays[p]]}

    @torch.no_grad()
    def step(self) -> None:
        """One update. What is derived from a weight and kept (FP8 codes) is known to be stale by its version."""
        self.optimizer.step()
        increment_version([p for group in self.param_groups for p in group["params"] if p.grad is not None])


def own_optimizer(factory: Factory, trial: Trial) -> Callable[..., Own]:
    """A function called as `optim.adamw.adamw` is, which gives `factory`'s optimiser."""

    def make(
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: str = "fp32",
        dims: Mapping[str, int] | None = None,
    ) -> Own:
        if moments != "fp32":
            raise ValueError(f"{moments} moments are AdamW's: with --swap.optimizer, give --optim.moments fp32")
        decays = {p: (dims[name] if dims else p.dim()) >= 2 for name, p in named_parameters}
        return Own(build(factory, decays, lr, betas, eps, weight_decay), decays, trial.kept)

    return make


def build(
    factory: Factory,
    decays: Mapping[nn.Parameter, bool],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Any:
    """The factory's optimiser: matrices decay, vectors don't; β and ε go to those that have a name for them."""
    groups = [
        {"params": [p for p in decays if decays[p] is yes], "weight_decay": weight_decay if yes else 0.0}
        for yes in DECAYS
    ]
    settings = {name: value for name, value in (("betas", betas), ("eps", eps)) if _takes(factory, name, value)}
    return factory([group for group in groups if group["params"]], lr=lr, **settings)


def _takes(factory: Factory, name: str, value: Any) -> bool:
    """Whether it has a parameter of this name, for a value of this kind (Adafactor's eps, for one, is a pair)."""
    try:
        parameter = inspect.signature(factory).parameters.get(name)
    except ValueError:  # some built-in things have no signature
        return False
    if parameter is None:
        return False
    return parameter.default is parameter.empty or isinstance(parameter.default, type(value))


# The trial -----------------------------------------------------------------------------------------------------------
def try_optimizer(factory: Factory) -> Trial:
    """Three steps on a matrix and a vector; then the same with the matrix cut in two.

    Raises:
        Refused: with what was found and what is wanted.
    """
    can_be_called(factory, "factory(groups, lr=0.01)", [], lr=0.01)
    first = _Three(factory)
    first.run()
    again = _Three(factory)
    again.run()
    for p, q in zip(first.parameters, again.parameters, strict=True):
        need(torch.equal(p, q), "two runs from the same weights and gradients end apart; wanted: the same weights")
    kept = {yes: first.kept(p) for yes, p in zip(DECAYS, first.parameters, strict=False)}
    cut = _Three(factory, at=11)
    cut.run()
    whole = torch.cat([p.detach().flatten() for p in first.parameters])
    by_number = torch.allclose(whole, torch.cat([p.detach().flatten() for p in cut.parameters]), rtol=1e-5, atol=1e-7)
    return Trial(kept, by_number and all(cut.kept(p) == kept[True] for p in cut.parameters[:2]))


class _Three:
    """Three steps on a 6 × 4 matrix (or on its numbers, cut in two stretches) and a vector of 5."""

    def __init__(self, factory: Factory, at: int | None = None) -> None:
        self.draw, self.at, self.stepped = torch.Generator().manual_seed(0), at, False
        self.parameters = [nn.Parameter(t) for t in self.numbers()]
        decays = {p: p is not self.parameters[-1] for p in self.parameters}
        self.idle = nn.Parameter(torch.zeros(0))  # a rank may have none of a kind's numbers
        with asked("making it as factory(groups, lr=0.01)"):
            self.optimizer = build(factory, {**decays, self.idle: False}, 0.01, (0.9, 0.95), 1e-8, 0.1)
        self.check_form()

    def numbers(self) -> list[Tensor]:
        matrix = torch.randn(6, 4, generator=self.draw)
        parts = [matrix] if self.at is None else [matrix.flatten()[: self.at], matrix.flatten()[self.at :]]
        return [*(part.clone() for part in parts), torch.randn(5, generator=self.draw)]

    def check_form(self) -> None:
        for name in ("param_groups", "state", "step"):
            need(hasattr(self.optimizer, name), f"returned {_type(self.optimizer)} without .{name}")
        groups = self.optimizer.param_groups
        need(all("lr" in group for group in groups), 'its param_groups have no "lr" to set the rate in')
        listed = sorted(id(p) for group in groups for p in group["params"])
        given = sorted(map(id, [*self.parameters, self.idle]))
        need(listed == given, f"lists {len(listed)} parameters for the {len(given)} it was given; wanted: each, once")

    def run(self) -> None:
        self.step(0.01)
        self.step(0.0)
        self.step(0.02)

    def step(self, lr: float) -> None:
        gradients = self.numbers()
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g.clone()  # it's the optimiser's: it may change or drop it
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in self.parameters]
        with asked("step()"), torch.no_grad():
            self.optimizer.step()
        for p, b, g in zip(self.parameters, before, gradients, strict=True):
            moved = (p.detach() - b).abs().max().item()
            need(torch.isfinite(p).all(), "a step from finite gradients left weights that are not finite")
            if lr == 0:
                need(moved == 0, f'a step with "lr" 0 in its groups moved a weight by {moved:.1e}; wanted: by nothing')
            else:
                need(moved > 0, f"a step with lr {lr} moved nothing")
            if not self.stepped:
                down = ((p.detach() - b) * g).sum() < 0
                need(down, "its first step goes up the gradient; wanted: down")
        self.stepped = True

    def kept(self, p: nn.Parameter) -> Kept:
        kept: Kept = {}
        for key, value in self.optimizer.state.get(p, {}).items():
            if value is None:
                continue
            what = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else _type(value)
            fits = isinstance(value, Tensor) and value.shape in (p.shape, ()) and value.dtype == torch.float32
            need(
                fits,
                f"keeps state[p][{key!r}] {what} for a parameter of shape {tuple(p.shape)}; wanted: fp32 tensors of "
                "its shape or of none, which can be saved, cut among ranks and put together",
            )
            kept[key] = bool(value.dim())
        return kept


def _type(thing: Any) -> str:
    return f"a {type(thing).__name__}"
