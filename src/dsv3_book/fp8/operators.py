"""The FP8 operations as torch operators `torch.ops.dsv3_book.*`: torch picks by device, the compiler sees through.

On a CPU an operator runs `reference`, on CUDA the Triton kernel of the same name (the reference again where Triton is
not installed). The third function tells `torch.compile` the shapes without computing anything.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsv3_book.fp8 import reference
from dsv3_book.fp8.reference import tiles, total_rooms

E4M3 = torch.float8_e4m3fn


@functools.cache
def implementation() -> ModuleType:
    """What CUDA tensors go to: the kernels, or without Triton the reference, said once."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: on this GPU, FP8 runs its plain torch reference, slowly. pip install triton",
            stacklevel=2,
        )
        return reference
    from dsv3_book.fp8 import kernels

    return kernels


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `reference.<name>` and `kernels.<name>` under this schema; decorates the function giving the shapes."""

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        name = shapes.__name__
        plain = getattr(reference, name)

        def cpu(*args: Any) -> Any:
            with torch.autocast("cpu", enabled=False):  # it would multiply in bf16 what is defined in fp32
                return plain(*args)

        operator = torch.library.custom_op(
            f"dsv3_book::{name}", cpu, mutates_args=(), device_types="cpu", schema=schema
        )
        operator.register_kernel("cuda")(lambda *args: getattr(implementation(), name)(*args))
        operator.register_fake(shapes)
        return getattr(torch.ops.dsv3_book, name)

    return register


def _pair(x: Tensor, codes: tuple[Any, ...], scale: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return x.new_empty(codes, dtype=E4M3), x.new_empty(scale, dtype=torch.float32)


@_operator("(Tensor x, bool pow2) -> (Tensor, Tensor)")
def quantize_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return _pair(x, x.shape, (x.shape[0], tiles(x.shape[1])))


@_operator("(Tensor w, bool pow2) -> (Tensor, Tensor)")
def quantize_blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return _pair(w, w.shape, (w.shape[0], tiles(w.shape[1]), tiles(w.shape[2])))


@_operator("(Tensor x) -> (Tensor, Tensor)")
def quantize_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    return _pair(x, x.shape, ())


@_operator("(Tensor x, Tensor? counts, bool pow2) -> (Tensor, Tensor)")
def quantize_columns(x: Tensor, counts: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    R = x.shape[0] if counts is None else total_rooms(x.shape[0], counts.shape[0])
    return _pair(x, (x.shape[1], R), (x.shape[1], tiles(R)))


@_operator("(Tensor codes, Tensor scale, Tensor? counts, bool pow2) -> (Tensor, Tensor)")
def requantize_columns(codes: Tensor, scale: Tensor, counts: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    R = codes.shape[0] if counts is None else total_rooms(codes.shape[0], counts.shape[0])
    return _pair(codes, (codes.shape[1], R), (codes.shape[1], tiles(R)))


@_operator("(Tensor gate, Tensor up, Tensor? weight, bool pow2) -> (Tensor, Tensor)")
def swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, pow2: bool) -> tuple[Tensor, Tensor]:
    return _pair(gate, gate.shape, (gate.shape[0], tiles(gate.shape[1])))


_PRODUCT = "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, {counts}ScalarType out_dtype) -> Tensor"


@_operator(_PRODUCT.format(counts=""))
def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@_operator(_PRODUCT.format(counts="Tensor counts, "))
def grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@_operator(_PRODUCT.format(counts="Tensor counts, "))
def masked_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype)


@_operator(_PRODUCT.format(counts="Tensor counts, "))
def grouped_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((counts.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)
