"""The products compiled for a Hopper GPU that need not be there: what a figure would be worth nothing without."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
from dsv3_book.fp8.kernels.tuning import SHARED_MEMORY


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """`kernels.compiled`'s report, from a process in which Triton compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dsv3_book.fp8.kernels.compiled", "--json", "--few"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_product_uses_what_hopper_has(compiled: list[dict[str, Any]]) -> None:
    names = {"gemm_kernel", "grouped_gemm_kernel", "masked_gemm_kernel", "grouped_wgrad_kernel"}
    assert {r["kernel"] for r in compiled} == names
    assert all(any(r["specialised"] for r in compiled if r["kernel"] == name) for name in names)
    for r in compiled:
        assert r["wgmma"] >= 4, r  # four times 32 of K: e4m3 times e4m3 on the tensor core
        assert r["tma"] >= 2, r
        assert r["shared"] <= SHARED_MEMORY, r
        assert r["spilled"] == 0, r
        assert not r["serialised"], r  # else each wgmma waits for the one before
        # The compiler splits the warps only if everything suits it, and does not say so when it doesn't.
        assert (r["setmaxnreg"] > 0) == r["specialised"], r
