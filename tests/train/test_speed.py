"""Peaks by the names that drivers give, FLOPs per token against a hand count, and memory that was really used."""

import subprocess
import sys

import pytest
import torch

from dsv3_book.config import ModelConfig
from dsv3_book.train import speed
from dsv3_book.train.speed import gpu_peak, peak_flops, peak_memory, train_flops_per_token

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835e12, 1671e12),
        ("NVIDIA H800", 989e12, 1979e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA H20", 148e12, 296e12),
        ("NVIDIA GH200 480GB", 989e12, 1979e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA A100 80GB PCIe", 312e12, None),
        ("NVIDIA B200", 2250e12, 4500e12),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA L4", 121e12, 242e12),
        ("NVIDIA L40S", 362e12, 733e12),
        ("NVIDIA A10", None, None),  # in no row, though its name begins like the A100's
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_gpus_are_told_apart_by_name(name: str, bf16: float | None, fp8: float | None) -> None:
    assert gpu_peak(name, torch.bfloat16) == bf16
    assert gpu_peak(name, torch.bfloat16, fp8=True) == fp8


def test_fp32_products_use_tensor_cores_only_when_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert gpu_peak("NVIDIA A100-SXM4-40GB", torch.float32) == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert gpu_peak("NVIDIA A100-SXM4-40GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_is_measured_once_and_draws_no_random_numbers(monkeypatch) -> None:
    speed._measured.cache_clear()
    clock = iter([0.0, 0.0, 0.05, 0.05, 0.09, 0.09, 0.2])  # begin; three products of 50, 40 and 110 ms
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    state = torch.get_rng_state()
    try:
        assert peak_flops(CPU, torch.float32) == pytest.approx(2 * 1024**3 / 0.04)
        assert peak_flops(CPU, torch.float32, fp8=True) == pytest.approx(2 * 1024**3 / 0.04)  # the clock has run out
    finally:
        speed._measured.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_peak_is_known_for_other_devices() -> None:
    assert peak_flops(torch.device("meta"), torch.float32) is None


def test_flops_per_token_by_hand() -> None:
    cfg = ModelConfig.preset("tiny").replace(num_hidden_layers=1, num_nextn_predict_layers=0, first_k_dense_replace=1)
    d, h, T = cfg.hidden_size, cfg.num_attention_heads, 9
    attention = (
        d * cfg.q_lora_rank + cfg.q_lora_rank * h * cfg.qk_head_dim + d * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    )
    attention += cfg.kv_lora_rank * h * (cfg.qk_nope_head_dim + cfg.v_head_dim) + h * cfg.v_head_dim * d
    scores = h * (cfg.qk_head_dim + cfg.v_head_dim) * 5  # a token sees five on average: 1, 2 … 9
    forward = 2 * (attention + scores + 3 * d * cfg.intermediate_size + cfg.vocab_size * d)
    assert train_flops_per_token(cfg, T) == pytest.approx(3 * forward)
    more = cfg.replace(num_nextn_predict_layers=1)
    assert train_flops_per_token(more, T) > train_flops_per_token(cfg, T)


def test_memory_is_this_processes_own_peak() -> None:
    """In a process of its own: it grows by what is written, stays after it is freed, and its parent's doesn't count."""
    held = torch.ones(50_000_000)  # 200 MB here
    program = """
import torch
from dsv3_book.train.speed import peak_memory
before = peak_memory(torch.device("cpu"))
x = torch.ones(25_000_000)
most = peak_memory(torch.device("cpu"))
del x
print(before, most, peak_memory(torch.device("cpu")))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, most, after = map(int, said.split())
    assert 80e6 < most - before < 140e6 and after > most - 1e6  # Linux counts in batches
    assert before < peak_memory(CPU) and held.numel()
