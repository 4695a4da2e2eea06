"""The reader's own parts: named on the command line, loaded, tried, and put in the place of the package's.

    python -m dsv3_book.train --swap.router my_router.py:MyRouter --swap.optimizer torch.optim:SGD

What a part must be is in `contracts.py`, how it is tried in `probes.py`. Naming a file here runs it: do so with code
that you trust. Nothing else ever imports one. A run's folder and its checkpoints remember names and checksums, and a
run that goes on, or writes text, without them asks for the same `--swap.…` again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.model.experts import MoE
from dsv3_book.model.mla import Cache
from dsv3_book.model.rope import Angles
from dsv3_book.model.transformer import _generator
from dsv3_book.pipeline.schedule import Schedule
from dsv3_book.train import probes
from dsv3_book.train.contracts import REFERENCE, OwnBalance, OwnSchedule, Refused, need
from dsv3_book.train.own_optimizer import Own, own_optimizer, try_optimizer
from dsv3_book.train.sources import STATEFUL, Source, load, same_parts


@dataclass(frozen=True)
class Swap:
    """Parts of your own instead of the package's: my_file.py:Name, or package.module:Name."""

    attention: str | None = None
    """A module made as MyAttention(cfg, layer), in every block."""
    router: str | None = None
    """A module made as MyRouter(cfg), in every MoE layer."""
    balance: str | None = None
    """A function (bias, load, gamma) that moves a router's bias after each step."""
    schedule: str | None = None
    """A function (num_ranks, num_microbatches) that returns a Schedule; or a text file of one."""
    optimizer: str | None = None
    """A class of torch.optim, or a function (groups, lr) that returns such an optimiser."""


@dataclass(frozen=True)
class Swaps:
    """The parts, loaded and tried; None where the package's own is to be used.

    balance: in the place of `update_bias`; for routers that have a bias.
    schedule: in the place of `make_schedule` without a name: (P, M) → a schedule that is right, or ValueError.
    optimizer: in the place of `optim.adamw.adamw`, with the same arguments.
    """

    cfg: ModelConfig
    attention: Callable[..., nn.Module] | None = None
    router: Callable[..., nn.Module] | None = None
    balance: OwnBalance | None = None
    schedule: OwnSchedule | None = None
    optimizer: Callable[..., Own] | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)

    def apply(self, model: nn.Module, seed: int = 0) -> None:
        """Puts attention and router into every block of `model`: a Transformer, a stage of one, or a Pipeline.

        Right after it is made, before FP8, optimiser and checkpoint. Weights start by (seed, name in the whole model),
        so every layout starts with the same; a part with the reference's names and shapes starts with its numbers.
        """
        for stage in (m for m in model.modules() if isinstance(m, Transformer)):
            for name, block in stage.layers.items():
                if self.attention is not None:
                    recompute = block.recompute
                    block.self_attn = self._attention(f"layers.{name}.self_attn", int(name), seed, stage.device)
                    block.self_attn.recompute = recompute
                if self.router is not None and isinstance(block.mlp, MoE):
                    where = f"layers.{name}.mlp.gate"
                    block.mlp.gate = made(self.router, (self.cfg,), where, self.cfg, seed, stage.device)  # type: ignore[assignment]

    def _attention(self, name: str, layer: int, seed: int, device: torch.device) -> nn.Module:
        assert self.attention is not None
        attention: Any = made(self.attention, (self.cfg, layer), name, self.cfg, seed, device)
        if not hasattr(attention, "cfg"):
            attention.cfg = self.cfg  # a pipeline's stage reads it there
        if getattr(attention, "decode", None) is None:
            attention.layer, attention.inputs = layer, weakref.WeakKeyDictionary()
            attention.decode = MethodType(decode_by_forward, attention)
        return attention

    def fingerprints(self) -> dict[str, Source]:
        """For run.json and checkpoints: for each swapped kind its import path and its source file's SHA-256."""
        return {kind: dict(source) for kind, source in self.sources.items()}

    def same_as(self, before: Mapping[str, Source], place: Path, kinds: Sequence[str] = STATEFUL) -> list[str]:
        """Whether a run in `place`, whose fingerprints were `before`, may go on with these parts: see `same_parts`."""
        return same_parts(before, self.sources, place, kinds)


def load_swaps(swap: Swap, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32, zero: bool = True) -> Swaps:
    """Imports what `swap` names, and nothing else, and tries every part on a little input.

    zero: whether the optimiser's state will be sharded, which one that looks at whole matrices can't have.

    Raises:
        ValueError: the first part that can't be imported or doesn't keep its contract: its name, what was found, what
            is wanted, and where the reference is.
    """
    parts: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for kind in (f.name for f in fields(swap)):
        path = getattr(swap, kind)
        if path is None:
            continue
        with _named(kind, path):
            thing, sources[kind] = load(kind, path)
            parts[kind] = (
                _checked_schedule(thing, path) if kind == "schedule" else _tried(kind, thing, cfg, compute_dtype, zero)
            )
    return Swaps(cfg, **parts, sources=sources)


def swaps_to_read(swap: Swap, cfg: ModelConfig, before: Mapping[str, Source], place: Path) -> tuple[Swaps, list[str]]:
    """For a model that is only read, to write text or to be exported: attention and router, and what to tell people.

    before: the fingerprints in the checkpoint of the run in `place`.

    Raises:
        ValueError: `swap` doesn't name the attention or router that the run was trained with, or names one too many; or
            see `load_swaps`.
    """
    kinds = ("attention", "router")
    swaps = load_swaps(Swap(**{kind: getattr(swap, kind) for kind in kinds}), cfg)
    return swaps, swaps.same_as({kind: source for kind, source in before.items() if kind in kinds}, place, kinds)


def _tried(kind: str, thing: Any, cfg: ModelConfig, dtype: torch.dtype, zero: bool) -> Any:
    """`thing` as `Swaps` holds it, if it keeps its contract."""
    if kind in ("attention", "router"):
        form, name, arguments = "MyRouter(cfg)", "layers.0.mlp.gate", (cfg,)
        check = probes.check_router
        if kind == "attention":
            form, name, arguments = "MyAttention(cfg, layer)", "layers.0.self_attn", (cfg, 0)  # type: ignore[assignment]
            check = probes.check_attention
        probes.can_be_called(thing, form, *arguments)
        first, second = (made(thing, arguments, name, cfg, 0) for _ in range(2))
        check(first, second, cfg, dtype)
    elif kind == "balance":
        probes.can_be_called(thing, "rule(bias, load, gamma)", None, None, 0.0)
        probes.check_balance(thing, cfg)
    else:
        trial = try_optimizer(thing)
        need(
            trial.by_number or not zero,
            "gives other weights when a matrix is cut into stretches, as ZeRO-1 does: it looks at more than each "
            "number's own gradients. Run it with --parallel.zero False",
        )
        return own_optimizer(thing, trial)
    return thing


def _checked_schedule(thing: Any, path: str) -> OwnSchedule:
    """A function that checks whatever the reader's function gives (or the one schedule that a file holds)."""
    if isinstance(thing, Schedule):
        probes.check_schedule(thing, thing, thing.num_ranks, thing.num_microbatches)
    else:
        probes.can_be_called(thing, "schedule(num_ranks, num_microbatches)", 2, 4)

    def schedule(num_ranks: int, num_microbatches: int) -> Schedule:
        with _named("schedule", path):
            if isinstance(thing, Schedule):
                found = again = thing
            else:
                with probes.asked(f"schedule({num_ranks}, {num_microbatches})"):
                    found, again = (thing(num_ranks, num_microbatches) for _ in range(2))
            probes.check_schedule(found, again, num_ranks, num_microbatches)
        return found

    return schedule


@contextmanager
def _named(kind: str, path: str) -> Iterator[None]:
    """A refusal becomes an error that names the part and the contract."""
    try:
        yield
    except Refused as refused:
        contract = f"The contract: dsv3_book.train.contracts.{REFERENCE[kind]}."
        raise ValueError(f"--swap.{kind} {path}: {str(refused).rstrip('.')}. {contract}") from refused.__cause__


# Making a module -----------------------------------------------------------------------------------------------------
def made(
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
    name: str,
    cfg: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """`make(*arguments)`, with initial weights by seed and name as `init_weights` gives them; on "meta" none.

    Raises:
        Refused: it isn't a module.
    """
    meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_generator(seed, name).initial_seed())
        with torch.device("meta") if meta else nullcontext(), probes.asked("making it"):
            module = make(*arguments)
            need(isinstance(module, nn.Module), f"made a {type(module).__name__}, wanted a torch.nn.Module")
            if not meta and hasattr(module, "reset_parameters"):
                with torch.no_grad():
                    module.reset_parameters()
            elif not meta:
                _fill(module, name, cfg.initializer_range, seed)
    return module if meta else module.to(device)


@torch.no_grad()
def _fill(module: nn.Module, prefix: str, std: float, seed: int) -> None:
    for name, p in module.named_parameters(prefix):
        if p.dim() >= 2:
            p.copy_(torch.randn(p.shape, generator=_generator(seed, name)) * std)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def decode_by_forward(self: Any, x: Float[Tensor, "B T D"], at: Angles, cache: Cache) -> Float[Tensor, "B T D"]:
    """`decode` of an attention that has none: `forward` over all inputs so far, which are kept beside the cache.

    The cache itself gets zeros, only so that it counts tokens; what it has forgotten (`cut`) is forgotten here too.
    """
    T, seen = x.shape[1], cache.length
    if cache in self.inputs:
        before = self.inputs[cache]
        x = torch.cat([before[0][:, :seen], x], 1)
        at = torch.cat([before[1][:seen], at[0]]), torch.cat([before[2][:seen], at[1]])
    self.inputs[cache] = (x, *at)
    zeros = [x.new_zeros(x.shape[0], T, width) for width in (self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim)]
    cache.append(self.layer, *zeros)
    return self(x, at)[:, -T:]
