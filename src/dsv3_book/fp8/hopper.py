"""What the compiler makes of a Triton kernel for a Hopper GPU: no GPU is needed to look.

Triton compiles for any target that it is told, and brings NVIDIA's assembler; only running the result takes the device.
In a process whose kernels are interpreted (`TRITON_INTERPRET=1`) nothing can be compiled, not even Triton's own
library: so another Python does it.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma": r"\bmma\.sync\b",
    "TMA": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "cvt e4m3": r"\bcvt\.rn\.satfinite\.e4m3x2\.f32\b",
    "setmaxnreg": r"\bsetmaxnreg\b",
    "local": r"\b[ls][td]\.local\b",
}
"""What to look for in PTX: the tensor core's instructions on Hopper and before, loads of tiles by the copy engine,
loads of 16 bytes by a thread, casts in hardware, warps that hand over registers, arrays in local memory (what the
assembler spills later is not in PTX: `assemble` tells)."""

_PREAMBLE = """\
import triton
import triton.language as tl
from dsv3_book.fp8.kernels.casts import *
"""

_COMPILE = """\
import importlib, json, sys
from dsv3_book.fp8.hopper import compile_here

sys.path.insert(0, sys.argv[1])
answers = []
for job in json.load(sys.stdin):
    kernel = getattr(importlib.import_module(job["module"]), job["name"])
    answers.append(compile_here(kernel, job["types"], job["constants"], **job["options"]).asm["ptx"])
json.dump(answers, sys.stdout)
"""


def job(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any] = {}, num_warps: int = 4, num_stages: int = 3
) -> dict[str, Any]:
    """A job for `compile_for_hopper`: a kernel, its arguments' types, its constexprs.

    Args:
        kernel: decorated by `triton.jit`, in the package or in a notebook (where it may use `kernels.casts` alone).
        types: as Triton writes them: ``*fp8e4nv`` a pointer, ``i32``, ``tensordesc<fp8e4nv[128,128]>``.
        constants: values of the constexprs.
    """
    while not inspect.isfunction(kernel):
        kernel = kernel.fn
    own = kernel.__module__.startswith("dsv3_book.")
    return {
        "module": kernel.__module__ if own else "",
        "name": kernel.__name__,
        "source": "" if own else textwrap.dedent(inspect.getsource(kernel)),
        "types": dict(types),
        "constants": dict(constants),
        "options": {"num_warps": num_warps, "num_stages": num_stages},
    }


def compile_here(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str] | None = None,
    **options: int,
) -> Any:
    """Compiles a kernel for compute capability 9.0 in this process, which must not interpret.

    Args:
        types: of the arguments that are no constants, as for `job`.
        aligned: integers to be taken for multiples of 16, as Triton finds out at a launch; None for all. Pointers are.
        options: num_warps, num_stages.

    Returns:
        Triton's result: `.asm["ptx"]`, `.metadata.shared`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # autotuned
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind[0] == "i" and (aligned is None or name in aligned))
    }
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_for_hopper(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Compiles every job for compute capability 9.0, and returns its PTX, NVIDIA's assembly language.

    Raises:
        RuntimeError: a kernel does not compile; the message is the compiler's.
    """
    with TemporaryDirectory() as folder:
        prepared = []
        for number, job in enumerate(jobs):
            module = job["module"] or f"cell_{number}"
            if not job["module"]:
                (Path(folder) / f"{module}.py").write_text(_PREAMBLE + job["source"], encoding="utf-8")
            prepared.append({**job, "module": module})
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        env.pop("TRITON_INTERPRET", None)
        done = subprocess.run([sys.executable, "-c", _COMPILE, folder], input=json.dumps(prepared), env=env,
                              capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile for Hopper:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def count_instructions(ptx: str) -> Counter[str]:
    """How often each of `INSTRUCTIONS` stands in a program's PTX."""
    return Counter({name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()})


@dataclass(frozen=True)
class Assembled:
    """What NVIDIA's assembler says about a program."""

    registers: int  # a thread's
    spilled: int  # bytes that found no register
    serialised: bool  # must every wgmma be waited for before the next?


def assemble(ptx: str) -> Assembled:
    """Runs NVIDIA's assembler, which hands out the registers; it comes with Triton."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [str(assembler), "-v", "--gpu-name=sm_90a", str(source), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,), (spilled,) = (re.findall(p, said) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return Assembled(int(registers), int(spilled), "serialized" in said)
