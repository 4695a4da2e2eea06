"""The GPU benchmark where there is no GPU: its code runs in Triton's interpreter, and claims no figure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytest.importorskip("triton")


@pytest.fixture
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures, for minutes")
def test_without_a_gpu_the_benchmark_runs_small_and_measures_nothing():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fp8_gemm.py"), "--write"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT MEASURED YET" in done.stdout
    assert "nothing is recorded" in done.stdout
    lines = done.stdout.splitlines()
    for kind in ("dense", "wgrad", "grouped", "masked", "grouped wgrad", "quantize_rows", "swiglu_quantize"):
        (line,) = [line for line in lines if re.match(rf"{kind} +\d", line)]
        figures = re.split(r"\|", line)[1:4]
        assert not any(re.search(r"\d", part) for part in figures), line


def test_a_wrong_element_is_seen(path):
    from _fp8_cases import Case, Operands
    from _measure import error_share

    operands = Operands(Case("grouped", 24, 80, 144, 2), seed=1)
    (a, a_scale), (b, b_scale) = operands.a, operands.b
    from dsv3_book.fp8 import grouped_fp8_gemm

    good = grouped_fp8_gemm(a, a_scale, b, b_scale, operands.counts)
    assert error_share(good, operands.parts()) <= 1
    good[40, 79] *= 1.02
    assert error_share(good, operands.parts()) > 1
    good[40, 79] = torch.nan
    assert error_share(good, operands.parts()) > 1


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="this torch has no scaled_mm")
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("K", [512, 640])
def test_scales_are_laid_out_as_torch_wants_them(path, by_rows, K):
    """torch checks the layouts on meta tensors too, so its side of the comparison can be tried without its GPU."""
    from _fp8_cases import block_wise

    M, N = 64, 256
    with torch.device("meta"):
        a, b = (torch.empty(rows, K, dtype=torch.float8_e4m3fn) for rows in (M, N))
        a_scale, b_scale = torch.empty(M, K // 128), torch.empty(N if by_rows else N // 128, K // 128)
    assert block_wise(a, a_scale, b, b_scale, torch.bfloat16)().shape == (M, N)
