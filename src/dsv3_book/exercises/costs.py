"""Graders of chapter 1: what a cache, a layer, a token and a second cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsv3_book import costs
from dsv3_book.config import ModelConfig
from dsv3_book.exercises.grading import Case, Solution, grader

V3 = ModelConfig.preset("v3-671b")


def _number(expected: Any, mistakes: Mapping[Any, str]) -> Callable[[Any], str | None]:
    """A judge for numbers (or tuples of them) that knows what the usual mistakes would return."""

    def near(a: Any, b: Any) -> bool:
        pairs = list(zip(a, b, strict=True)) if isinstance(b, tuple) else [(a, b)]
        return all(abs(x - y) <= 1e-9 * abs(y) for x, y in pairs)

    def judge(answer: Any) -> str | None:
        if isinstance(expected, tuple) and (not isinstance(answer, tuple | list) or len(answer) != len(expected)):
            return f"returned {answer!r}, expected {len(expected)} numbers"
        if near(answer, expected):
            return None
        why = next((f" ({text})" for value, text in mistakes.items() if near(answer, value)), "")
        return f"returned {answer!r}{why}, expected {expected!r}"

    return judge


# The cache -----------------------------------------------------------------------------------------------------------
def _cache_bytes(layers: int, latent: int, rope: int, tokens: int, bytes_per_number: int) -> int:
    return layers * (latent + rope) * tokens * bytes_per_number


def _cache_twice() -> Solution:
    return lambda layers, latent, rope, tokens, b: 2 * layers * latent * tokens * b


def _cache_without_key() -> Solution:
    return lambda layers, latent, rope, tokens, b: layers * latent * tokens * b


def _cache_one_layer() -> Solution:
    return lambda layers, latent, rope, tokens, b: (latent + rope) * tokens * b


@grader(
    "costs.cache_bytes",
    minutes=5,
    reference=lambda: _cache_bytes,
    wrong={"once": _cache_twice, "position": _cache_without_key, "layer": _cache_one_layer},
)
def cache_bytes() -> Iterator[Case]:
    """Bytes of an MLA cache."""
    for args, says in (
        ((1, 4, 2, 1, 1), "one layer, one token, a byte a number"),
        ((3, 4, 2, 5, 2), "three layers, five tokens, bf16"),
        ((V3.num_hidden_layers, V3.kv_lora_rank, V3.qk_rope_head_dim, 131072, 2), "V3 at 128K"),
    ):
        layers, latent, _, tokens, b = args
        mistakes = {
            2 * layers * latent * tokens * b: "that stores the latent twice: keys and values come from the same one",
            layers * latent * tokens * b: "the shared key that carries position is missing",
            (latent + args[2]) * tokens * b: "that is a single layer",
        }
        hint = "MLA caches the latent once, plus one key that carries position, in every layer."
        yield Case(args, _number(_cache_bytes(*args), mistakes), says=says, hint=hint)


# A layer of experts --------------------------------------------------------------------------------------------------
def _moe_weights(D: int, F: int, E: int, K: int, n_shared: int) -> tuple[int, int]:
    return D * E + 3 * D * F * (E + n_shared), D * E + 3 * D * F * (K + n_shared)


def _moe_no_router() -> Solution:
    return lambda D, F, E, K, s: (3 * D * F * (E + s), 3 * D * F * (K + s))


def _moe_two_matrices() -> Solution:
    return lambda D, F, E, K, s: (D * E + 2 * D * F * (E + s), D * E + 2 * D * F * (K + s))


def _moe_router_of_the_chosen() -> Solution:
    return lambda D, F, E, K, s: (D * E + 3 * D * F * (E + s), D * K + 3 * D * F * (K + s))


def _moe_no_shared() -> Solution:
    return lambda D, F, E, K, s: (D * E + 3 * D * F * E, D * E + 3 * D * F * K)


@grader(
    "costs.moe_weights",
    minutes=10,
    reference=lambda: _moe_weights,
    wrong={
        "router": _moe_no_router,
        "three": _moe_two_matrices,
        "all E rows": _moe_router_of_the_chosen,
        "shared": _moe_no_shared,
    },
)
def moe_weights() -> Iterator[Case]:
    """Weights that the feed-forward part of an MoE layer holds, and those that one token touches."""
    for args, says in (
        ((4, 5, 4, 2, 1), "the toy layer of this chapter"),
        ((4, 5, 4, 2, 2), "two shared experts"),
        ((7168, 2048, 256, 8, 1), "V3"),
    ):
        D, F, E, K, s = args
        expert, router = 3 * D * F, D * E
        mistakes = {
            (expert * (E + s), expert * (K + s)): "the router's matrix is missing",
            (router + 2 * D * F * (E + s), router + 2 * D * F * (K + s)): "an expert has three matrices",
            (router + expert * (E + s), D * K + expert * (K + s)): "the router must score all E rows to choose K",
            (router + expert * E, router + expert * K): "shared experts are missing",
        }
        hint = "Count for each matrix its rows times its columns; then ask which of them one token multiplies."
        yield Case(args, _number(_moe_weights(*args), mistakes), says=says, hint=hint)


# FLOPs of a token ----------------------------------------------------------------------------------------------------
def _training_flops(matrix_weights: int, layers: int, heads: int, qk_dim: int, v_dim: int, T: int) -> float:
    scores_and_values = 2 * layers * heads * (qk_dim + v_dim) * (T + 1) / 2
    return 3 * (2 * matrix_weights + scores_and_values)


def _flops_square() -> Solution:
    return lambda n, L, h, qk, v, T: 3 * (2 * n + 2 * L * h * (qk + v) * T)


def _flops_forward() -> Solution:
    return lambda n, L, h, qk, v, T: _training_flops(n, L, h, qk, v, T) / 3


def _flops_one_per_product() -> Solution:
    return lambda n, L, h, qk, v, T: _training_flops(n, L, h, qk, v, T) / 2


def _flops_no_attention() -> Solution:
    return lambda n, L, h, qk, v, T: 6 * n


@grader(
    "costs.training_flops",
    minutes=20,
    level="medium",
    reference=lambda: _training_flops,
    wrong={
        "future": _flops_square,
        "backward": _flops_forward,
        "multiply": _flops_one_per_product,
        "scores": _flops_no_attention,
    },
)
def training_flops() -> Iterator[Case]:
    """Training FLOPs per token, from the weights of the matrices it meets and the shape of attention."""
    # the toy by hand: 1 head of 3 + 2 dimensions, 3 tokens that see 1, 2 and 3 keys
    matrices = int(sum(costs.forward_flops(V3, 0, mtp=False).values()) / 2)
    v3 = (matrices, V3.num_hidden_layers, V3.num_attention_heads, V3.qk_head_dim, V3.v_head_dim, 4096)
    for args, says in (
        ((20, 1, 1, 3, 2, 3), "20 weights, one head, three tokens"),
        (v3, "V3 without MTP at 4096 tokens"),
    ):
        n, layers, heads, qk, v, T = args
        right = _training_flops(*args)
        square = 3 * (2 * n + 2 * layers * heads * (qk + v) * T)
        mistakes = {
            square: "that lets a token see the future: on average it has (T+1)/2 keys",
            right / 3: "that is the forward pass; backward costs twice as much again",
            right / 2: "a multiply and an add are two FLOPs",
            6.0 * n: "attention's scores and weighted values are missing: no weight takes part in them",
        }
        hint = "Forward is 2 FLOPs per weight, plus 2 per head, dimension and key seen; then what comes after forward."
        yield Case(args, _number(right, mistakes), says=says, hint=hint)


# Whose peak? ---------------------------------------------------------------------------------------------------------
def _utilisation(fp8: float, bf16: float, tokens_per_second: float, fp8_peak: float, bf16_peak: float) -> float:
    return (fp8 / fp8_peak + bf16 / bf16_peak) * tokens_per_second


def _mean_peak() -> Solution:
    return lambda a, b, tps, pa, pb: (a + b) * tps / ((pa + pb) / 2)


def _one_peak() -> Solution:
    return lambda a, b, tps, pa, pb: (a + b) * tps / pb


@grader(
    "costs.utilisation",
    minutes=15,
    level="medium",
    reference=lambda: _utilisation,
    wrong={"average": _mean_peak, "all of it": _one_peak},
)
def utilisation() -> Iterator[Case]:
    """Share of the time that a chip at its two peaks would need for a mixture of FP8 and BF16 work."""
    for args, says in (
        ((40.0, 10.0, 1.0, 200.0, 100.0), "40 FLOPs at 200 a second, 10 at 100: 0.3 s of work in a second"),
        ((200e9, 60e9, 1543.0, 1979e12, 989e12), "about V3"),
    ):
        fp8, bf16, tps, fp8_peak, bf16_peak = args
        mistakes = {
            (fp8 + bf16) * tps / ((fp8_peak + bf16_peak) / 2): "the average of the peaks: but times add, not speeds",
            (fp8 + bf16) * tps / bf16_peak: "all of it measured against the BF16 peak",
            (fp8 + bf16) * tps / fp8_peak: "all of it measured against the FP8 peak",
        }
        hint = (
            "How long does each kind take at its own peak? Add these times for a token, then use the tokens per second."
        )
        yield Case(args, _number(_utilisation(*args), mistakes), says=says, hint=hint)
