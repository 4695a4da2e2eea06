"""What a run left in its folder, read back: settings, lines of metrics, loads of experts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_book.train.curves import Line
from dsv3_book.train.logs import starts
from dsv3_book.train.metrics import LOADS, read_lines


@dataclass
class Run:
    """What is read of a run. steps, validations: lines of metrics.  loads: of load.jsonl."""

    name: str
    settings: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    starts: int | None = None

    @staticmethod
    def read(out: Path) -> Run:
        """The run in the folder `out`; unfinished, with one step or none, with or without validation.

        Raises:
            FileNotFoundError: there is no run in it.
            ValueError: its run.json is no JSON object.
        """
        file, metrics = out / "run.json", out / "metrics.jsonl"
        if not file.exists():
            raise FileNotFoundError(f"there is no run in {out}: it holds no run.json; name the folder of a run")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); a start of the run writes it anew") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{file} holds no object of settings; a start of the run writes it anew")
        lines = [line for line in read_lines(metrics) if number(line, "step") > 0] if metrics.exists() else []
        run = Run(out.resolve().name, settings, starts=starts(out))
        run.steps = [line for line in lines if "loss" in line]
        run.validations = [line for line in lines if "val_loss" in line]
        run.loads = _whole_loads(read_lines(out / LOADS)) if (out / LOADS).exists() else []
        return run

    def column(self, name: str, scale: float = 1.0) -> np.ndarray:
        """A quantity of every step; NaN where a line doesn't have it."""
        return scale * np.array([number(line, name) for line in self.steps], dtype=float)

    def line(self, label: str, name: str, scale: float = 1.0) -> Line:
        return Line(label, self.column("step").astype(int), self.column(name, scale))

    def checked(self, label: str, name: str) -> Line:
        """A quantity of every validation."""
        steps, values = ([number(line, key) for line in self.validations] for key in ("step", name))
        return Line(label, np.array(steps, dtype=int), np.array(values, dtype=float), few=True)

    def seconds(self) -> float:
        """Of all steps, without validations and saves in between. A line may stand for several steps."""
        tokens, speed = np.diff(self.column("tokens"), prepend=0.0), self.column("tokens_per_second")
        known = np.isfinite(tokens) & (speed > 0)
        return float((tokens[known] / speed[known]).sum())

    def routers(self) -> list[str]:
        """Names of the rows of a load, by the settings' model."""
        model = self.settings.get("model")
        cfg = model if isinstance(model, dict) else {}
        dense, layers = (int(number(cfg, key, 0)) for key in ("first_k_dense_replace", "num_hidden_layers"))
        names = [f"layer {i}" for i in range(dense, layers)]
        names += [f"MTP {i + 1}" for i in range(int(number(cfg, "num_nextn_predict_layers", 0)))]
        count = len(self.loads[-1]["load"]) if self.loads else 0
        return names if len(names) == count else [f"router {i + 1}" for i in range(count)]


def number(line: Mapping[str, Any], name: str, otherwise: float = math.nan) -> float:
    """The number of that name; NaN where there is none, or something else."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _whole_loads(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose load is a table of numbers, as large as the last one's."""
    good: list[dict[str, Any]] = []
    for line in lines:
        try:
            table = np.array(line.get("load"), dtype=float)
        except (TypeError, ValueError):
            continue
        if table.ndim == 2 and table.size and np.isfinite(table).all() and number(line, "step") > 0:
            good.append({"step": int(line["step"]), "load": table})
    return [line for line in good if line["load"].shape == good[-1]["load"].shape]
