"""Released checkpoints, in and out: a folder of safetensors files and a `config.json`.

Nothing here unpickles: `*.bin`, `*.pt` and `*.pth` can run code when they are loaded, and are refused by name.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.fill import fill, weight
from dsv3_book.fp8 import quantize_weight
from dsv3_book.model import Transformer
from dsv3_book.released import (
    CONFIG,
    FP8,
    INDEX,
    QUANTIZATION,
    SCALE,
    SINGLE,
    Header,
    check_quantization,
    header,
    in_fp8,
    mtp_copies,
    open_file,
    read,
    released_names,
    released_shapes,
    replacing,
    scale_shape,
    some,
    split_scales,
    tensors_of,
    weight_files,
    write_json,
)

__all__ = ["fill", "load_pretrained", "save_pretrained"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, FP8: torch.bfloat16}  # what a model holds for each


# Loading -------------------------------------------------------------------------------------------------------------
def load_pretrained(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    mtp: bool = True,
) -> Transformer:
    """The model in a released-format folder, read tensor by tensor: at its peak it holds the model and one shard.

    FP8 weights become code · scale, computed in fp32.

    Args:
        directory: with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
        dtype: of the parameters: fp32 to train on, or None for what each tensor has in the file (fp32 or bf16; bf16
            where it has FP8). Routing biases are always fp32.
        compute_dtype: of activations; None for that of the embedding.
        mtp: False leaves out the MTP modules, for folders that lack them (transformers drops them when it saves).

    Raises:
        FileNotFoundError: no such folder, no config, no weights, or a shard that the index names.
        ValueError: a damaged file (named); missing, unknown or wrongly shaped tensors, FP8 weights and
            scales that do not belong together (all listed in one error); another quantisation than the released one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder: give one that holds {CONFIG} and safetensors files")
    cfg = ModelConfig.from_hf(directory)
    skipped = set()
    if not mtp:
        skipped = {f"model.layers.{cfg.num_hidden_layers + j}." for j in range(cfg.num_nextn_predict_layers)}
        cfg = cfg.replace(num_nextn_predict_layers=0)
    model = Transformer(cfg, device="meta")
    files = weight_files(directory)
    check_quantization(directory)
    found, scales = split_scales({path: header(path) for path in files})
    _check_names(model, directory, found, skipped)

    names, copies, state = released_names(model), mtp_copies(cfg), tensors_of(model)
    kinds = _kinds(names, found, dtype)
    loaded: dict[str, Tensor] = {}
    for path in files:
        with open_file(path) as file:
            for name in found[path].keys() & names.keys():
                ours, row = names[name]
                if ours not in loaded:
                    loaded[ours] = torch.empty(state[ours].shape, dtype=kinds[ours])
                place = loaded[ours] if row is None else loaded[ours][row]
                place.copy_(weight(file, name, path, scales))
    for ours, tensor in loaded.items():
        _assign(model, ours, tensor)
    _check_copies(model, found, copies)
    model.compute_dtype = compute_dtype or model.embed_tokens.weight.dtype
    return model


def _kinds(
    names: dict[str, tuple[str, int | None]], found: dict[Path, Header], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Our dtype for each of our tensors: the file's, unless `dtype` says otherwise; the widest where experts differ."""
    kinds: dict[str, torch.dtype] = {}
    for tensors in found.values():
        for name in tensors.keys() & names.keys():
            ours, stored = names[name][0], _DTYPES[tensors[name][1]]
            kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype or stored
            kinds[ours] = torch.promote_types(kind, kinds.get(ours, kind))
    return kinds


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _check_names(model: Transformer, directory: Path, found: dict[Path, Header], skipped: set[str]) -> None:
    """One error for everything that does not fit, so that nobody repairs a checkpoint one tensor at a time."""
    expected = released_shapes(model)
    optional = mtp_copies(model.cfg)
    given: dict[str, tuple[int, ...]] = {}
    twice = []
    for tensors in found.values():
        twice += [name for name in tensors if name in given]
        given |= {name: shape for name, (shape, _) in tensors.items() if not name.startswith(tuple(skipped))}
    missing = [name for name in expected if name not in given and name not in optional]
    unknown = [name for name in given if name not in expected]
    shapes = [
        f"{name} is {list(given[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of the wrong shape": shapes, "in two files": twice}
    if not any(problems.values()):
        return
    lines = [f"  {len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    advice = f"Is {CONFIG} that of these weights?"
    mtp_layer = f"model.layers.{model.cfg.num_hidden_layers}."
    if model.cfg.num_nextn_predict_layers and missing and all(name.startswith(mtp_layer) for name in missing):
        advice = "Only MTP's are missing (transformers drops them when it saves): load with mtp=False."
    raise ValueError("\n".join([f"the tensors in {directory} do not fit its {CONFIG}:", *lines, advice]))


def _check_copies(model: Transformer, found: dict[Path, Header], copies: dict[str, str]) -> None:
    """Our MTP modules share embedding and head; a checkpoint that would need them apart must not load silently."""
    originals = {"model.embed_tokens.weight": model.embed_tokens.weight, "lm_head.weight": model.lm_head.weight}
    for path, tensors in found.items():
        with open_file(path) as file:
            for copy in copies.keys() & tensors.keys():
                original = originals[copies[copy]]
                if not torch.equal(read(file, copy, path).to(original.dtype), original):
                    raise ValueError(
                        f"{path}: {copy} differs from {copies[copy]}, but the MTP modules share the main model's "
                        "embedding and head; this checkpoint cannot be represented"
                    )


# Saving --------------------------------------------------------------------------------------------------------------
def save_pretrained(
    model: Transformer,
    directory: str | os.PathLike[str],
    fp8: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes `model` in the released form, which transformers and the serving engines read.

    The MTP layers get their copies of embedding and head, as readers of released files expect. Everything is written
    to a folder beside `directory` first and then renamed into place: what stood there stays whole until the new
    checkpoint is, and other files in it (`tokenizer.json`) are kept.

    Args:
        model: the whole model, not a pipeline stage.
        directory: where to; created if missing.
        fp8: as V3 was released: attention's and the feed-forward networks' matrices as E4M3 codes with an fp32 scale
            (`weight_scale_inv`) for every block of 128×128; the rest in bf16, unless `dtype` says fp32.
        dtype: fp32 or bf16 for every weight that is not in FP8; None keeps each as it is. Routing biases are always
            fp32.
        shard_bytes: above this size the weights are split into several files with an index.
        tokenizer: a `tokenizer.json` to copy along.

    Raises:
        ValueError: another `dtype`, a stage of a model, or a path that is not a folder.
        FileNotFoundError: no such tokenizer.
    """
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"cannot save as {dtype}: choose torch.bfloat16, torch.float32 or None")
    if model.part.layers != range(model.cfg.num_hidden_layers) or not (model.part.embed and model.part.head):
        raise ValueError("this model is one stage of a pipeline: gather the stages before saving")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise FileNotFoundError(f"tokenizer {tokenizer} does not exist")
    views = _released_views(model)
    codes = {name for name in views if fp8 and in_fp8(name)}
    dtype = torch.bfloat16 if fp8 and dtype is None else dtype
    sizes = {
        n: _bytes(view.shape) if n in codes else view.numel() * _kind(n, view, dtype).itemsize
        for n, view in views.items()
    }
    with replacing(Path(directory)) as folder:
        shards = _plan(sizes, shard_bytes)
        weight_map: dict[str, str] = {}
        for file, names in shards.items():
            shard: dict[str, Tensor] = {}
            for n in names:
                if n in codes:
                    shard[n], shard[n + SCALE] = (t.cpu() for t in quantize_weight(views[n]))
                else:  # a copy, because safetensors refuses names that share memory, as the MTP layers' do
                    shard[n] = views[n].to("cpu", _kind(n, views[n], dtype), copy=True).contiguous()
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        config = model.cfg.to_hf() | {"torch_dtype": str(dtype or views["lm_head.weight"].dtype).removeprefix("torch.")}
        write_json(folder / CONFIG, config | ({"quantization_config": QUANTIZATION} if fp8 else {}))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _released_views(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the released form, copies included, as a view of the model's memory."""
    tensors = tensors_of(model)
    views = {
        n: tensors[ours] if row is None else tensors[ours][row] for n, (ours, row) in released_names(model).items()
    }
    return views | {copy: views[original] for copy, original in mtp_copies(model.cfg).items()}


def _bytes(shape: tuple[int, ...]) -> int:
    """Of a weight in FP8: a byte a code, four a scale."""
    return math.prod(shape) + 4 * math.prod(scale_shape(shape))


def _kind(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype or tensor.dtype


def _plan(sizes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File → its tensors: as many as fit into `shard_bytes`, and always at least one."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}
