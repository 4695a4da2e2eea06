"""What Triton makes of the products for a Hopper GPU, without one: `python -m dsv3_book.fp8.kernels.compiled`.

Triton compiles for a GPU that is not there, and brings NVIDIA's assembler. So the instructions, registers and shared
memory of each candidate are known on any Linux machine; only its time is not. Needs TRITON_INTERPRET unset. `--few`
leaves out most candidates of most products, `--json` prints an object a line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import triton

from dsv3_book.fp8.hopper import assemble, compile_here, count_instructions
from dsv3_book.fp8.kernels import tuning

# A Triton type for each argument that is not a constant. Sizes and strides are taken to be multiples of 16, as all of
# the model's are but the number of tokens: Triton compiles another version, with slower stores, where one is not.
TYPES = {
    "a": "*fp8e4nv", "b": "*fp8e4nv", "a_scale": "*fp32", "b_scale": "*fp32", "counts": "*i64", "starts": "*i32",
} | dict.fromkeys(("M", "N", "K", "E", "R", "room", "a_stride", "b_stride", "size_class"), "i32")  # fmt: skip
ALIGNED = ("N", "K", "R", "a_stride", "b_stride")


@dataclass
class Report:
    """One kernel with one candidate, compiled for sm_90."""

    kernel: str
    tile: str
    warps: int
    stages: int
    specialised: bool
    scales_of_b: str
    out: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    wgmma: int  # tensor-core instructions on e4m3 × e4m3
    tma: int  # loads by the copy engine
    setmaxnreg: int  # registers handed from the warps that load to those that multiply
    serialised: bool  # must every wgmma be waited for before the next?


def products() -> Iterator[tuple[Any, bool, str, dict[str, Any]]]:
    """Kernel, scales of B by blocks?, dtype of C, and constants, for everything that `tuning.CONFIGS` are tried on."""
    from dsv3_book.fp8.kernels.gemm import gemm_kernel
    from dsv3_book.fp8.kernels.grouped_gemm import grouped_gemm_kernel, masked_gemm_kernel
    from dsv3_book.fp8.kernels.grouped_wgrad import grouped_wgrad_kernel

    for out in ("bf16", "fp32"):
        yield gemm_kernel, True, out, {"SPLITS": 1}
        yield gemm_kernel, False, out, {"SPLITS": 1}
    yield gemm_kernel, True, "fp32", {"SPLITS": 4}
    yield grouped_gemm_kernel, True, "bf16", {"LEVELS": 8}
    yield masked_gemm_kernel, True, "bf16", {}
    yield grouped_wgrad_kernel, False, "fp32", {"LEVELS": 8}


def report(kernel: Any, by_blocks: bool, out: str, constants: dict[str, Any], config: triton.Config) -> Report:
    """Compiles and counts."""
    shape = config.kwargs
    constants = constants | shape | {"B_BLOCKS": by_blocks, "BAND": tuning.BAND}
    types = TYPES | {"c": f"*{out}"}
    for operand, rows in (("a_tma", "BLOCK_M"), ("b_tma", "BLOCK_N")):
        types[operand] = f"tensordesc<fp8e4nv[{shape[rows]},{tuning.TILE}]>"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_here(kernel, types, constants, ALIGNED, **options)
    ptx = compiled.asm["ptx"]
    counts, assembled = count_instructions(ptx), assemble(ptx)
    return Report(
        kernel=kernel.fn.__name__,
        tile=f"{shape['BLOCK_M']}×{tuning.width(shape)}",
        warps=config.num_warps,
        stages=config.num_stages,
        specialised=shape["SPECIALISED"],
        scales_of_b="128×128" if by_blocks else "1×128",
        out=out,
        registers=assembled.registers,
        spilled=assembled.spilled,
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", ptx)),
        tma=counts["TMA"],
        setmaxnreg=counts["setmaxnreg"],
        serialised=assembled.serialised,
    )


def reports(few: bool) -> Iterator[Report]:
    """All products with all candidates that `tuning` would measure for some number of rows; or the first product with
    all of them and the others with three."""
    for i, (kernel, by_blocks, out, constants) in enumerate(products()):
        for j, config in enumerate(tuning.CONFIGS):
            skip = few and i > 0 and j not in (0, 1, 4)
            if not skip and tuning.possible(config, by_blocks, 2 if out == "bf16" else 4):
                yield report(kernel, by_blocks, out, constants, config)


def main() -> None:
    as_json, few = "--json" in sys.argv, "--few" in sys.argv
    if not as_json:
        print("  ".join(f.name for f in fields(Report)))
    for line in reports(few):
        values = asdict(line)
        print(json.dumps(values) if as_json else "  ".join(f"{v!s:>{len(k)}}" for k, v in values.items()), flush=True)


if __name__ == "__main__":
    main()
