"""The training recipe of the report (§4.2) as functions of the tokens seen, scaled to a run of any length.

DeepSeek-V3 saw 14.8T tokens; a laptop sees a few million. What carries over is *when* in the run something happens, so
every breakpoint below is written in the report's own tokens, and a run of another length is stretched onto that axis:
half-way through is 7.4T, however long the run. The one exception is the warm-up, which the report counts in steps.

Nothing here keeps state and nothing needs torch: the settings of a step follow from the step's number and the tokens
seen before it, so a resumed run continues the very same curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

REPORT_TOKENS = 14.8e12  # the length of DeepSeek-V3's pre-training (report §4.1)


@dataclass(frozen=True)
class Settings:
    """What one optimiser step uses: learning rate, bias update speed γ, MTP loss weight λ, sequences in the step."""

    lr: float
    gamma: float
    mtp_weight: float
    sequences: int


@dataclass(frozen=True)
class Recipe:
    """The schedules of one run. The defaults are DeepSeek-V3's own; breakpoints (`…_until`) are in the report's tokens.

    `total_tokens` is the run's length. Batch sizes are in sequences of `sequence_length` tokens and always multiples
    of `batch_multiple`, so that they divide into whole micro-batches on every process.

    Raises:
        ValueError: sizes that do not divide, or a length or rate that is not positive.
    """

    total_tokens: float = REPORT_TOKENS
    sequence_length: int = 4096
    # Learning rate: linear warm-up in 2000 steps, constant to 10T, cosine over 4.3T, then two constants, 333B and 167B.
    warmup_steps: int = 2000
    peak_lr: float = 2.2e-4
    low_lr: float = 2.2e-5
    final_lr: float = 7.3e-6
    constant_until: float = 10e12
    cosine_until: float = 14.3e12
    low_until: float = 14.3e12 + 333e9
    # Batch size: 3072 sequences growing to 15360 over the first 469B tokens.
    batch_start: int = 3072
    batch_end: int = 15360
    batch_multiple: int = 1
    ramp_until: float = 469e9
    # Balance: γ for the first 14.3T, then 0, so that the routing stands still at the end (report: last 500B tokens).
    bias_update_speed: float = 1e-3
    bias_update_until: float = 14.3e12
    # MTP: λ is 0.3 for the first 10T tokens, then 0.1.
    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_weight_until: float = 10e12

    def __post_init__(self) -> None:
        if self.total_tokens <= 0 or self.peak_lr <= 0:
            raise ValueError(f"a run needs tokens and a learning rate, got {self.total_tokens} and {self.peak_lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0 < self.batch_start <= self.batch_end:
            raise ValueError(
                f"the batch grows from batch.start to batch.end: got {self.batch_start} and {self.batch_end} sequences"
            )
        for name, size in (("batch.start", self.batch_start), ("batch.end", self.batch_end)):
            if size % self.batch_multiple:
                raise ValueError(
                    f"{name} ({size} sequences) is not a multiple of batch.multiple ({self.batch_multiple}): "
                    f"use {max(1, size // self.batch_multiple) * self.batch_multiple}, or change batch.multiple"
                )

    def at(self, step: int, tokens: float) -> Settings:
        """The settings of step `step` (counted from 0) when `tokens` were seen before it."""
        return Settings(self.lr(step, tokens), self.gamma(tokens), self.mtp(tokens), self.batch(tokens))

    def lr(self, step: int, tokens: float) -> float:
        """Learning rate (§4.2). Step 0 takes 1/`warmup_steps` of the peak, not 0 (our choice: it should learn)."""
        if step + 1 < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        seen = self._on_report_axis(tokens)
        if seen < self.constant_until:
            return self.peak_lr
        if seen < self.cosine_until:
            turn = math.pi * (seen - self.constant_until) / (self.cosine_until - self.constant_until)
            return self.low_lr + (self.peak_lr - self.low_lr) * (1 + math.cos(turn)) / 2
        return self.low_lr if seen < self.low_until else self.final_lr

    def batch(self, tokens: float) -> int:
        """Sequences in the next step (§4.2). The report gives both ends and the length of the ramp; that it is
        linear in tokens is our reading."""
        grown = min(1.0, self._on_report_axis(tokens) / self.ramp_until) if self.ramp_until else 1.0
        exact = self.batch_start + (self.batch_end - self.batch_start) * grown
        return round(exact / self.batch_multiple) * self.batch_multiple

    def gamma(self, tokens: float) -> float:
        """Bias update speed γ (§4.2)."""
        return self.bias_update_speed if self._on_report_axis(tokens) < self.bias_update_until else 0.0

    def mtp(self, tokens: float) -> float:
        """MTP loss weight λ (§4.2)."""
        return self.mtp_weight if self._on_report_axis(tokens) < self.mtp_weight_until else self.mtp_weight_late

    def _on_report_axis(self, tokens: float) -> float:
        return tokens * (REPORT_TOKENS / self.total_tokens)


def tokens_in(steps: int, sequence_length: int, batch_start: int, batch_end: int, batch_multiple: int = 1) -> float:
    """The length in tokens of a run of `steps` steps whose batch grows as the report's does: `Recipe.total_tokens`.

    A length decides how fast the batch grows, and so how many tokens the steps see; we want the length they do see.
    To begin with, a formula (derived here): while the batch b grows linearly in tokens, db/dstep is proportional to b,
    which takes ln(b₁/b₀)/(b₁−b₀) steps per sequence of the ramp; after it, 1/b₁ step per sequence. Then the steps are
    counted out a few times, since they keep their size while they last, and come in multiples.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ramp = Recipe.ramp_until / REPORT_TOKENS
    growth = math.log(batch_end / batch_start) / (batch_end - batch_start) if batch_end > batch_start else 1 / batch_end
    total = steps / (ramp * growth + (1 - ramp) / batch_end) * sequence_length
    for _ in range(10):
        recipe = Recipe(
            total, sequence_length, batch_start=batch_start, batch_end=batch_end, batch_multiple=batch_multiple
        )
        seen = done = 0
        while done < steps and (size := recipe.batch(seen)) < batch_end:
            seen, done = seen + size * sequence_length, done + 1
        seen += (steps - done) * batch_end * sequence_length
        if seen == total:
            break
        total = float(seen)
    return total
