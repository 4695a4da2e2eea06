"""FP8 products and quantisers on a Hopper GPU, beside bf16, torch's own block-wise FP8, and the least possible time.

For each product of the report's shapes, in one run: microseconds of our kernel and its floor (the larger of bytes /
bandwidth and FLOPs / peak, from the data sheet), TFLOP/s of ours, of bf16 `torch.matmul`, of
`torch.nn.functional.scaled_mm` with 1×128 and 128×128 scales, and what DeepGEMM publishes for an H800 (*report*). Every
result is compared with the dequantised operands' product in fp64 before anything is timed. For each quantiser: its
bytes per second beside a copy of as many bytes.

    python benchmarks/fp8_gemm.py [--only dense wgrad grouped masked quantisers] [--write]

Without a GPU nothing is measured; the same code then runs at small sizes in Triton's interpreter, as an exercise.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from _measure import (
    CUDA,
    DEVICE,
    Call,
    error_share,
    first_results,
    floor_seconds,
    geometric_mean,
    machine,
    record,
    seconds,
    sets_needed,
    shown,
)

PARTS = ("dense", "wgrad", "grouped", "masked", "quantisers")


def products(only: list[str], small: bool) -> Iterator[dict[str, Any]]:
    """One row of figures for each product, checked first. Raises SystemExit if a result of ours is wrong."""
    from _fp8_cases import Operands, cases

    for case in cases(small):
        if not any(part in case.kind for part in only) or ("wgrad" in case.kind and "wgrad" not in only):
            continue
        operands = [Operands(case, seed) for seed in range(sets_needed(case.moved))]
        sides = [one.sides() for one in operands]
        results, missing = first_results(sides[0])
        if (share := error_share(results["ours"], operands[0].parts())) > 1:
            raise SystemExit(f"{case}: our result is wrong, {share:.3g} times the error allowed")
        if "scaled_mm" in results and not isinstance(results["scaled_mm"], list):
            other = error_share(results["scaled_mm"], operands[0].parts())
            if not other < 100:  # it may sum otherwise, but not something else
                missing["scaled_mm"] = f"wrong result: {other:.3g} times the error allowed"
        del results
        times = seconds({name: [s[name] for s in sides] for name in sides[0] if name not in missing})
        yield {
            "kind": case.kind, "M": case.M, "N": case.N, "K": case.K, "E": case.E, "title": case.title,
            "error_share": share, "floor": floor_seconds(case.moved, case.flops), "seconds": times,
            "tflops": {name: case.flops / t / 1e12 for name, t in times.items()},
            "published": case.published, "missing": missing,
        }  # fmt: skip


def ratio(row: dict[str, Any], other: str) -> float | None:
    """How many times as fast as `other` ours is."""
    times = row["seconds"]
    return times[other] / times["ours"] if other in times else None


def print_products(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table, line by line as figures come, and its means."""
    print(f"\n{'C = A·Bᵀ':13} {'M':>7} {'N':>6} {'K':>7} | {'ours':>8} {'floor':>7} µs |", end="")
    print(f"{'ours':>6} {'bf16':>5} {'scaled_mm':>9} {'report':>6} TFLOP/s | {'/bf16':>6} {'/scaled_mm':>10} | error")
    kept, notes = [], {}
    for row in rows:
        kept.append(row)
        times, rate = row["seconds"], row["tflops"]
        us = times["ours"] * 1e6 if times else None
        floor = row["floor"] * 1e6 if row["floor"] else None
        print(
            f"{row['title']} | {shown(us, '8.1f')} {shown(floor, '7.1f')}    |{shown(rate.get('ours'), '6.0f')} "
            f"{shown(rate.get('bf16'), '5.0f')} {shown(rate.get('scaled_mm'), '9.0f')} {row['published'] or '-':>6} "
            f"        | {shown(ratio(row, 'bf16'), '6.2f')} {shown(ratio(row, 'scaled_mm'), '10.2f')} | "
            f"{row['error_share']:.2f} of what is allowed",
            flush=True,
        )
        notes |= {f"{name}, {row['kind']}": reason for name, reason in row["missing"].items()}
    for what, reason in notes.items():
        print(f"not compared: {what}: {reason}")
    return kept


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the weights, by kind and, for dense products, by M."""
    out = []
    for key in dict.fromkeys((row["kind"], row["M"] if row["kind"] == "dense" else None) for row in rows):
        ones = [row for row in rows if (row["kind"], row["M"] if row["kind"] == "dense" else None) == key]
        floors = [r["floor"] / r["seconds"]["ours"] if r["floor"] and r["seconds"] else None for r in ones]
        means = {other: geometric_mean(ratio(row, other) for row in ones) for other in ("bf16", "scaled_mm")}
        out.append({"kind": key[0], "M": key[1], "of_floor": geometric_mean(floors), **means})
    return out


def quantisers(small: bool) -> Iterator[dict[str, Any]]:
    """Bytes per second of each quantiser, beside a copy that moves as many bytes. Codes are compared first."""
    from dsv3_book.fp8 import kernels, reference

    rows, width, E = (40, 272, 2) if small else (16384, 7168, 8)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, up = (torch.randn(rows, width, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    w = torch.randn(1, width // 2, width, generator=generator, device=DEVICE)  # an fp32 master weight
    codes, scale = reference.quantize_rows(x, False)
    weight, counts = torch.rand(rows, device=DEVICE), torch.full((E,), rows // E, device=DEVICE)
    n, scales = x.numel(), 4 * x.numel() / 128
    for name, given, moved in (
        ("quantize_rows", (x, False), 3 * n + scales),
        ("quantize_blocks", (w, False), 5 * w.numel()),
        ("quantize_columns", (x, None, False), 3 * n + scales),
        ("quantize_columns", (x, counts, True), 3 * n + scales),
        ("requantize_columns", (codes, scale, None, False), 2 * n + 2 * scales),
        ("swiglu_quantize", (x, up, weight, True), 5 * n + scales),
        ("quantize_tensor", (x,), 5 * n),
    ):
        kernel, definition = getattr(kernels, name), getattr(reference, name)
        wanted, got = definition(*given), kernel(*given)
        differ = [
            (a.flatten().view(torch.uint8) != b.flatten().view(torch.uint8)).double().mean().item()
            for a, b in zip(got, wanted)
        ]
        if max(differ) > (1e-4 if name == "swiglu_quantize" else 0):  # its exponential function is the device's
            raise SystemExit(f"{name}: codes or scales differ from the reference's: {differ}")
        source = torch.empty(int(moved) // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        sides: dict[str, list[Call]] = {
            "ours": [lambda k=kernel, g=given: k(*g)],
            "copy": [lambda s=source, t=target: t.copy_(s)],
        }
        times = seconds(sides, calls=4)
        label = name + (" by expert" if name == "quantize_columns" and given[1] is not None else "")
        yield {"name": label, "moved": moved, "seconds": times, "floor": floor_seconds(moved)}


def print_quantisers(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of bytes per second. (One scale per tensor needs the tensor twice.)"""
    print(f"\n{'quantiser':28} {'MB':>6} | {'ours':>8} {'floor':>7} µs | {'ours':>5} {'copy':>5} TB/s | of copy")
    kept = []
    for row in rows:
        kept.append(row)
        times, moved = row["seconds"], row["moved"]
        us, floor = times["ours"] * 1e6 if times else None, row["floor"] * 1e6 if row["floor"] else None
        speed = {name: moved / t / 1e12 for name, t in times.items()}
        share = times["copy"] / times["ours"] if times else None
        print(
            f"{row['name']:28} {moved / 1e6:6.1f} | {shown(us, '8.1f')} {shown(floor, '7.1f')}    | "
            f"{shown(speed.get('ours'), '5.2f')} {shown(speed.get('copy'), '5.2f')}      | {shown(share, '5.2f')}",
            flush=True,
        )
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--write", action="store_true", help="record as src/dsv3_book/results/fp8_gemm.json")
    given = parser.parse_args()
    try:
        from dsv3_book.fp8 import kernels  # noqa: F401
    except ImportError as error:
        print(f"not measured yet: {error}")
        return 0
    print(machine())
    if not CUDA:
        print(
            "NOT MEASURED YET: no GPU here. What follows runs the kernels at small sizes in Triton's interpreter, and"
        )
        print("checks their results; the dashes stand where a GPU's figures would be.")
    rows = print_products(products(given.only, small=not CUDA))
    averages = means(rows)
    for mean in averages if CUDA else []:
        where = mean["kind"] + (f", M = {mean['M']}" if mean["M"] else "")
        print(
            f"geometric mean, {where:18}: {shown(mean['bf16'], '5.2f')} × bf16, {shown(mean['scaled_mm'], '5.2f')} × "
            f"scaled_mm, {shown(mean['of_floor'], '5.2f')} of the floor's speed"
        )
    speeds = print_quantisers(quantisers(small=not CUDA)) if "quantisers" in given.only else []
    if given.write and CUDA:
        command = " ".join(["python benchmarks/fp8_gemm.py", *sys.argv[1:]])
        record("fp8_gemm", command, {"products": rows, "means": averages, "quantisers": speeds})
    elif given.write:
        print("nothing was measured, so nothing is recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
