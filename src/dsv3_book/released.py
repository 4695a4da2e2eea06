"""The released form of a checkpoint: which names its tensors have, and which files hold them.

Our parameters already carry the released names, so only three things differ: the files say "model." in front, they hold
every expert apart where we stack them, and each MTP layer in them carries its own copy of the embedding and the head,
which in our model are simply shared.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_STACKED = re.compile(r"\.experts\.(gate|up|down)_proj$")


def released_names(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """Every tensor of the released files that `model` has a place for: released name → (our name, row or None).

    A row is the expert's number in a stacked parameter. The MTP layers' copies of embedding and head aren't here:
    they are a second name for what is (`mtp_copies`).
    """
    names: dict[str, tuple[str, int | None]] = {}
    for ours, tensor in tensors_of(model).items():
        theirs = ours if ours.startswith("lm_head.") else f"model.{ours}"
        if _STACKED.search(ours):
            stem, _, matrix = theirs.rpartition(".")
            names |= {f"{stem}.{e}.{matrix}.weight": (ours, e) for e in range(tensor.shape[0])}
        else:
            names[theirs] = (ours, None)
    return names


def mtp_copies(cfg: ModelConfig) -> dict[str, str]:
    """The second names that a released checkpoint gives embedding and head in every MTP layer: copy → original."""
    copies = {}
    for layer in range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def released_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the released form of `model`, copies included. Works on the meta device."""
    tensors, names = tensors_of(model), released_names(model)
    shapes = {n: tuple(tensors[ours].shape[0 if row is None else 1 :]) for n, (ours, row) in names.items()}
    return shapes | {copy: shapes[original] for copy, original in mtp_copies(model.cfg).items()}


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and saved buffers (the routing biases), detached."""
    return dict(model.state_dict())


# Files ---------------------------------------------------------------------------------------------------------------
def weight_files(directory: Path) -> list[Path]:
    """The safetensors files to read, checked to exist."""
    if (index := directory / INDEX).is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in shards if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}): fetch or save the checkpoint again") from None
        if outside:
            raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
        if missing := [name for name in shards if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory} lacks {some(missing)}, which {INDEX} names: fetch the rest of it")
        return [directory / name for name in shards]
    if (single := directory / SINGLE).is_file():
        return [single]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise ValueError(
            f"{directory} holds its weights as {some(pickles)}: pickle files can run any code when loaded and are not "
            "read; convert them to safetensors"
        )
    raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}: is it a released-format checkpoint?")


Header = dict[str, tuple[tuple[int, ...], str]]


def header(path: Path) -> Header:
    """Shape and dtype of every tensor in a file, without reading their values."""
    with open_file(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def read(file: Any, name: str, path: Path) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is corrupt or cut short ({error}): fetch or save this file again")


def some(names: list[str], most: int = 12) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
