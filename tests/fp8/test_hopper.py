"""Looking at what the compiler makes of a kernel, from a process whose kernels are interpreted."""

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl

from dsv3_book.fp8 import hopper

CODES, NUMBERS = "*fp8e4nv", "*fp32"


@triton.jit
def product_kernel(a, b, out, TILE: tl.constexpr):
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    left, right = tl.load(a + row * TILE + column), tl.load(b + row * TILE + column)
    tl.store(out + row * TILE + column, tl.dot(left, right.T))


@triton.jit
def broken_kernel(a, out):
    tl.store(out, tl.no_such_thing(a))


def test_a_product_uses_the_tensor_core():
    job = hopper.job(product_kernel, {"a": CODES, "b": CODES, "out": NUMBERS}, {"TILE": 128})
    (ptx,) = hopper.compile_for_hopper([job])
    found = hopper.count_instructions(ptx)
    assert found["wgmma"] == 8  # 128·128·128 / (64·128·32)
    assert found["mma"] == found["TMA"] == 0
    assert found["cp.async"] or "ld.global" in ptx


def test_a_kernel_of_the_package():
    from dsv3_book.fp8.kernels.quantize_rows import quantize_rows_kernel

    types = {"x": "*bf16", "codes": CODES, "scale": NUMBERS, "K": "i32", "tiles": "i32"}
    job = hopper.job(quantize_rows_kernel, types, {"POW2": False, "TILES": 32, "TILE": 128})
    (ptx,) = hopper.compile_for_hopper([job])
    assert hopper.count_instructions(ptx)["cvt e4m3"] == 32 * 128 // (4 * 32) // 2  # numbers a thread, two at a time
    assembled = hopper.assemble(ptx)
    assert 0 < assembled.registers <= 255 and assembled.spilled == 0


def test_a_kernel_that_does_not_compile_is_told():
    with pytest.raises(RuntimeError, match="no_such_thing"):
        hopper.compile_for_hopper([hopper.job(broken_kernel, {"a": NUMBERS, "out": NUMBERS}, {})])
