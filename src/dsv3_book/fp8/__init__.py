"""FP8 as V3 trains in it (report §3.3): formats, quantisers by tiles, products, and the layers made of them.

The functions here have no gradients of their own; `layers.use_fp8` and the modules it uses do.
"""

from dsv3_book.fp8.gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad, masked_fp8_gemm
from dsv3_book.fp8.quantize import (
    dequantize_activation,
    dequantize_e5m6,
    dequantize_weight,
    quantize_activation,
    quantize_columns,
    quantize_e5m6,
    quantize_tensor,
    quantize_weight,
    requantize_columns,
    swiglu_quantize,
)

__all__ = [
    "dequantize_activation",
    "dequantize_e5m6",
    "dequantize_weight",
    "fp8_gemm",
    "grouped_fp8_gemm",
    "grouped_fp8_wgrad",
    "masked_fp8_gemm",
    "quantize_activation",
    "quantize_columns",
    "quantize_e5m6",
    "quantize_tensor",
    "quantize_weight",
    "requantize_columns",
    "swiglu_quantize",
]
