"""Prints what Triton makes of the quantisers' launches for a Hopper GPU, one JSON object a launch, without a GPU.

The launchers run as they are, on CPU tensors; only Triton's last step is another one: instead of running a kernel it is
compiled for sm_90, with the types, constants and options that the launcher gave. Needs TRITON_INTERPRET unset.
"""

import json
import re
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import triton

from dsv3_book.fp8 import kernels
from dsv3_book.fp8.hopper import assemble, compile_here

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def compile_instead(fn: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **options: Any) -> None:
    """Takes the place of JITFunction.run."""
    del grid, warmup
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter, value in zip(fn.params, args):
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        else:
            types[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    aligned = [p.name for p, value in zip(fn.params, args) if isinstance(value, int) and value % 16 == 0]
    ptx = compile_here(fn, types, constants, aligned, num_warps=num_warps, **options).asm["ptx"]
    assembled = assemble(ptx)
    report = {
        "kernel": fn.__name__,
        "types": sorted({*types.values(), "constexpr"}),
        "registers": assembled.registers,
        "spilled": assembled.spilled,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*\.b(?:8|16)\b", ptx)),
        "casts": len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)),
        "flushes": len(re.findall(r"\.ftz", ptx)),
        "divisions": len(re.findall(r"div\.rn\.f32", ptx)),
    }
    print(json.dumps(report), flush=True)


def main() -> None:
    triton.JITFunction.run = compile_instead
    for file in ("quantize_rows", "quantize_blocks", "quantize_columns", "quantize_tensor", "swiglu_quantize"):
        import_module(f"dsv3_book.fp8.kernels.{file}").on_device_of = lambda x: nullcontext()
    counts = torch.tensor([256] * 200)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(256, 7168, dtype=dtype)
        kernels.quantize_rows(x)
        kernels.quantize_blocks(x[None])
        kernels.quantize_columns(x)
        kernels.quantize_tensor(x)
        kernels.swiglu_quantize(x, x, torch.empty(256), True)
    codes = torch.empty(256, 7168, dtype=torch.float8_e4m3fn)
    kernels.quantize_columns(x, counts, True)
    kernels.requantize_columns(codes, torch.empty(256, 56), None, True)
    kernels.requantize_columns(codes, torch.empty(256, 56), counts, True)


if __name__ == "__main__":
    main()
