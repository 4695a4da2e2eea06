"""The released form of a checkpoint: which names its tensors have, and which files hold them.

Our parameters already carry the released names, so only three things differ: the files say "model." in front, they hold
every expert apart where we stack them, and each MTP layer in them carries its own copy of the embedding and the head,
which in our model are simply shared. And the released weights are in FP8: the matrices that train in FP8 (report §3.3)
are E4M3 codes, each with an fp32 matrix of scales beside it, one for every block of 128×128, by which the codes are
*multiplied* (the name, `weight_scale_inv`, says the reverse).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OURS = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors")
STACKED = re.compile(r"\.experts\.(gate|up|down)_proj$")

FP8, SCALE, BLOCK = "F8_E4M3", "_scale_inv", 128
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK] * 2}
_IN_FP8 = re.compile(r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|(gate|up|down)_proj)\.weight$")


def released_names(model: Transformer) -> dict[str, tuple[str, int | None]]:
    """Every tensor of the released files that `model` has a place for: released name → (our name, row or None).

    A row is the expert's number in a stacked parameter. The MTP layers' copies of embedding and head aren't here:
    they are a second name for what is (`mtp_copies`).
    """
    names: dict[str, tuple[str, int | None]] = {}
    for ours, tensor in tensors_of(model).items():
        theirs = ours if ours.startswith("lm_head.") else f"model.{ours}"
        if STACKED.search(ours):
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


def in_fp8(name: str) -> bool:
    """Whether the released files hold this weight in FP8: projections of attention and of feed-forward networks, and
    not the embedding, head, norms, the router (`mlp.gate`), or MTP's `eh_proj`."""
    return _IN_FP8.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight: one for every block, the last of an axis may be short."""
    return tuple(-(-n // BLOCK) for n in shape)


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


def check_quantization(directory: Path) -> None:
    """Raises ValueError if the folder's config names another quantisation than the released one."""
    given = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("quantization_config")
    known = {key: QUANTIZATION[key] for key in ("quant_method", "fmt", "weight_block_size")}
    if given and (other := {key: given[key] for key, value in known.items() if given.get(key, value) != value}):
        raise ValueError(f"{directory / CONFIG} has quantization_config {other}; only {known} can be read")


Scales = dict[str, tuple[Path, tuple[int, ...], str]]


def split_scales(found: dict[Path, Header]) -> tuple[dict[Path, Header], Scales]:
    """The files' tensors without the scales; and the scales by their weight's name: file, shape and dtype.

    Raises:
        ValueError: an FP8 weight without its scales, scales without their FP8 weight, scales of a wrong shape or dtype,
            or weights of a dtype we don't read, all listed in one error.
    """
    weights: dict[Path, Header] = {path: {} for path in found}
    scales: Scales = {}
    alone, missing, wrong = [], [], []
    for path, tensors in found.items():
        for name, (shape, dtype) in tensors.items():
            if name.endswith(f".weight{SCALE}"):
                if name.removesuffix(SCALE) in scales:
                    wrong.append(f"{name} is in two files")
                scales[name.removesuffix(SCALE)] = path, shape, dtype
            else:
                weights[path][name] = shape, dtype
    kinds = {name: (shape, dtype) for tensors in weights.values() for name, (shape, dtype) in tensors.items()}
    for name, (shape, dtype) in kinds.items():
        if dtype not in (FP8, "F32", "BF16"):
            wrong.append(f"{name} is of type {dtype}; weights may be F32, BF16 or, with scales, {FP8}")
        elif dtype == FP8 and name not in scales:
            missing.append(name + SCALE)
        elif dtype == FP8 and scales[name][1:] != (scale_shape(shape), "F32"):
            _, given, kind = scales[name]
            wrong.append(
                f"{name}{SCALE} is {kind} {list(given)}, not F32 {list(scale_shape(shape))}, for a weight {list(shape)}"
            )
    alone = [f"{name}{SCALE}" for name in scales if kinds.get(name, (None, None))[1] != FP8]
    if not (alone or missing or wrong):
        return weights, scales
    lines = [f"  {len(missing)} FP8 weights lack their scales: {some(missing)}"] if missing else []
    lines += [f"  {len(alone)} scales without an FP8 weight: {some(alone)}"] if alone else []
    lines += [f"  {problem}" for problem in wrong[:12]]
    raise ValueError("\n".join(["the checkpoint cannot be read:", *lines]))


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


# Writing -------------------------------------------------------------------------------------------------------------
def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write to, which takes `target`'s place when the block ends well and vanishes when it doesn't.

    A folder cannot be exchanged in one step, so the old one steps aside for the moment between two renames; a crash in
    that moment leaves it beside, whole, as `.NAME.old`. Its other files move over to the new one.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: give a folder to save to")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.old"
    _settle(aside, target)  # in case an earlier save was cut between its renames
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        yield fresh
        if target.exists():
            target.rename(aside)
        fresh.rename(target)
        _settle(aside, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _settle(aside: Path, target: Path) -> None:
    """What stepped aside comes back if nothing took its place; else its other files move over and it goes."""
    if not aside.exists():
        return
    if not target.exists():
        aside.rename(target)
        return
    for entry in aside.iterdir():
        if not _OURS.fullmatch(entry.name) and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(aside)
