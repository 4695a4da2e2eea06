"""Where a kernel may run: a CUDA tensor's device, or the interpreter for a CPU tensor."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_book.fp8.kernels.casts import INTERPRETED

TILE = 128
"""Elements along a scaled direction (report §3.3.2): 1×128, 128×1, 128×128."""


def interpreted() -> bool:
    """Were Triton and these kernels imported with TRITON_INTERPRET=1?"""
    # Triton's own library was decorated when Triton was imported, our kernels when this package was: both must agree.
    return INTERPRETED.value and not isinstance(tl.max, triton.JITFunction)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """`with on_device_of(x): kernel[grid](x, ...)` launches on x's device.

    Raises RuntimeError for a CPU tensor unless the kernels are interpreted.
    """
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if not interpreted():
        raise RuntimeError(
            f"a Triton kernel got a tensor on {x.device}: move it to a CUDA device, or let Triton's interpreter run "
            "the kernels by setting the environment variable TRITON_INTERPRET=1 before Triton is first imported "
            "(best: before Python starts); dsv3_book.fp8.reference computes the same numbers with torch alone"
        )
    return nullcontext()
