"""Checkpoints of a run: whole or not there at all, checked before they are trusted, and the last few kept.

    RUN/checkpoints/step-00000200/    .metadata and *.distcp (torch.distributed.checkpoint), state.json
    RUN/checkpoints/.saving-…         one being written; it gets its name, by a rename, when every byte is on disk
    RUN/checkpoints/.old-…            one that makes room for another of the same step, for the moment of that rename

There is no "latest" pointer that could disagree with the folders: the latest is the one with the highest step.
`state.json` holds everything that is not a tensor, and the size and SHA-256 of every other file.

Every rank gives the boxes that it holds, of whatever tensors (`slab.py`), and writes its share of them into one file;
loading fills boxes cut in any other way. Plans, files and table of contents are torch.distributed.checkpoint's; the
conversation between the ranks is ours (`parallel/together.py`), because its own loses on the way why a write failed.

Run folders are for your own machine (see `careful.py`); to hand weights to somebody, use `export` (safetensors).
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from dsv3_book.careful import CheckpointError, Reader
from dsv3_book.disk import facts_of, sha256, sync, why, write_text
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.together import Failed, together
from dsv3_book.slab import Place, Reading, Slab, Value, Writing, boxes_of, uncovered

__all__ = ["CheckpointError", "SaveError", "Slab", "check", "found", "latest", "load", "names", "save"]

FORMAT = 2  # 1: moments in their parameters' shape; no boxes
STATE = "state.json"
_FOLDER = re.compile(r"(\.old-)?step-(\d+)")


class SaveError(OSError):
    """A checkpoint that could not be saved. Says which rank failed where, why, and what to do; the same on all ranks.

    The checkpoints before it are as they were, and a later save can succeed.
    """


# Saving --------------------------------------------------------------------------------------------------------------
def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Value] | Callable[[], Mapping[str, Value]],
    state: Mapping[str, Any],
    parallel: DataParallel,
    keep: int = 2,
) -> Path:
    """Writes checkpoint `step` under `folder`, from all processes at once, and keeps the newest `keep` up to this one.

    tensors: by name, whole ones and boxes; those that several processes hold alike are written once. Or a function that
        gives them.  state: JSON-able, the same everywhere.
    A crash at any moment leaves the checkpoints before it as they were.

    Raises:
        SaveError: a rank cannot write its part, or the boxes of all ranks don't make up whole tensors; on every rank.
    """
    place, work = folder / name_of(step), folder / f".saving-{name_of(step)}"
    planner, writer = Writing(), FileSystemWriter(work, per_thread_copy_ahead=0)
    tables: list[Metadata] = []

    def plan() -> SavePlan:
        if parallel.rank == 0:
            _begin(folder, work)
        planner.set_up_planner(tensors() if callable(tensors) else tensors)
        return planner.create_local_plan()

    def divide(plans: list[SavePlan]) -> list[SavePlan]:
        shares, table = planner.create_global_plan(plans)
        tables.append(table)
        return writer.prepare_global_plan(shares)

    def write() -> tuple[list[Any], dict[str, Any]]:
        results = writer.write_data(share, planner).wait() if share.items else []
        return results, {name: facts_of(work / name) for name in {r.storage_data.relative_path for r in results}}

    def finish(written: list[tuple[list[Any], dict[str, Any]]]) -> list[None]:
        files = {name: facts for _, wrote in written for name, facts in sorted(wrote.items())}
        for name, facts in files.items():
            if not (work / name).is_file() or (work / name).stat().st_size != facts["bytes"]:
                raise FileNotFoundError(errno.ENOENT, "rank 0 does not see what another rank wrote", work / name)
        writer.finish(tables[0], [results for results, _ in written])
        files[".metadata"] = facts_of(work / ".metadata")
        write_text(work / STATE, json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1))
        _commit(work, place)
        past = [path for number, path in found(folder) if number <= step]  # later ones: damaged, or from before a fall
        for old in [*folder.glob(".old-*"), *past[keep:]]:
            shutil.rmtree(old, ignore_errors=True)  # what can't be removed is left to the next save
        return [None] * parallel.size

    mine = work / f"__{parallel.rank}_0.distcp"
    try:
        share: SavePlan = together(
            f"planning the checkpoint of step {step}", parallel, plan, divide, lambda e: why(e, folder)
        )
        together(f"writing the checkpoint of step {step}", parallel, write, finish, lambda e: why(e, mine))
    except RuntimeError as error:  # of a rank's part (Failed), or of the conversation
        if parallel.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        reason = _text(error, parallel)
        raise SaveError(f"the checkpoint of step {step} was not saved: {reason}. Earlier ones are untouched") from error
    return place


def _begin(folder: Path, work: Path) -> None:
    """Puts right what a crash left behind, and makes the folder to write to."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".old-step-*"):
        if not (folder / old.name.removeprefix(".old-")).exists():
            old.rename(folder / old.name.removeprefix(".old-"))
    for leftover in folder.glob(".*-step-*"):
        shutil.rmtree(leftover)
    work.mkdir()


def _commit(work: Path, place: Path) -> None:
    """The moment before which there is no checkpoint, and after which there is."""
    sync(work)
    if place.exists():  # one of the same step: what replaces it is complete
        place.rename(place.parent / f".old-{place.name}")
    work.rename(place)
    sync(place.parent)


def _text(error: RuntimeError, parallel: DataParallel) -> str:
    """An error's words; with one process, without its number."""
    return error.failures[0].text if isinstance(error, Failed) and parallel.size == 1 else str(error)


# Finding -------------------------------------------------------------------------------------------------------------
Seen = tuple[dict[str, Any], str]  # of a checkpoint: its state, or what is wrong with it


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints under `folder`, newest first."""
    paths = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    steps: dict[int, Path] = {}
    for name, path in sorted(paths.items(), reverse=True):  # "step-…" before ".old-step-…"
        if (match := _FOLDER.fullmatch(name)) and path.is_dir():
            steps.setdefault(int(match[2]), path)
    return sorted(steps.items(), reverse=True)


def latest(
    folder: Path, say: Callable[[str], None] = print, parallel: DataParallel | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None if there is none at all. Says which ones it passes over.

    parallel: processes that share the work and find the same; all must call it.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    parallel = parallel or DataParallel()
    for step, path in parallel.first(lambda: found(folder)):
        try:
            state = check(path, parallel)
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


def check(path: Path, parallel: DataParallel | None = None) -> dict[str, Any]:
    """The state of the checkpoint at `path`, once every file is seen to have the size and SHA-256 it was saved with.

    parallel: processes of which each looks at some of the files; all must call it.

    Raises, on all processes if on one:
        CheckpointError: a file is missing, cut short or altered, naming it; or it is of another version's format.
        OSError: a rank could not look. That is no damage, for which an older checkpoint would do.
    """
    parallel = parallel or DataParallel()

    def look() -> Seen:
        try:
            state = read_state(path)
            for name, known in list(state["files"].items())[parallel.rank :: parallel.size]:
                require_whole(path / name, known)
        except CheckpointError as error:
            return {}, str(error)
        return state, ""

    def agree(all_seen: list[Seen]) -> list[Seen]:
        return [next((one for one in all_seen if one[1]), all_seen[0])] * len(all_seen)

    try:
        seen: Seen = together(f"checking {path}", parallel, look, agree, _reason)
    except Failed as failed:
        raise OSError(f"can't check {path}: {_text(failed, parallel)}") from failed
    if seen[1]:
        raise CheckpointError(seen[1])
    return seen[0]


def read_state(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` holds besides tensors. Raises CheckpointError if it can't be read."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if (given := state["format"]) != FORMAT:
            age = "an older" if given < FORMAT else "a newer"
            raise CheckpointError(
                f"{path} has format {given}, of {age} version of dsv3_book, and this one reads {FORMAT}: go on with "
                "that version, or name another --out"
            )
        return {**state, "files": dict(state["files"])}
    except FileNotFoundError:
        raise CheckpointError(f"{path / STATE} is missing: the checkpoint is not complete") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path / STATE} is damaged: it is not the JSON that was saved") from None


def require_whole(file: Path, known: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the file has the size and SHA-256 that are `known` of it."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.stat().st_size != known["bytes"]:
        raise CheckpointError(f"{file} is truncated: {file.stat().st_size:,} bytes, {known['bytes']:,} were saved")
    if sha256(file) != known["sha256"]:
        raise CheckpointError(f"{file} is corrupt: its checksum is not the one it was saved with")


# Loading -------------------------------------------------------------------------------------------------------------
def load(path: Path, tensors: Mapping[str, Value], parallel: DataParallel | None = None) -> None:
    """Fills `tensors`, whole ones and boxes, in place from the checkpoint at `path` (which `check` has passed).

    Raises, on all processes if on one:
        CheckpointError: a name the checkpoint lacks, a tensor of another shape or dtype, or a part that no file holds,
            listing them. (torch would convert dtypes, and leave gaps, silently.)
    """
    parallel = parallel or DataParallel()

    def read() -> None:
        reader, planner = Reader(path), Reading()
        table = reader.read_metadata()
        planner.set_up_planner(tensors, table)
        require_fit(path, reader.table(), tensors, planner.boxes)
        reader.set_up_storage_reader(table, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()

    try:
        together(f"loading {path}", parallel, read, lambda done: done, _reason)
    except RuntimeError as error:
        raise CheckpointError(_text(error, parallel)) from error


def require_fit(
    path: Path, known: Mapping[str, TensorStorageMetadata], values: Mapping[str, Value], boxes: Mapping[Place, Slab]
) -> None:
    """Raises CheckpointError if the file can't fill all `boxes` of `values`."""
    missing = sorted(set(values) - set(known))
    shapes, types, gaps = {}, {}, {}
    for (name, _), slab in boxes.items():
        if name not in known:
            continue
        size, dtype = tuple(known[name].size), known[name].properties.dtype
        if size != tuple(slab.shape):
            shapes[name] = f"{name} {size} (here {tuple(slab.shape)})"
        elif dtype != slab.tensor.dtype:
            types[name] = f"{name} {dtype} (here {slab.tensor.dtype})"
        elif left := uncovered(slab.box, boxes_of(known[name])):
            gaps[name] = f"{name} {left[0]}"
    if missing or shapes or types or gaps:
        raise CheckpointError(
            f"{path} does not fit: missing {missing or 'nothing'}; other shapes: {list(shapes.values()) or 'none'}; "
            f"other dtypes: {list(types.values()) or 'none'}; parts that no file holds: {list(gaps.values()) or 'none'}"
        )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def names(path: Path) -> set[str]:
    """Names of the tensors in the checkpoint at `path`."""
    return set(Reader(path).table())


# Files ---------------------------------------------------------------------------------------------------------------
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
