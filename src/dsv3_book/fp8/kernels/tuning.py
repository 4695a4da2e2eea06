"""How the products are launched: tile shapes to choose from, TMA descriptors, and how many programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3_book.fp8.kernels import loops  # noqa: F401
from dsv3_book.fp8.kernels.casts import INTERPRETED
from dsv3_book.fp8.kernels.launch import TILE

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory a program can have on Hopper."""

BAND = 8
"""Tiles down before the next column of tiles: see `contract.place`."""


def config(
    block_m: int, block_n: int, stages: int, warps: int = 4, wide: bool = False, specialised: bool = False
) -> triton.Config:
    """One candidate: its tile (block_m rows, block_n or, wide, twice block_n columns) and how it is computed."""
    shape = {"BLOCK_M": block_m, "BLOCK_N": block_n, "WIDE": wide, "SPECIALISED": specialised}
    return triton.Config(shape, num_stages=stages, num_warps=warps, pre_hook=set_descriptor_blocks)


def set_descriptor_blocks(arguments: dict[str, Any]) -> None:
    """The copy engine's tile is part of a descriptor, so it is set once the tile's shape is known."""
    arguments["a_tma"].block_shape = [arguments["BLOCK_M"], TILE]
    arguments["b_tma"].block_shape = [arguments["BLOCK_N"], TILE]


# Found by compiling for sm_90 and reading registers, spills and waits (`compiled` prints them; a test keeps watch). A
# group of four warps has 232 registers a thread once specialised: two sums of 64×128 take 128, one partial sum 64.
CONFIGS = (
    config(128, 128, 3, wide=True, specialised=True),  # 128×256: least traffic from L2 for each multiplication
    config(128, 128, 4, specialised=True),
    config(128, 128, 5, specialised=True),
    config(128, 128, 4, warps=8),
    config(64, 128, 3),  # two programs on an SM
    config(64, 128, 4),
    config(64, 64, 6),
)
INTERPRETED_CONFIG = config(64, 64, 1)

# What we expect of them on an H200 (4.8 TB/s, 1979 TFLOP/s, 132 SMs), written down before any measurement. At M = 4096
# with tiles of 128×256: tensor cores busy 85 % of the time at 1.6 GHz, tiles brought from L2 at 7.5 TB/s in all,
# results written at 4.8 TB/s while nobody multiplies, rounds of 132 tiles. At M = 64: 70 % of the bandwidth and 4 µs.
#
#         N × K       M = 4096: floor   expected     TFLOP/s  tiles' rounds    M = 64: floor   expected
#      2112 × 7168         63 µs         152 µs         820     3, 73 % full         3 µs         9 µs
#     24576 × 1536        156 µs         301 µs        1030    24, 97 %              9 µs        16 µs
#     32768 × 512          69 µs         180 µs         760    32, 97 %              4 µs        10 µs
#      7168 × 16384       486 µs         790 µs        1220     7, 97 %             25 µs        40 µs
#      4096 × 7168        122 µs         203 µs        1190     4, 97 %              6 µs        13 µs
#      7168 × 2048         61 µs         112 µs        1070     7, 97 %              3 µs         9 µs
#
# Floors: FLOPs / peak at M = 4096, bytes / bandwidth at 64. From L2, a tile of 128×128 takes 32 KB for 4.2 MFLOP, at
# most about 960 TFLOP/s; 128×256 takes 24 KB for as much work, at most about 1280. (Sending a tile to two SMs at once,
# as CUDA code does, is not to be had from Triton here: num_ctas = 2 compiled to no multicast.)


def shared_bytes(candidate: triton.Config, out_bytes: int) -> int:
    """What a candidate needs: the tiles on their way, one tile on its way out, some barriers."""
    shape = candidate.kwargs
    width = shape["BLOCK_N"] * (2 if shape["WIDE"] else 1)
    loads = candidate.num_stages * (shape["BLOCK_M"] + width) * TILE
    return loads + shape["BLOCK_M"] * shape["BLOCK_N"] * out_bytes + 1024


def possible(candidate: triton.Config, by_blocks: bool, out_bytes: int) -> bool:
    """Does it fit in shared memory, and in registers? Twice as wide does only with one scale for 128 columns of B, not
    one each, and with a result of two bytes, which leaves through half as many."""
    wide_fits = by_blocks and out_bytes == 2
    return shared_bytes(candidate, out_bytes) <= SHARED_MEMORY and (wide_fits or not candidate.kwargs["WIDE"])


def worth_measuring(configs: Sequence[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
    """The candidates that are possible, without rows of tiles mostly empty, or tiles small without need."""
    arguments = {**arguments, **more}
    rows, c = arguments["size_class"], arguments["c"]
    hopper = torch.cuda.get_device_capability(c.device)[0] == 9

    def worth(candidate: triton.Config) -> bool:
        shape = candidate.kwargs
        too_high = rows <= 64 < shape["BLOCK_M"]
        too_small = rows > 512 and shape["BLOCK_N"] < 128
        unknown = shape["SPECIALISED"] and not hopper  # splitting was looked at on Hopper only
        fits = possible(candidate, arguments["B_BLOCKS"], c.element_size())
        return fits and not too_high and not too_small and not unknown

    return [candidate for candidate in configs if worth(candidate)]


def autotuned(kernel: Any) -> Any:
    """Measures the candidates on the first call of each size class and shape, and remembers the fastest."""
    configs = [INTERPRETED_CONFIG] if INTERPRETED else list(CONFIGS)
    keys = [name for name in ("size_class", "N", "K", "E", "B_BLOCKS", "SPLITS") if name in kernel.arg_names]
    prune = {} if INTERPRETED else {"early_config_prune": worth_measuring}
    return triton.autotune(configs, keys, prune_configs_by=prune)(kernel)


def size_class(rows: int) -> int:
    """Rows up to the next power of two: batches that differ by a token don't measure again."""
    return max(triton.next_power_of_2(rows), 16)


def for_tma(x: Tensor) -> Tensor:
    """x [rows, K] with rows that start at multiples of 16 bytes, as TMA needs: itself, or else a copy with room behind
    its rows. Only sizes that are no multiple of 16 are copied: tokens for Wgrad, hardly ever a model's widths."""
    if x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    rows, K = x.shape
    padded = torch.empty(rows, K + -K % 16, dtype=x.dtype, device=x.device)[:, :K]
    padded.view(torch.uint8).copy_(x.view(torch.uint8))
    return padded


def descriptor(x: Tensor) -> TensorDescriptor:
    """A TMA descriptor of x; `set_descriptor_blocks` sets its tile."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [TILE, TILE])


def allocate_descriptors() -> None:
    """Kernels that make descriptors themselves need a little memory for them on the device: torch gives it."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter, so that persistent loops and split sums are exercised there."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def per_processor(shape: dict[str, Any]) -> int:
    """Programs of this tile shape that fit on an SM together."""
    return 2 if shape["BLOCK_M"] <= 64 else 1


def programs(device: torch.device, units: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], tuple[int]]:
    """A grid of as many programs as run at once, or as there are units of work."""
    return lambda shape: (min(units(shape), processors(device) * per_processor(shape)),)


def width(shape: dict[str, Any]) -> int:
    """Columns of a tile."""
    return shape["BLOCK_N"] * (2 if shape["WIDE"] else 1)


def split_count(M: int, N: int, K: int, device: torch.device) -> int:
    """Into how many parts to cut K so that a product with few tiles (small M) still occupies every SM.

    It depends on the shape and the GPU, not on what autotuning chose, so neither do the result's last bits.
    """
    tiles = triton.cdiv(M, 64 if M <= 64 else 128) * triton.cdiv(N, TILE)
    wanted = min(2 * processors(device) // tiles, triton.cdiv(K, TILE) // 4, 8)
    return 1 << max(wanted, 1).bit_length() - 1
