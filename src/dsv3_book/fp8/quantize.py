"""To FP8 and back, by tiles (report §3.3.2): 1×128 for activations, 128×1 for Wgrad, 128×128 for weights.

Every function returns codes (`torch.float8_e4m3fn`) and fp32 scales that multiply: value = code · scale. The rule that
makes them, and what becomes of zeros, NaN and infinities, is in `reference`. On CUDA the Triton kernels do the work,
bit for bit alike. `pow2` makes every scale a power of two, so that scaling itself never rounds.

Raises ValueError for a dtype other than fp32, bf16 or fp16, a wrong number of axes, scales whose shape or dtype does
not fit the codes, and tensors on different devices.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float8e4m3fn, Int, UInt8
from torch import Tensor

from dsv3_book.fp8 import operators, reference
from dsv3_book.fp8.formats import E5M6, pack12, unpack12
from dsv3_book.fp8.reference import TILE, tiles

SOURCES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_activation(
    x: Float[Tensor, "*n K"], pow2: bool = False
) -> tuple[Float8e4m3fn[Tensor, "*n K"], Float[Tensor, "*n tiles"]]:
    """1×128 tiles: per token, per 128 channels. scale [*n, ⌈K/128⌉]."""
    check_source("x", x, "*n K")
    codes, scale = operators.quantize_rows(_merged(x, 1), pow2)
    return codes.view(x.shape), scale.view(*x.shape[:-1], scale.shape[-1])


def dequantize_activation(
    codes: Float8e4m3fn[Tensor, "*n K"], scale: Float[Tensor, "*n tiles"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*n K"]:
    """code · scale, in fp32, then in `dtype`."""
    check_axes("codes", codes, "*n K")
    check_codes("codes", codes, scale, (*codes.shape[:-1], tiles(codes.shape[-1])))
    flat = reference.dequantize_rows(_merged(codes, 1), _merged(scale, 1))
    return flat.view(codes.shape).to(dtype)


def quantize_weight(
    w: Float[Tensor, "*E N K"], pow2: bool = False
) -> tuple[Float8e4m3fn[Tensor, "*E N K"], Float[Tensor, "*E row_tiles tiles"]]:
    """128×128 blocks of one weight [N, K], or of stacked ones [E, N, K]. scale [⌈N/128⌉, ⌈K/128⌉]."""
    check_source("w", w, "*E N K")
    codes, scale = operators.quantize_blocks(_merged(w, 2), pow2)
    return codes.view(w.shape), scale.view(*w.shape[:-2], *scale.shape[-2:])


def dequantize_weight(
    codes: Float8e4m3fn[Tensor, "*E N K"],
    scale: Float[Tensor, "*E row_tiles tiles"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*E N K"]:
    """code · scale, in fp32, then in `dtype`: how a released FP8 weight becomes BF16 again."""
    check_axes("codes", codes, "*E N K")
    *E, N, K = codes.shape
    check_codes("codes", codes, scale, (*E, tiles(N), tiles(K)))
    return reference.dequantize_blocks(_merged(codes, 2), _merged(scale, 2)).view(codes.shape).to(dtype)


def quantize_columns(
    x: Float[Tensor, "N D"], counts: Int[Tensor, " E"] | None = None, pow2: bool = False
) -> tuple[Float8e4m3fn[Tensor, "D R"], Float[Tensor, "D tiles"]]:
    """128×1 tiles: per channel, per 128 tokens; stored transposed because Wgrad contracts the tokens.

    Without counts R = N. With counts, for rows sorted by expert, every expert's tokens begin a tile of their own (a
    "room" of whole tiles), R = `reference.total_rooms(N, E)`, and places without a token hold zeros.
    """
    check_source("x", x, "N D")
    check_counts(counts, len(x), x.device)
    return operators.quantize_columns(x, counts, pow2)


def requantize_columns(
    codes: Float8e4m3fn[Tensor, "N D"],
    scale: Float[Tensor, "N tiles"],
    counts: Int[Tensor, " E"] | None = None,
    pow2: bool = False,
) -> tuple[Float8e4m3fn[Tensor, "D R"], Float[Tensor, "D row_tiles"]]:
    """From 1×128 tiles to the 128×1 tiles of `quantize_columns`. With powers of two (both times) only values that sink
    to the bottom of the new tile's range are rounded a second time."""
    check_axes("codes", codes, "N D")
    check_codes("codes", codes, scale, (codes.shape[0], tiles(codes.shape[1])))
    check_counts(counts, len(codes), codes.device)
    return operators.requantize_columns(codes, scale, counts, pow2)


def quantize_tensor(x: Float[Tensor, "*n"]) -> tuple[Float8e4m3fn[Tensor, "*n"], Float[Tensor, ""]]:
    """One scale for all of x: what fine-grained tiles are compared with."""
    check_source("x", x, "*n")
    return operators.quantize_tensor(x)


def swiglu_quantize(
    gate: Float[Tensor, "S F"],
    up: Float[Tensor, "S F"],
    weight: Float[Tensor, " S"] | None = None,
    pow2: bool = False,
) -> tuple[Float8e4m3fn[Tensor, "S F"], Float[Tensor, "S tiles"]]:
    """1×128 tiles of silu(gate) · up (· weight, one number a row), without that product ever being in memory.

    It is computed in fp32 and rounded to gate's dtype before it is quantised.
    """
    check_source("gate", gate, "S F")
    check_source("up", up, "S F")
    same_device(gate, up)
    if up.shape != gate.shape:
        raise ValueError(f"gate is {list(gate.shape)}, but up is {list(up.shape)}: they must be alike")
    if weight is not None:
        check_source("weight", weight, "S")
        same_device(gate, weight)
        if len(weight) != len(gate):
            raise ValueError(f"weight holds {len(weight)} numbers, but gate has {len(gate)} rows: give one for each")
    return operators.swiglu_quantize(gate, up, weight, pow2)


def quantize_e5m6(x: Float[Tensor, "*n K"]) -> tuple[UInt8[Tensor, "*n packed"], Float[Tensor, "*n tiles"]]:
    """The 12-bit format for the input of the projection after attention: 1×128 tiles, power-of-two scales, two codes in
    three bytes. The scale brings the tile's largest magnitude to at most E4M3's 448, as for E4M3."""
    check_source("x", x, "*n K")
    flat = _merged(x, 1).float()
    _, scale = operators.quantize_rows(flat, True)
    wide = scale.repeat_interleave(TILE, 1)[:, : flat.shape[1]]
    packed = pack12(E5M6.encode(flat / wide))
    return packed.view(*x.shape[:-1], packed.shape[-1]), scale.view(*x.shape[:-1], scale.shape[-1])


def dequantize_e5m6(
    packed: UInt8[Tensor, "*n packed"], scale: Float[Tensor, "*n tiles"], K: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*n K"]:
    """Back from `quantize_e5m6`, K values a row."""
    check_axes("packed", packed, "*n bytes")
    check_codes("packed", packed, scale, (*packed.shape[:-1], tiles(K)), torch.uint8)
    values = E5M6.decode(unpack12(packed, K))
    return values.mul_(scale.repeat_interleave(TILE, -1)[..., :K]).to(dtype)


# Checks --------------------------------------------------------------------------------------------------------------
def check_axes(name: str, x: Tensor, axes: str) -> None:
    """Raises ValueError unless x has these axes, "N K"; a first one with a star stands for any number of axes."""
    named = axes.split()
    enough = x.dim() >= len(named) - 1 if named[0][0] == "*" else x.dim() == len(named)
    if not enough:
        raise ValueError(f"{name} has the shape {list(x.shape)}, expected [{', '.join(named)}]")


def check_source(name: str, x: Tensor, axes: str) -> None:
    """Raises ValueError unless x has these axes (as for `check_axes`) and can be quantised."""
    check_axes(name, x, axes)
    if x.dtype not in SOURCES:
        raise ValueError(f"{name} is {x.dtype}, but FP8 is made from float32, bfloat16 or float16: call {name}.float()")


def check_codes(
    name: str, codes: Tensor, scale: Tensor, expected: tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn
) -> None:
    """Raises ValueError unless `codes` are of `dtype`, and `scale` is fp32, of the expected shape, on that device."""
    if codes.dtype != dtype:
        raise ValueError(f"{name} is {codes.dtype}, expected {dtype}: quantise it first")
    if scale.dtype != torch.float32:
        raise ValueError(f"the scale of {name} is {scale.dtype}, expected torch.float32")
    if tuple(scale.shape) != tuple(expected):
        raise ValueError(
            f"the scale of {name} {list(codes.shape)} is {list(scale.shape)}, expected {list(expected)}: one for every "
            f"tile of {TILE}, the last tile of an axis may be short"
        )
    same_device(codes, scale)


def check_counts(counts: Tensor | None, rows: int | None, device: torch.device) -> None:
    """Raises ValueError unless counts are integers on this device, none negative, that sum to `rows` (if it is given).
    Their values are looked at only where they are `at_hand`."""
    if counts is None:
        return
    if counts.dtype not in (torch.int32, torch.int64) or counts.dim() != 1:
        raise ValueError(f"counts is {counts.dtype} {list(counts.shape)}, expected int32 or int64 [E]")
    if counts.device != device:
        raise ValueError(f"counts is on {counts.device}, but the rows it counts are on {device}: move one of them")
    if not at_hand(counts):
        return
    if bool((counts < 0).any()):
        raise ValueError(f"counts {counts.tolist()} must not be negative")
    if rows is not None and int(counts.sum()) != rows:
        raise ValueError(f"counts {counts.tolist()} do not sum to the {rows} rows they describe")


def at_hand(counts: Tensor) -> bool:
    """Whether a check can look at the values: on a GPU that would stall it, and `torch.compile` has none yet."""
    return counts.device.type == "cpu" and not torch.compiler.is_compiling()


def same_device(*tensors: Tensor) -> None:
    """Raises ValueError unless all are on one device."""
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on different devices ({', '.join(sorted(devices))}): move them to one")


def _merged(x: Tensor, keep: int) -> Tensor:
    """x with its axes before the last `keep` as one, of size 1 if there are none. (`reshape(-1, …)` can't without
    elements.)"""
    return x.flatten(0, -keep - 1) if x.dim() > keep else x[None]
