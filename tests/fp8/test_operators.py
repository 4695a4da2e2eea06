"""The FP8 operations as torch operators: their shapes without data, no hidden writes, and compiled like any other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_book.fp8 import operators, reference

counts = torch.tensor([130, 0, 3])
E4M3 = torch.float8_e4m3fn


def rows(n, k, seed=0):
    return reference.quantize_rows(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), False)


def blocks(*shape):
    return reference.quantize_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(1)), False)


def examples():
    x, half = torch.randn(133, 200), torch.randn(133, 200).bfloat16()
    a, b = rows(133, 200), blocks(3, 70, 200)
    one = b[0][0], b[1][0]
    ca, cb = (reference.quantize_columns(t, counts, True) for t in (x, x[:, :70].contiguous()))
    room = tuple(t[:120].view(3, 40, -1) for t in a)
    for pow2 in (False, True):
        for source in (x, half, x.t(), x[:0]):
            yield "quantize_rows", (source, pow2)
            yield "quantize_columns", (source, None, pow2)
        yield "quantize_columns", (x, counts, pow2)
        yield "quantize_columns", (half, counts.int(), pow2)
        yield "quantize_blocks", (x[None], pow2)
        yield "requantize_columns", (*a, None, pow2)
        yield "requantize_columns", (*a, counts, pow2)
        yield "swiglu_quantize", (x, x + 1, None, pow2)
        yield "swiglu_quantize", (half, half, torch.rand(133), pow2)
    yield "quantize_tensor", (half,)
    for dtype in (torch.float32, torch.bfloat16):
        yield "gemm", (*a, *one, dtype)
        yield "gemm", (*a, *rows(50, 200, 1), dtype)
        yield "grouped_gemm", (*a, *b, counts, dtype)
        yield "masked_gemm", (*room, *b, torch.tensor([40, 0, 7]), dtype)
        yield "grouped_wgrad", (*ca, *cb, counts, dtype)


EXAMPLES = list(examples())


# Not torch's own `test_schema`: it subtracts inputs from themselves, which torch cannot do with E4M3.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def bits(value):
    return value.clone().view(torch.uint8) if isinstance(value, torch.Tensor) and value.dtype == E4M3 else value


def check_all():
    for name, args in EXAMPLES:
        operator = getattr(torch.ops.dsv3_book, name).default
        torch.library.opcheck(operator, args, test_utils=CHECKS)
        print(name)


def test_every_operator_is_what_it_says():
    """torch's own checks: shapes and strides of the fake twin, also of unknown size; no gradient; what compilers see.

    In a process of its own, because there an int may be a symbol, which this session's type checks would refuse.
    """
    code = "import test_operators; test_operators.check_all()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name for name, _ in EXAMPLES]


@pytest.mark.parametrize(("name", "args"), EXAMPLES, ids=[f"{i}-{n}" for i, (n, _) in enumerate(EXAMPLES)])
def test_operator_writes_to_nothing_it_was_given(name, args):
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
    out = getattr(torch.ops.dsv3_book, name)(*args)
    for a, b in zip(args, before):
        assert a is b or torch.equal(bits(a), bits(b))
    given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and t.numel()}
    assert not given & {t.untyped_storage().data_ptr() for t in (out if isinstance(out, tuple) else (out,))}


def test_every_operator_has_an_example():
    names = {name for name in vars(operators) if isinstance(getattr(operators, name), torch._ops.OpOverloadPacket)}
    assert names == {name for name, _ in EXAMPLES}


def test_a_gpu_without_triton_runs_the_reference_and_says_so(monkeypatch):
    operators.implementation.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert operators.implementation() is reference
    operators.implementation.cache_clear()
