"""A part of one's own, tried on a little input before training begins: does it keep its contract?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.inference.cache import LatentCache
from dsv3_book.model.rope import angles
from dsv3_book.model.router import Routing
from dsv3_book.pipeline.schedule import Schedule
from dsv3_book.pipeline.validate import validate
from dsv3_book.train.contracts import Refused, need
from dsv3_book.train.sources import line_of

BIAS = "e_score_correction_bias"
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number: sums in another order
TOKENS = 32


@contextmanager
def asked(what: str) -> Iterator[None]:
    """What the part raises in here becomes a refusal that says where."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{what} raised {type(error).__name__}: {error} ({line_of(error)})") from error


def can_be_called(thing: Any, form: str, *arguments: Any, **named: Any) -> None:
    """Whether `thing` is something to call as `form` says."""
    need(callable(thing), f"is a {type(thing).__name__}, which can't be called; wanted: {form}")
    try:
        signature = inspect.signature(thing)
    except ValueError:  # some built-in things have none
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        raise Refused(f"is called as {form}, but has the signature {signature}: {error}") from None


# Modules -------------------------------------------------------------------------------------------------------------
def _check_parameters(first: nn.Module, second: nn.Module) -> None:
    """Fit to be sharded, saved and held in copies."""
    named = dict(first.named_parameters())
    every = [name for name, _ in first.named_parameters(remove_duplicate=False)]
    need(len(every) == len(named), f"has one parameter under two names: {', '.join(sorted(set(every) - set(named)))}")
    shared = {id(p) for p in second.parameters()}
    for name, p in named.items():
        need(id(p) not in shared, f"shares its parameter {name} with other layers; wanted: each layer its own")
        found = f"{p.dtype} {tuple(p.shape)}"
        need(p.dtype == torch.float32 and p.dim(), f"parameter {name} is {found}; wanted: fp32, one dimension or more")
        need(p.requires_grad, f"parameter {name} is frozen; make what isn't trained a buffer")
        need(
            p.is_contiguous() and torch.isfinite(p).all(), f"parameter {name} is not contiguous, or not finite at first"
        )
    for (name, p), q in zip(named.items(), second.parameters(), strict=True):
        need(
            torch.equal(p, q),
            f"parameter {name} starts otherwise each time with the same seed; wanted: the same numbers",
        )


def _check_gradients(module: nn.Module, x: Tensor, *outputs: Tensor) -> None:
    """From every output to every parameter; finite."""
    draw = torch.Generator().manual_seed(1)
    total = sum((o.float() * torch.randn(o.shape, generator=draw)).sum() for o in outputs if o.requires_grad)
    with asked("backward"):
        total.backward()  # type: ignore[union-attr]
    for name, t in [*module.named_parameters(), ("its input", x)]:
        need(t.grad is not None, f"no gradient reaches {name}; wanted: every parameter is used, and x is not detached")
        need(torch.isfinite(t.grad).all(), f"the gradient of {name} is not finite")  # type: ignore[arg-type]


def _check_pure(module: nn.Module, x: Tensor, call: Callable[[Tensor], Any]) -> Any:
    """The answer to `x`; asking changes neither the module nor `x`."""
    state = {name: b.clone() for name, b in module.named_buffers()}
    before = x.detach().clone()
    with asked("forward"):
        answer = call(x)
    need(torch.equal(x.detach(), before), "forward changes its input x in place; wanted: x stays as it is")
    for name, b in module.named_buffers():
        need(
            name in state and b.shape == state[name].shape and torch.equal(b, state[name]),
            f"forward changes the buffer {name}; wanted: no memory from call to call (copies of a layer would differ)",
        )
    return answer


def _shaped(name: str, found: Any, dtype: torch.dtype, letters: str, *shape: int) -> None:
    what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    fits = isinstance(found, Tensor) and found.dtype == dtype and found.shape == shape
    need(fits, f"{name}: found {what}, wanted {dtype} [{letters}] = {shape}")


def _off(a: Tensor, b: Tensor) -> float:
    """The largest difference, in shares of the largest number."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# Router --------------------------------------------------------------------------------------------------------------
def check_router(first: nn.Module, second: nn.Module, cfg: ModelConfig, dtype: torch.dtype) -> None:
    """`first` and `second` are made alike. See `OwnRouter`."""
    _check_parameters(first, second)
    _check_bias(first, cfg)
    x = torch.randn(TOKENS, cfg.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    routing = _check_pure(first, x, first)
    _check_routing(routing, cfg)
    if list(first.parameters()):
        need(routing.gates.requires_grad, "the gates carry no gradient: the router would never learn")
        _check_gradients(first, x, routing.gates, routing.scores)
    with torch.no_grad(), asked("forward"):
        again = second(x.detach())
    for field, a, b in zip(Routing._fields, routing, again, strict=True):
        need(torch.equal(a, b), f"{field} differ between two calls with the same weights and input; wanted: the same")
    if hasattr(first, BIAS):
        _check_bias_counts(first, x.detach(), routing)


def _check_routing(routing: Any, cfg: ModelConfig) -> None:
    N, K, E = TOKENS, cfg.num_experts_per_tok, cfg.n_routed_experts
    need(isinstance(routing, Routing), f"forward returned a {type(routing).__name__}, wanted a model.router.Routing")
    experts, gates, scores, load = routing
    _shaped("experts", experts, torch.int64, "N, K", N, K)
    _shaped("gates", gates, torch.float32, "N, K", N, K)
    _shaped("scores", scores, torch.float32, "N, E", N, E)
    _shaped("load", load, torch.float32, "E", E)
    low, high = int(experts.min()), int(experts.max())
    need(low >= 0 and high < E, f"experts: found numbers from {low} to {high}, wanted 0 to {E - 1}")
    for n, mine in enumerate(experts.tolist()):
        need(len(set(mine)) == K, f"experts: token {n} has {sorted(mine)}, wanted {K} different ones")
        groups = {e // (E // cfg.n_group) for e in mine}
        need(
            len(groups) <= cfg.topk_group,
            f"experts: token {n} has some of {len(groups)} groups (nodes), wanted topk_group = {cfg.topk_group}",
        )
    need(torch.isfinite(gates).all(), "gates: not all are finite")
    fine = torch.isfinite(scores).all() and (scores >= 0).all() and (scores.sum(-1) > 0).all()
    need(fine, "scores: wanted finite numbers ≥ 0 with a positive sum for each token (the balance loss divides by it)")
    counted = torch.bincount(experts.flatten(), minlength=E).float()
    need(
        torch.equal(load.detach(), counted) and not load.requires_grad,
        f"load: found {_few(load)}, wanted how many tokens chose each expert, without gradient: {_few(counted)}",
    )


def _check_bias(router: nn.Module, cfg: ModelConfig) -> None:
    if not hasattr(router, BIAS):
        return
    need(
        BIAS in dict(router.named_buffers()), f"{BIAS} is no buffer: register_buffer keeps optimiser and gradient away"
    )
    need(BIAS in router.state_dict(), f"{BIAS} is not persistent; wanted: saved with the weights")
    bias = getattr(router, BIAS)
    _shaped(BIAS, bias, torch.float32, "E", cfg.n_routed_experts)
    need(not bias.any(), f"{BIAS} starts at {_few(bias)}, wanted 0")


@torch.no_grad()
def _check_bias_counts(router: nn.Module, x: Tensor, routing: Routing) -> None:
    bias, least = getattr(router, BIAS), int(routing.load.argmin())
    bias[least] = 10.0
    with asked("forward with a bias"):
        load = router(x).load
    bias.zero_()
    found = f"{int(routing.load[least])} tokens chose expert {least} without, {int(load[least])} with a bias of 10"
    need(load[least] > routing.load[least], f"{BIAS} has no effect: {found}; wanted: a higher bias is chosen more")


# Attention -----------------------------------------------------------------------------------------------------------
def check_attention(first: nn.Module, second: nn.Module, cfg: ModelConfig, dtype: torch.dtype) -> None:
    """`first` and `second` are made alike, for layer 0. See `OwnAttention`."""
    _check_parameters(first, second)
    B, T, few = 2, min(8, cfg.max_position_embeddings), 3
    x = torch.randn(B, T, cfg.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    cos, sin = angles(cfg, torch.arange(T))
    y = _check_pure(first, x, lambda x: first(x, (cos, sin)))
    _shaped("the output", y, dtype, "B, T, D", *x.shape)
    need(torch.isfinite(y).all(), "the output is not finite")
    _check_gradients(first, x, y)
    with torch.no_grad(), asked("forward"):
        x, y = x.detach(), y.detach()
        again, alone = second(x, (cos, sin)), second(x[:1], (cos, sin))
        early = second(x[:, :few], (cos[:few], sin[:few]))
    need(
        torch.equal(again, y), "the output differs between two calls with the same weights and input; wanted: the same"
    )
    off = _off(alone, y[:1])
    need(off < CLOSE[dtype], f"a sequence's output changes by {off:.1e} with the other sequences; wanted: each alone")
    off = _off(early, y[:, :few])
    need(
        off < CLOSE[dtype],
        f"the output at tokens 0 to {few - 1} changes by {off:.1e} of its size when tokens follow; wanted: causal",
    )
    if getattr(first, "decode", None) is not None:
        _check_decode(first, x, y, cfg, dtype)


@torch.no_grad()
def _check_decode(attention: Any, x: Tensor, y: Tensor, cfg: ModelConfig, dtype: torch.dtype) -> None:
    B, T = x.shape[:2]
    cache, parts = LatentCache(cfg.replace(num_hidden_layers=1, first_k_dense_replace=0), B, T, dtype), []
    cos, sin = angles(cfg, torch.arange(T))
    for a, b in ((0, T - 2), (T - 2, T - 1), (T - 1, T)):
        with asked("decode(x, at, cache)"):
            parts.append(attention.decode(x[:, a:b], (cos[a:b], sin[a:b]), cache))
        need(cache.length == b, f"decode left {cache.length} tokens in the cache, wanted {b}: call cache.append once")
    off = _off(torch.cat(parts, 1), y)
    need(
        off < CLOSE[dtype],
        f"decode differs from forward by {off:.1e} of its size; wanted: equal, or `decode = None` for none",
    )


# Balance and schedule ------------------------------------------------------------------------------------------------
@torch.no_grad()
def check_balance(rule: Callable[..., Any], cfg: ModelConfig) -> None:
    """See `OwnBalance`."""
    E, gamma = cfg.n_routed_experts, 0.001
    load = torch.arange(E, dtype=torch.float32) * 3
    bias, ends = torch.zeros(E), []
    for _ in range(2):
        bias, given = torch.zeros(E), load.clone()
        for speed in (gamma, gamma, 0.0):
            before = bias.clone()
            with asked("the rule"):
                answer = rule(bias, given, speed)
            found = "returned the new bias" if isinstance(answer, Tensor) else f"returned {answer!r}"
            need(answer is None, f"{found}; wanted: the given bias moved in place (bias += …), nothing returned")
            need(torch.equal(given, load), "changes `load` in place; wanted: it stays as it is")
            need(torch.isfinite(bias).all(), "left a bias that is not finite")
            if speed == 0:
                need(torch.equal(bias, before), "moves the bias at gamma 0; wanted: left alone, at the schedule's end")
            elif E > 1:
                need(not torch.equal(bias, before), f"does nothing to the bias for the load {_few(load)}")
        ends.append(bias.clone())
    need(torch.equal(*ends), "gives another bias for the same loads the second time; wanted: no memory, nothing random")
    idle, busy = bias[0].item(), bias[-1].item()
    found = f"the idle expert's bias became {idle:g}, the busiest one's {busy:g}"
    need(E == 1 or idle > busy, f"{found}; wanted: up where the load is low, down where it is high")


def check_schedule(found: Any, again: Any, num_ranks: int, num_microbatches: int) -> None:
    """What a schedule's function gave for these numbers, twice."""
    need(isinstance(found, Schedule), f"returned a {type(found).__name__}, wanted a pipeline.schedule.Schedule")
    wanted = f"{num_ranks} ranks and {num_microbatches} micro-batches"
    numbers = f"{found.num_ranks} ranks and {found.num_microbatches} micro-batches"
    need(
        numbers == wanted, f"is a schedule for {numbers}, wanted {wanted} (they follow from --parallel.* and --batch.*)"
    )
    wrong = validate(found)
    more = f" And {len(wrong) - 3} sentences more, from pipeline.validate." if len(wrong) > 3 else ""
    need(not wrong, f"can't be run with {wanted}: {' '.join(wrong[:3])}{more}")
    need(found.actions == again.actions, "gives another schedule the second time; wanted: the same on every rank")


def _few(t: Tensor) -> str:
    shown = ", ".join(f"{v:g}" for v in t.detach().flatten()[:6].tolist())
    return f"[{shown}{', …' if t.numel() > 6 else ''}]"
