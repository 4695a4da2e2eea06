"""Where the kernels can run, and what is said where they can't: compiled for a Hopper GPU that need not be there
(memory is moved 16 bytes a thread at a time, no bit is flushed, nothing spills), without a GPU, and without Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, in which Triton compiles and does not interpret."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    done = python(str(Path(__file__).with_name("compile_quantisers.py")))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_quantiser_suits_hopper(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 21
    for r in compiled:
        assert r["spilled"] == 0, r
        assert r["flushes"] == 0, r  # subnormals are numbers too
        assert r["narrow"] == 0, r
        # 16 bytes a thread; turned tiles are read a cache line a warp instead.
        assert r["wide_loads"] > 0 or r["kernel"] == "quantize_columns_kernel", r
        if r["kernel"] != "amax_kernel":
            assert r["wide_stores"] > 0, r
            # Two numbers a cast; and far fewer divisions than numbers.
            assert 0 < r["divisions"] <= r["casts"] / 2, r


REFUSED = """
import torch
from dsv3_book.fp8 import kernels
kernels.quantize_rows(torch.ones(2, 128))
"""

LATE = """
import os, triton, torch
os.environ["TRITON_INTERPRET"] = "1"
""" + REFUSED.replace("import torch\n", "")

WITHOUT = """
import sys, torch
sys.modules["triton"] = None
from dsv3_book import fp8
codes, scale = fp8.quantize_activation(torch.ones(2, 128))
assert (codes.float() == 448).all()
from dsv3_book.fp8 import kernels
"""


@pytest.mark.parametrize("program", [REFUSED, LATE], ids=["not interpreted", "asked too late"])
def test_a_cpu_tensor_is_refused_with_the_remedy(program: str) -> None:
    pytest.importorskip("triton")
    done = python("-c", program)
    assert done.returncode == 1
    assert "RuntimeError: a Triton kernel got a tensor on cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_without_triton_all_but_the_kernels_works() -> None:
    done = python("-c", WITHOUT)
    assert done.returncode == 1
    assert "ImportError: dsv3_book.fp8.kernels needs Triton" in done.stderr
