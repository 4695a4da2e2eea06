"""Checkpoints of a run: whole or not there at all, checked before they are trusted, and the last few kept.

    RUN/checkpoints/step-00000200/    .metadata and *.distcp (torch.distributed.checkpoint), state.json
    RUN/checkpoints/.saving-…         one being written; it gets its name, by a rename, when every byte is on disk

There is no "latest" pointer that could disagree with the folders: the latest is the one with the highest step.
`state.json` holds everything that is not a tensor, and the size and SHA-256 of every other file.

**Whose files.** Run folders are for your own machine: torch.distributed.checkpoint keeps its table of contents
(`.metadata`) as a pickle, and a pickle can run code when it is read. We read it with an unpickler that knows nothing
but that table's own classes, and the tensors with `weights_only`, so a foreign folder is refused rather than run; to
hand weights to somebody, use `interop.save_pretrained` (safetensors) all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dsv3_book.parallel import DataParallel

FORMAT = 1
STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    parallel: DataParallel,
    keep: int = 2,
) -> Path:
    """Writes checkpoint `step` under `folder`, from all processes at once, and deletes all but the newest `keep`.

    tensors: by name; those that several processes hold alike are written once.  state: JSON-able, the same everywhere.
    A crash at any moment leaves the checkpoints before it as they were.
    """
    place, work = folder / name_of(step), folder / f".saving-{name_of(step)}"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*-step-*"):
            shutil.rmtree(leftover)
        work.mkdir()

    def finish() -> None:
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(work.iterdir())}
        _write(work / STATE, json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1))
        if place.exists():  # an unusable one of the same step: what replaces it is complete
            os.rename(place, folder / f".old-{place.name}")
        os.rename(work, place)
        _sync(folder)
        for old in [*folder.glob(".old-*"), *(path for _, path in found(folder)[keep:])]:
            shutil.rmtree(old)

    parallel.first(begin)
    with _quiet():
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(work),
            process_group=parallel.group,
            no_dist=parallel.size == 1,
        )
    parallel.first(finish)
    return place


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints under `folder`, newest first."""
    paths = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(((int(p.name[5:]), p) for p in paths), reverse=True)


def latest(folder: Path, say: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None if there is none at all. Says which ones it passes over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for step, path in found(folder):
        try:
            state = check(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"warning: {problem}")
        if problems:
            say(f"warning: falling back to the checkpoint of step {step}")
        return path, state
    if problems:
        raise CheckpointError(
            f"no usable checkpoint in {folder}: {'; '.join(problems)}. Restore one from a copy, or delete {folder} to "
            "start the run again"
        )
    return None


def check(path: Path) -> dict[str, Any]:
    """The state of the checkpoint at `path`, once every file is seen to have the size and SHA-256 it was saved with.

    Raises:
        CheckpointError: a file is missing, cut short or altered, naming it.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {state['format']}, this version of dsv3_book reads {FORMAT}")
        files = dict(state["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path / STATE} is missing: the checkpoint is not complete") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path / STATE} is damaged: it is not the JSON that was saved") from None
    for name, known in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != known["bytes"]:
            raise CheckpointError(f"{file} is truncated: {file.stat().st_size:,} bytes, {known['bytes']:,} were saved")
        if sha256(file) != known["sha256"]:
            raise CheckpointError(f"{file} is corrupt: its checksum is not the one it was saved with")
    return state


def load(path: Path, tensors: Mapping[str, Tensor], parallel: DataParallel | None = None) -> None:
    """Fills `tensors` in place from the checkpoint at `path` (which `check` has passed).

    Raises:
        CheckpointError: a name the checkpoint lacks, or a tensor of another shape or dtype, listing them. (torch would
            convert silently.)
    """
    parallel = parallel or DataParallel()
    reader = _Reader(path)
    known = reader.table()
    missing = sorted(set(tensors) - set(known))
    shapes = [
        f"{name} {tuple(known[name].size)} (here {tuple(t.shape)})"
        for name, t in tensors.items()
        if name in known and tuple(known[name].size) != tuple(t.shape)
    ]
    types = [
        f"{name} {known[name].properties.dtype} (here {t.dtype})"
        for name, t in tensors.items()
        if name in known and known[name].properties.dtype != t.dtype
    ]
    if missing or shapes or types:
        raise CheckpointError(
            f"{path} does not fit: missing {missing or 'nothing'}; other shapes: {shapes or 'none'}; other dtypes: "
            f"{types or 'none'}"
        )
    with _quiet():
        dcp.load(dict(tensors), storage_reader=reader, process_group=parallel.group, no_dist=parallel.size == 1)


def names(path: Path) -> set[str]:
    """Names of the tensors in the checkpoint at `path`."""
    return set(_Reader(path).table())


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "name: before → now" of every setting that differs, groups written with a dot."""
    lines = []
    for key in sorted({*before, *now}):
        a, b = before.get(key, "absent"), now.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} → {b}")
    return lines


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's table of contents, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        table = module == "torch.distributed.checkpoint.metadata"
        storage = (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        layout = (module, name) == ("torch.serialization", "_get_layout")
        path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")
        value = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if (table and "." not in name) or storage or layout or path or value:
            return super().find_class(module, name)
        raise CheckpointError(f"the checkpoint's .metadata names {module}.{name}, which has no place there: refused")


class _Reader(dcp.FileSystemReader):
    """torch's reader with the careful unpickler; refuses entries that are not tensors, which torch would unpickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{file} is damaged ({error})") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{file} holds no checkpoint's table of contents")
        strange = [k for k, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
        if strange:
            raise CheckpointError(f"{file} lists entries that are not tensors: {strange[:5]}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def table(self) -> dict[str, TensorStorageMetadata]:
        """Name, shape and place of every tensor."""
        entries = self.read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def _quiet() -> Iterator[None]:
    """One process needs no process group; torch would warn of it every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut (where the system can)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
