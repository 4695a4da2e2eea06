"""What the FP8 benchmarks share: timing that caches and launches do not flatter, floors, correctness, the record."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_book.fp8.accumulate import hopper_tolerance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "src" / "dsv3_book" / "results"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Bytes/s of memory and FLOP/s of dense FP8 and bf16 products, from NVIDIA's data sheets. The first name found counts.
PEAKS = {
    "H200": (4.8e12, 1979e12, 989e12),
    "H100 NVL": (3.9e12, 1671e12, 835e12),
    "H100 PCIe": (2.0e12, 1513e12, 756e12),
    "H100": (3.35e12, 1979e12, 989e12),
    "H800": (3.35e12, 1979e12, 989e12),
}
Call = Callable[[], Any]


def floor_seconds(moved: float, flops: float = 0.0) -> float | None:
    """No program is faster: the larger of bytes / bandwidth and FLOPs / peak. None for a GPU that isn't listed."""
    name = torch.cuda.get_device_name() if CUDA else ""
    for known, (bandwidth, fp8, _) in PEAKS.items():
        if known in name:
            return max(moved / bandwidth, flops / fp8)
    return None


def sets_needed(moved: float) -> int:
    """How many sets of operands to take in turn so that none is still in the L2 cache when its turn comes again."""
    if not CUDA:
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, math.ceil(3 * cache / moved)))


def first_results(sides: dict[str, Call], ours: str = "ours") -> tuple[dict[str, Any], dict[str, str]]:
    """What each side gives, and why a side other than ours can't be had here."""
    results: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, call in sides.items():
        try:
            results[name] = call()
            if CUDA:
                torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # NotImplementedError is a RuntimeError
            if name == ours:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return results, reasons


def seconds(sides: dict[str, Sequence[Call]], rounds: int = 20, calls: int = 20) -> dict[str, float]:
    """Seconds of one call of each side: median over `rounds`, in which the sides take turns.

    A side is a list of calls on different operands, run one after the other as one CUDA graph, so that neither Python's
    launches nor operands left in the L2 cache count. Without CUDA every call is made once and nothing is measured.
    """
    if not CUDA:
        for ones in sides.values():
            for call in ones:
                call()
        return {}
    runs, counts = {}, {}
    for name, ones in sides.items():
        turns = [call for _ in range(math.ceil(calls / len(ones))) for call in ones]
        for call in turns:  # compiles, chooses tiles, and warms up
            call()
        torch.cuda.synchronize()
        runs[name], counts[name] = _as_graph(turns), len(turns)
    events: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 / counts[name]
        for name, pairs in events.items()
    }


def _as_graph(turns: Sequence[Call]) -> Call:
    """The calls as one CUDA graph; one by one if something in them can't be captured."""

    def one_by_one() -> None:
        for call in turns:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"(timed without a CUDA graph, launches count: {str(error).splitlines()[0]})", file=sys.stderr)
        return one_by_one
    graph.replay()
    return graph.replay


def error_share(out: Tensor, parts: Iterable[tuple[Any, Tensor, Tensor]]) -> float:
    """The largest error of `out` over what is allowed for its element; 1 is the limit.

    parts: (where in out, A, B) with A and B dequantised; there `out` shall be A·Bᵀ, in fp64. Allowed, times ‖a‖‖b‖: on
    a GPU what the model of its accumulator predicts (chapter 8), else 2e-6; plus the rounding to bf16.
    """
    worst = 0.0
    for where, a, b in parts:
        a64, b64, c = a.double(), b.double(), out[where].double()
        exact = a64 @ b64.t()
        limit = hopper_tolerance(a.shape[1]) if out.is_cuda else 2e-6
        allowed = limit * a64.norm(dim=1)[:, None] * b64.norm(dim=1)[None, :] + 1e-300
        if out.dtype == torch.bfloat16:
            allowed += exact.abs() * 2.0**-8
        worst = max(worst, ((c - exact).abs() / allowed).nan_to_num(nan=math.inf).max().item() if c.numel() else 0.0)
    return worst


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there."""
    there = [v for v in values if v is not None]
    return statistics.geometric_mean(there) if there else None


def shown(value: float | None, form: str) -> str:
    """`value` in the format, or a dash of the same width."""
    return format("-", ">" + form.split(".")[0]) if value is None else format(value, form)


def record(name: str, command: str, results: dict[str, Any]) -> None:
    """Writes `results` as the package data `name`, with date, commit and machine."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"date": date.today().isoformat(), "command": command, "commit": commit, "machine": machine()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about, **results}, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


def machine() -> str:
    """What computes, and versions, in words."""
    if CUDA:
        return f"{torch.cuda.get_device_name()}, {_versions('torch', 'triton')}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{os.cpu_count()} CPU cores ({cpu}), {torch.get_num_threads()} thread(s), {_versions('torch')}"


def _versions(*packages: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
