"""How fast a run could be, and how much memory it took: what MFU and the live view are computed from.

MFU = tokens per second · training FLOPs per token / sum of the processes' peaks
"""

from __future__ import annotations

import re
import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_book.config import ModelConfig
from dsv3_book.costs import training_flops


class Peak(NamedTuple):
    """FLOP/s of one GPU. fp32: of its ordinary cores. bf16, fp8: of its tensor cores, dense, FP32 results (fp8 None: it
    has none). Tensor cores multiply in TF32 at half of bf16's speed."""

    fp32: float
    bf16: float
    fp8: float | None


# From NVIDIA's data sheets of each product (A100; H100; H200; L4; L40S; HGX B200 and GB200, per GPU), rounded as there.
# Where they give the tensor cores "with sparsity", half of it. The H800 is an H100 with slower links and FP64, the A800
# an A100; the H20's are those of its makers' brochure. A model of a card is told by words in the name that the driver
# gives: all the words of a row must be in it, and the first such row counts.
GPUS: dict[str, Peak] = {
    "GB200": Peak(80e12, 2500e12, 5000e12),
    "B200": Peak(75e12, 2250e12, 4500e12),
    "GH200": Peak(67e12, 989e12, 1979e12),
    "H200 NVL": Peak(60e12, 835e12, 1671e12),
    "H200": Peak(67e12, 989e12, 1979e12),
    "H100 NVL": Peak(60e12, 835e12, 1671e12),
    "H100 PCIe": Peak(51e12, 756e12, 1513e12),
    "H100": Peak(67e12, 989e12, 1979e12),
    "H800 PCIe": Peak(51e12, 756e12, 1513e12),
    "H800": Peak(67e12, 989e12, 1979e12),
    "H20": Peak(44e12, 148e12, 296e12),
    "A100": Peak(19.5e12, 312e12, None),
    "A800": Peak(19.5e12, 312e12, None),
    "L40S": Peak(91.6e12, 362e12, 733e12),
    "L4": Peak(30.3e12, 121e12, 242e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> float | None:
    """FLOP/s that this process could reach at most, or None where that isn't known.

    A GPU: from the table above, for products of `dtype`, or with `fp8` in FP8 (although attention's scores stay in
    bf16: MFU is then a lower bound). None for a card that isn't in the table, for a slice of one (MIG), and for FP8
    where there are no cores for it. Other accelerators: None.

    A CPU: what a matrix product of 1024³ in `dtype` reaches here and now with torch's threads, the best of those that
    fit into a tenth of a second; measured once per process. It is no maker's figure and, on a machine where others work
    too, no constant either. Several processes of one machine must measure at the same time, as they train at the same
    time: then their sum is the machine's. FP8 is emulated there, in products of `dtype`.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype, fp8)
    return _measured(dtype, torch.get_num_threads()) if device.type == "cpu" else None


def gpu_peak(name: str, dtype: torch.dtype, fp8: bool = False) -> float | None:
    """The peak of the GPU that the driver calls `name`, "NVIDIA H100 80GB HBM3"; see `peak_flops`."""
    words = set(re.findall(r"\w+", name.lower()))
    found = [peak for model, peak in GPUS.items() if set(model.lower().split()) <= words]
    if not found or "mig" in words:
        return None
    peak = found[0]
    if fp8:
        return peak.fp8
    if dtype != torch.float32:
        return peak.bf16
    return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.bf16 / 2


@cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    n, best = 1024, 0.0
    a = torch.full((n, n), 0.5, dtype=dtype)  # no random numbers: training's own must not move
    out = a @ a  # the first one also sets the library up
    end = time.perf_counter() + 0.1
    while True:
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        now = time.perf_counter()
        best = max(best, 2 * n**3 / (now - began))
        if now >= end:
            return best


def train_flops_per_token(cfg: ModelConfig, sequence_length: int) -> float:
    """FLOPs that training needs for one token: forward with causal attention, twice that backward, MTP included.

    The model's FLOPs: what is computed a second time to save memory isn't counted, nor is the optimiser (`costs.py`).
    """
    return training_flops(cfg, sequence_length)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of tensors on a GPU, else all that it had in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux: rusage would also count what the parent held when it started us
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
