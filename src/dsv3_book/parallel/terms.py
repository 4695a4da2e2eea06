"""What all ranks of an all-to-all must agree on before rows move, and the error when they don't."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("number of experts", "width D", "dtype", "FP8 payload")
HEAD_BYTES = 8 * (2 + 2 * len(NAMES))  # what each rank tells each other: copies, slots, and its terms, int64
UNKNOWN = (1 << 40, -1)  # an empty interval: it agrees with everything


@dataclass(frozen=True)
class Terms:
    """For each of NAMES the smallest and the largest value that anybody has told."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @staticmethod
    def of(num_experts: int, x: Tensor | None, fp8: bool) -> Terms:
        """This rank's own; width and dtype stay unknown without x [N, D]."""
        known = [(num_experts,) * 2, UNKNOWN, UNKNOWN, (int(fp8),) * 2]
        if x is not None:
            known[1:3] = [(x.shape[1],) * 2, (_number(x.dtype),) * 2]
        return Terms(*zip(*known, strict=True))

    def tensor(self, device: torch.device) -> Tensor:
        """int64, to travel with the counts."""
        return torch.tensor(self.low + self.high, device=device)

    def admits(self, x: Tensor) -> None:
        """Raises ValueError if x [N, D] isn't what was planned for."""
        for i, value in ((1, x.shape[1]), (2, _number(x.dtype))):
            if self.low[i] <= self.high[i] and value != self.low[i]:
                planned = _name(i, self.low[i])
                raise ValueError(f"{NAMES[i]} of these rows is {_name(i, value)}, but {planned} was planned for")

    @staticmethod
    def joined(told: list[list[int]]) -> Terms:
        """What all have told."""
        n = len(NAMES)
        lows, highs = [t[:n] for t in told], [t[n:] for t in told]
        return Terms(tuple(map(min, zip(*lows, strict=True))), tuple(map(max, zip(*highs, strict=True))))

    def differ(self) -> bool:
        """Whether two ranks have told different things."""
        return any(low < high for low, high in zip(self.low, self.high, strict=True))

    def check(self, who: str) -> None:
        """Raises ValueError if two ranks differ."""
        wrong = [
            f"{NAMES[i]} is {_name(i, low)} on one and {_name(i, high)} on another"
            for i, (low, high) in enumerate(zip(self.low, self.high, strict=True))
            if low < high
        ]
        if wrong:
            raise ValueError(f"{who} don't agree: {'; '.join(wrong)}. No row was sent")


def _number(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise ValueError(f"rows of {dtype} can't be dispatched: use one of {', '.join(map(str, DTYPES))}")
    return DTYPES.index(dtype)


def _name(i: int, value: int) -> str:
    return str(DTYPES[value]) if NAMES[i] == "dtype" else str(bool(value)) if NAMES[i] == "FP8 payload" else str(value)
