"""Rotary position embedding on interleaved pairs, and YaRN's stretched frequencies (report §4.3, released code).

The released weights pair neighbours: dimensions (0, 1), (2, 3), … turn together. Other code (transformers) writes the
rotated halves apart; attention scores agree, because queries and keys are permuted alike, but cached keys do not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.config import ModelConfig, RopeScaling, yarn_mscale

Angles = tuple[Float[Tensor, "T r"], Float[Tensor, "T r"]]  # cos and sin, r = R/2 pairs


def frequencies(cfg: ModelConfig) -> Float[Tensor, " r"]:
    """Radians per position of each of the R/2 pairs: theta^(−2i/R), slowed down by YaRN where the config asks."""
    dims = torch.arange(0, cfg.qk_rope_head_dim, 2, dtype=torch.float32)
    freqs = 1.0 / cfg.rope_theta ** (dims / cfg.qk_rope_head_dim)
    if cfg.rope_scaling is None:
        return freqs
    return yarn(freqs, cfg.rope_theta, cfg.rope_scaling)


def yarn(freqs: Float[Tensor, " r"], theta: float, scaling: RopeScaling) -> Float[Tensor, " r"]:
    """Interpolates slow pairs by 1/factor, keeps fast pairs, and ramps linearly between (arXiv 2309.00071, §3.2).

    A pair that turns more than `beta_fast` times within the original context knows near positions and is kept; one that
    turns less than `beta_slow` times knows far positions and is stretched.
    """
    R = 2 * len(freqs)

    def pair_that_turns(rotations: float) -> float:
        return (
            R * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), R - 1)
    ramp = (torch.arange(len(freqs), dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return freqs / scaling.factor * (1 - keep) + freqs * keep


def angles(cfg: ModelConfig, positions: Int[Tensor, " T"]) -> Angles:
    """cos and sin of position × frequency, fp32 [T, R/2].

    YaRN may scale both (ratio of its two mscales: 1 for V3, whose factor sits in `ModelConfig.softmax_scale`).
    """
    turned = torch.outer(positions.float(), frequencies(cfg).to(positions.device))
    scale = 1.0
    if (s := cfg.rope_scaling) is not None:
        scale = yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim)
    return turned.cos() * scale, turned.sin() * scale


def rotate(x: Float[Tensor, "B T H R"], at: Angles) -> Float[Tensor, "B T H R"]:
    """Turns each neighbouring pair of the last axis by its angle; computed in fp32, returned in x's dtype."""
    return _Rotate.apply(x, *at)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos, sin)[:, None, :]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
