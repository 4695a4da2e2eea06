"""What is refused, by name; sizes of zero; and settings of torch that must not change a number."""

import jaxtyping
import pytest
import torch

from dsv3_book import fp8
from dsv3_book.fp8.accumulate import accumulate
from dsv3_book.fp8.experts import Fp8Experts
from dsv3_book.fp8.formats import E4M3
from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU

A = fp8.quantize_activation(torch.ones(4, 200))
B = fp8.quantize_weight(torch.ones(150, 200))
STACK = fp8.quantize_weight(torch.ones(2, 150, 200))
REFUSED = {
    "float64": (
        lambda: fp8.quantize_activation(torch.ones(2, 2, dtype=torch.float64)),
        r"x is torch.float64.*float\(\)",
    ),
    "a not quantised": (lambda: fp8.fp8_gemm(torch.ones(4, 200), A[1], *B), r"a is torch.float32.*quantise"),
    "scale dtype": (
        lambda: fp8.fp8_gemm(A[0], A[1].half(), *B),
        r"scale of a is torch.float16, expected torch.float32",
    ),
    "scale shape": (
        lambda: fp8.fp8_gemm(*A, B[0], B[1][:1]),
        r"scale of b \[150, 200\] is \[1, 2\], expected \[2, 2\]",
    ),
    "activation scale": (lambda: fp8.fp8_gemm(A[0], A[1][:, :1], *B), r"scale of a \[4, 200\] is \[4, 1\]"),
    "inner sizes": (lambda: fp8.fp8_gemm(*fp8.quantize_activation(torch.ones(4, 128)), *B), r"128 against 200"),
    "out dtype": (lambda: fp8.fp8_gemm(*A, *B, torch.float16), r"out_dtype is torch.float16"),
    "device": (lambda: fp8.fp8_gemm(*A, B[0].to("meta"), B[1].to("meta")), r"different devices \(cpu, meta\)"),
    "device of a scale": (lambda: fp8.fp8_gemm(A[0], A[1].to("meta"), *B), r"different devices \(cpu, meta\)"),
    "counts' sum": (
        lambda: fp8.grouped_fp8_gemm(*A, *STACK, torch.tensor([1, 2])),
        r"\[1, 2\] do not sum to the 4 rows",
    ),
    "counts' number": (lambda: fp8.grouped_fp8_gemm(*A, *STACK, torch.tensor([4])), r"b holds 2 experts"),
    "counts' dtype": (lambda: fp8.quantize_columns(torch.ones(4, 2), torch.tensor([4.0])), r"counts is torch.float32"),
    "room": (
        lambda: fp8.masked_fp8_gemm(A[0].view(2, 2, 200), A[1].view(2, 2, 2), *STACK, torch.tensor([1, 3])),
        r"\[1, 3\] must not exceed the room of 2 rows",
    ),
    "places": (lambda: fp8.grouped_fp8_wgrad(*A, *A, torch.tensor([4])), r"a has 200 places.*have 128"),
    "swiglu": (lambda: fp8.swiglu_quantize(torch.ones(2, 3), torch.ones(3, 3)), r" \[2, 3\], but up is \[3, 3\]"),
    "negative counts": (
        lambda: fp8.grouped_fp8_gemm(*A, *STACK, torch.tensor([-1, 5])),
        r"\[-1, 5\] must not be negative",
    ),
    "counts of rooms": (
        lambda: fp8.masked_fp8_gemm(A[0].view(2, 2, 200), A[1].view(2, 2, 2), *STACK, torch.tensor([1.0, 2.0])),
        r"counts is torch.float32",
    ),
    "a single number": (lambda: fp8.quantize_activation(torch.ones(())), r"x has the shape \[\], expected \[\*n, K\]"),
    "a vector as weight": (lambda: fp8.quantize_weight(torch.ones(7)), r"w .* \[7\], expected \[\*E, N, K\]"),
    "columns of a stack": (
        lambda: fp8.quantize_columns(torch.ones(2, 3, 4)),
        r"x has the shape \[2, 3, 4\], expected \[N, D\]",
    ),
    "a with three axes": (
        lambda: fp8.fp8_gemm(A[0][None], A[1][None], *B),
        r"a has the shape \[1, 4, 200\], expected \[M, K\]",
    ),
    "b with two axes": (
        lambda: fp8.grouped_fp8_gemm(*A, *B, torch.tensor([4])),
        r"b has the shape \[150, 200\], expected \[E, N, K\]",
    ),
    "one scale for b": (lambda: fp8.fp8_gemm(*A, B[0], B[1][0, 0]), r"scale of b \[150, 200\] is \[\]"),
    "swiglu's weight": (
        lambda: fp8.swiglu_quantize(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)),
        r"weight holds 3 numbers, but gate has 2 rows",
    ),
    "swiglu's weight's dtype": (
        lambda: fp8.swiglu_quantize(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, dtype=torch.int32)),
        r"weight is torch.int32",
    ),
    "e5m6 not packed": (
        lambda: fp8.dequantize_e5m6(torch.ones(3, 300), torch.ones(3, 2), 200),
        r"packed is torch.float32, expected torch.uint8",
    ),
    "e5m6's scale": (
        lambda: fp8.dequantize_e5m6(torch.ones(3, 300, dtype=torch.uint8), torch.ones(3, 1), 200),
        r"scale of packed .* is \[3, 1\], expected \[3, 2\]",
    ),
    "accumulating numbers": (lambda: accumulate(torch.ones(4, 200), B[0]), r"a is torch.float32.*quantise"),
    "accumulating other sizes": (lambda: accumulate(A[0][:, :64], B[0]), r"\[4, 64\] and b \[150, 200\] differ"),
    "decoding torch's type": (lambda: E4M3.decode(A[0]), r"float8_e4m3fn, expected integers.*view\(torch.uint8\)"),
    "weight scale": (lambda: fp8.dequantize_weight(B[0], B[1].t()[:1]), r"scale of codes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = REFUSED[case]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # or the tests' own type checks speak first
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 130), (2, 0, 130), (2, 3, 0)])
def test_no_numbers_are_quantised_too(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    codes, scale = fp8.quantize_activation(x)
    assert codes.shape == x.shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert fp8.dequantize_activation(codes, scale).shape == x.shape
    assert fp8.dequantize_e5m6(*fp8.quantize_e5m6(x), shape[-1]).shape == x.shape
    codes, scale = fp8.quantize_tensor(x)
    assert codes.shape == x.shape and scale == 2.0**-126
    if x.dim() > 1:
        assert fp8.dequantize_weight(*fp8.quantize_weight(x)).shape == x.shape


def test_products_of_nothing_are_zeros() -> None:
    nothing = fp8.quantize_activation(torch.ones(4, 0))
    assert torch.equal(fp8.fp8_gemm(*nothing, *nothing), torch.zeros(4, 4, dtype=torch.bfloat16))
    x, none = torch.ones(0, 5), torch.zeros(0, dtype=torch.int64)
    columns = fp8.quantize_columns(x, none)
    assert fp8.grouped_fp8_wgrad(*columns, *columns, none).shape == (0, 5, 5)
    weights = fp8.quantize_weight(torch.ones(0, 3, 5))
    assert fp8.grouped_fp8_gemm(*fp8.quantize_activation(x), *weights, none).shape == (0, 3)


def test_autocast_changes_nothing() -> None:
    """Else a CPU would multiply the dequantised numbers in bf16."""
    x, w = torch.randn(5, 200), torch.randn(70, 200)
    right = Fp8Linear()(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Fp8Linear()(x, w), right)


def test_second_derivatives_are_refused() -> None:
    x, w = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    counts = torch.tensor([3, 5])
    layers = (
        lambda: Fp8Linear()(x, w),
        lambda: Fp8SwiGLU()(x, w, w, w),
        lambda: Fp8Experts()(x, x[0], counts, *(w.expand(2, 8, 8),) * 3),
    )
    for layer in layers:
        (dx,) = torch.autograd.grad(layer().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()
