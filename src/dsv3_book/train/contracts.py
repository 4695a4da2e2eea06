"""What a part of one's own must be: five contracts to program against, and where the reference is to copy from.

Only shapes and behaviour count: nothing needs to be inherited. `probes.py` tries a part before training begins.
Letters as everywhere: B sequences of T tokens, N = B·T tokens, width D, E experts, K of them for a token.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from dsv3_book.model.rope import Angles
from dsv3_book.model.router import Routing
from dsv3_book.pipeline.schedule import Schedule

KINDS = ("attention", "router", "balance", "schedule", "optimizer")
REFERENCE = {
    "attention": "OwnAttention; copy from dsv3_book/model/mla.py, class MLA",
    "router": "OwnRouter; copy from dsv3_book/model/router.py, class Router",
    "balance": "OwnBalance; copy from dsv3_book/model/balance.py, update_bias",
    "schedule": "OwnSchedule; copy from dsv3_book/pipeline/orders.py and pipeline/schedule.py, make_schedule",
    "optimizer": "OwnOptimizer; copy from dsv3_book/optim/adamw.py, or name a class of torch.optim",
}


@runtime_checkable
class OwnRouter(Protocol):
    """An `nn.Module` made as `MyRouter(cfg)`, in the place of every MoE layer's `mlp.gate` (MTP's too).

    `forward` gets the normed tokens in the compute dtype and answers for each token alone:

        experts  int64 [N, K]   K different ones, of at most `topk_group` of the `n_group` groups
        gates    fp32  [N, K]   finite; they carry the gradient to the router's parameters
        scores   fp32  [N, E]   ≥ 0 with a positive sum for each token: the sequence-wise balance loss reads them
        load     fp32  [E]      how many tokens chose each expert

    With a buffer `e_score_correction_bias` (fp32 [E], saved with the weights, zero at first) it is balanced: the
    balance rule moves it after each step. Without one it isn't, and MaxVio shows what comes of that. Parameters and
    initial weights: see `OwnAttention`.
    """

    def __call__(self, x: Float[Tensor, "N D"]) -> Routing: ...


@runtime_checkable
class OwnAttention(Protocol):
    """An `nn.Module` made as `MyAttention(cfg, layer)`, in the place of every block's `self_attn` (MTP's too).

    `x` [B, T, D] has passed `input_layernorm`; the answer has its shape and dtype, and goes to the residual stream.
    `at` holds cos and sin, [T, R/2], of the T positions, for `rope.rotate`. Causal: what comes later changes nothing;
    sequences don't see each other. No random numbers, nothing remembered from call to call: pipelines hold copies.

    Parameters are fp32, of one or more dimensions, all used, none shared between layers. They start as the model's own:
    matrices are drawn from `initializer_range` by (seed, name), vectors are one, or zero where the name ends in "bias".
    A module with a method `reset_parameters()` is asked to fill them itself instead; torch's generator is seeded then.
    Matrix products by `ops.Linear` can be put off (W apart from I); those by `nn.Linear` are computed in I.

    Optional. `recompute`: the trainer sets this attribute to what --recompute says. `decode(x, at, cache)`: see
    `MLA.decode`; if given it must agree with `forward`. Without one (in a subclass of `MLA`: `decode = None`) text is
    sampled by running `forward` over all the tokens so far for each new one: the same text, more slowly. --fp8 reaches
    attention only in subclasses of `MLA`.
    """

    def __call__(self, x: Float[Tensor, "B T D"], at: Angles) -> Float[Tensor, "B T D"]: ...


@runtime_checkable
class OwnBalance(Protocol):
    """A function called for each router after each step, in the place of `balance.update_bias`.

    It moves `bias` in place and returns nothing; `load` is the whole step's and stays as it is. γ = 0 (the end of the
    schedule) must leave the bias alone. No memory of its own: it would be in no checkpoint.
    """

    def __call__(self, bias: Float[Tensor, " E"], load: Float[Tensor, " E"], gamma: float) -> None: ...


@runtime_checkable
class OwnSchedule(Protocol):
    """A function that makes the schedule of a step, for P ranks and M micro-batches; the same whenever it is asked.

    Instead of a function, a text file may be named, as `Schedule.from_text` reads it: then for one P and one M.
    """

    def __call__(self, num_ranks: int, num_microbatches: int) -> Schedule: ...


@runtime_checkable
class OwnOptimizer(Protocol):
    """What `factory(groups, lr)` must return; every `torch.optim.Optimizer` is one.

    `groups` are torch's: matrices with the run's `weight_decay`, vectors with 0. A factory whose signature has `betas`
    or `eps` gets the run's. Each group's "lr" is set before each step. `state[p]` holds tensors: of p's shape, or
    single numbers. A parameter whose `.grad` is None is left alone.

    ZeRO-1 gives every rank stretches of the flattened parameters. So the update of a number may depend on that number's
    gradients alone, as Adam's and SGD's do. One that looks at whole matrices (Muon, Shampoo, LAMB) needs
    `--parallel.zero False`; the stacked experts [E, F, D] then arrive as they are held, E the experts of this rank.
    """

    param_groups: list[dict[str, Any]]
    state: MutableMapping[nn.Parameter, dict[str, Any]]

    def step(self) -> Any: ...


class Refused(Exception):
    """What was found and what is wanted, in a sentence; `load_swaps` puts the part's name before it."""


def need(condition: object, sentence: str) -> None:
    """Refuses if the condition doesn't hold."""
    if not condition:
        raise Refused(sentence)
