"""The FP8 operations as Triton kernels, one file a kernel, under the names and signatures of `reference`.

CUDA tensors run on their GPU (E4M3 needs compute capability 8.9 or newer). CPU tensors run in Triton's interpreter, for
learning and for tests, if TRITON_INTERPRET=1 was set before Triton was imported; otherwise RuntimeError says so.
Importing this package without Triton raises ImportError; nothing else in `dsv3_book` needs it.
"""

try:
    import triton  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "dsv3_book.fp8.kernels needs Triton, which is not installed: pip install triton (Linux only; torch's CUDA "
        "wheels bring it). Without it every FP8 operation still works through dsv3_book.fp8, which then computes "
        "with torch alone"
    ) from missing

from dsv3_book.fp8.kernels.gemm import gemm
from dsv3_book.fp8.kernels.grouped_gemm import grouped_gemm, masked_gemm
from dsv3_book.fp8.kernels.grouped_wgrad import grouped_wgrad
from dsv3_book.fp8.kernels.quantize_blocks import quantize_blocks
from dsv3_book.fp8.kernels.quantize_columns import quantize_columns, requantize_columns
from dsv3_book.fp8.kernels.quantize_rows import quantize_rows
from dsv3_book.fp8.kernels.quantize_tensor import quantize_tensor
from dsv3_book.fp8.kernels.swiglu_quantize import swiglu_quantize

__all__ = [
    "gemm",
    "grouped_gemm",
    "grouped_wgrad",
    "masked_gemm",
    "quantize_blocks",
    "quantize_columns",
    "quantize_rows",
    "quantize_tensor",
    "requantize_columns",
    "swiglu_quantize",
]
