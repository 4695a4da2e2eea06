"""Weights from a folder in the released format into whatever a rank holds: a stage's layers, a range of the experts.

Nobody reads more than the tensors that it has a place for, one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_book.fp8 import dequantize_weight
from dsv3_book.released import (
    CONFIG,
    SCALE,
    STACKED,
    Header,
    Scales,
    check_quantization,
    header,
    open_file,
    read,
    some,
    split_scales,
    weight_files,
)
from dsv3_book.slab import Slab, Value, slabs

_COPIES = {"embed_tokens.weight": ".embed_tokens.weight", "lm_head.weight": ".shared_head.head.weight"}  # of MTP layers


@torch.no_grad()
def fill(values: Mapping[str, Value], directory: str | os.PathLike[str]) -> None:
    """Fills parameters and routing biases in place, by our names, from a released-format folder.

    values: whole tensors and boxes, of a model's `state_dict` ("layers.3.mlp.experts.gate_proj": [E, F, D], or some
        experts of it); each keeps its dtype. FP8 weights become code · scale, computed in fp32.

    Raises:
        FileNotFoundError: no such folder, no config, no weights.
        ValueError: a damaged file; tensors that the folder lacks or has in another shape, all listed in one error; an
            MTP layer's copy of the embedding or head that differs from it.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: give a folder in the released format")
    check_quantization(directory)
    found, scales = split_scales({path: header(path) for path in weight_files(directory)})
    at = {name: path for path, tensors in found.items() for name in tensors}
    _require_fit(values, {name: shape for tensors in found.values() for name, (shape, _) in tensors.items()}, directory)
    wanted = [piece for name, value in values.items() for slab in slabs(value) for piece in _pieces(name, slab)]
    for path in found:
        mine = [(name, box, place) for name, box, place in wanted if at[name] == path]
        if not mine:
            continue
        with open_file(path) as file:
            for name, box, place in mine:
                place.copy_(weight(file, name, path, scales)[box])
    _check_copies(values, found)


Box = tuple[slice, ...]


def _pieces(name: str, slab: Slab) -> list[tuple[str, Box, Tensor]]:
    """(released name, part of it, where it goes) of everything in a box."""
    box = tuple(slice(o, o + n) for o, n in zip(slab.offset, slab.tensor.shape, strict=True))
    if STACKED.search(name):
        return [
            (_released(name, slab.offset[0] + row), box[1:], slab.tensor[row]) for row in range(slab.tensor.shape[0])
        ]
    return [(_released(name), box, slab.tensor)]


def _released(name: str, expert: int | None = None) -> str:
    """The released name of what we call `name`."""
    theirs = name if name.startswith("lm_head.") else f"model.{name}"
    if expert is None:
        return theirs
    stem, _, matrix = theirs.rpartition(".")
    return f"{stem}.{expert}.{matrix}.weight"


def _require_fit(values: Mapping[str, Value], given: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """One error for everything that is missing or of another shape."""
    missing, shapes = [], []
    for name, slab in ((name, slab) for name, value in values.items() for slab in slabs(value)):
        stacked = STACKED.search(name) is not None
        shape = tuple(slab.shape[1:]) if stacked else tuple(slab.shape)
        for theirs, _, _ in _pieces(name, slab):
            if theirs not in given:
                missing.append(theirs)
            elif given[theirs] != shape:
                shapes.append(f"{theirs} is {list(given[theirs])}, not {list(shape)}")
        if stacked and _released(name, slab.shape[0]) in given:
            shapes.append(f"{name} has more than {slab.shape[0]} experts")
    if not missing and not shapes:
        return
    problems = {"missing": missing, "of the wrong shape": list(dict.fromkeys(shapes))}
    lines = [f"  {len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    raise ValueError(
        "\n".join([f"{directory} does not fit this model:", *lines, f"Give the model the settings of its {CONFIG}."])
    )


def _check_copies(values: Mapping[str, Value], found: Mapping[Path, Header]) -> None:
    """Our MTP modules share embedding and head; weights that would need them apart must not load silently."""
    for ours, ending in _COPIES.items():
        for slab in slabs(values[ours]) if ours in values else []:
            for path, tensors in found.items():
                for copy in [n for n in tensors if n.startswith("model.layers.") and n.endswith(ending)]:
                    ((_, box, _),) = _pieces(ours, slab)
                    with open_file(path) as file:
                        if not torch.equal(read(file, copy, path)[box].to(slab.tensor), slab.tensor):
                            raise ValueError(f"{path}: {copy} differs from {ours}, which the MTP modules share here")


def weight(file: Any, name: str, path: Path, scales: Scales) -> Tensor:
    """A tensor of an open file; of an FP8 weight, code · scale."""
    if name not in scales:
        return read(file, name, path)
    where = scales[name][0]
    if where == path:
        return dequantize_weight(read(file, name, path), read(file, name + SCALE, path))
    with open_file(where) as other:  # where a folder was cut up otherwise
        return dequantize_weight(read(file, name, path), read(other, name + SCALE, where))
