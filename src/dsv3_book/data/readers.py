"""Readers of the formats a corpus may come in; each yields `(name, text)`, or `(name, Skip)` for what can't be read as
text.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
NEEDS_DATA = "pip install 'dsv3-book[data]'"


@dataclass(frozen=True)
class Skip:
    """Stands in for the text of something that was not read, and says why."""

    reason: str


def expand(source: str | os.PathLike) -> list[tuple[str, Path | None]]:
    """The files one source names, as (name, path) in a fixed order; a hub data set is (name, None).

    A folder is searched for files with a known suffix, hidden files and folders left out. Raises FileNotFoundError and
    ValueError as `load_corpus` says.
    """
    text = os.fspath(source)
    path = Path(text)
    if text.startswith("hf:"):
        return [(text.removeprefix("hf:"), None)]
    if path.is_dir():
        found = sorted(_walk(path), key=lambda p: p.relative_to(path).as_posix())
        if not found:
            raise ValueError(f"folder {text} has no file that ends in {' '.join(SUFFIXES)}")
        return [(p.as_posix(), p) for p in found]
    if path.exists():
        return [(text, _known(path))]
    if glob.has_magic(text):
        found = sorted(Path(p) for p in glob.glob(text, recursive=True) if os.path.isfile(p))
        if not found:
            raise FileNotFoundError(f"no file matches {text}; relative patterns start at {Path.cwd()}")
        return [(p.as_posix(), _known(p)) for p in found]
    if HUB_NAME.fullmatch(text) and path.suffix.lower() not in SUFFIXES:
        return [(text, None)]
    raise FileNotFoundError(f"no such file or folder: {text} (relative paths start at {Path.cwd()})")


def _walk(folder: Path) -> Iterator[Path]:
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__pycache__"]
        yield from (Path(parent, f) for f in files if not f.startswith(".") and f.lower().endswith(SUFFIXES))


def _known(path: Path) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}, which is not read; use one of {' '.join(SUFFIXES)}")
    return path


def read_source(name: str, path: Path, field: str = "text") -> Iterator[tuple[str, str | Skip]]:
    """The documents of one file. `field`: where a line of .jsonl or a row of .parquet keeps its text."""
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(name, path, field)
        return
    try:
        text = path.read_bytes().decode("utf-8")  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        yield name, Skip(f"not UTF-8 (byte {error.start})")
        return
    if path.suffix.lower() == ".jsonl":
        yield from _read_jsonl(name, text, field)
    else:
        yield name, text


def _read_jsonl(name: str, text: str, field: str) -> Iterator[tuple[str, str | Skip]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand inside a string
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f'{where}: not a line of JSON ({error}); each line must be an object with a "{field}"'
            ) from None
        yield where, _text_of(row, where, field)


def _text_of(row: Any, where: str, field: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        kind = f"has the keys {sorted(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise ValueError(
            f'{where}: no text ({where} {kind}); each line or row must hold its text as a string under "{field}". '
            "Rename the field, or remove the line"
        )
    return row[field]


def _read_parquet(name: str, path: Path, field: str) -> Iterator[tuple[str, str | Skip]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: reading .parquet needs the extra `data`: {NEEDS_DATA}") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name}: not a readable parquet file ({error}); fetch or write it again") from error
    with table:
        if field not in table.schema_arrow.names:
            raise ValueError(
                f'{name}: no column "{field}" among {table.schema_arrow.names}; rename the column that holds it'
            )
        row = 0
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0):
                yield f"{name}:{row}", _text_of({field: value.as_py()}, f"{name}:{row}", field)
                row += 1


def read_hub(name: str, split: str = "train", field: str = "text", skip: int = 0) -> Iterator[tuple[str, str | Skip]]:
    """The rows of a hub data set's split but the first `skip`, streamed. `name` may end in `:config`."""
    missing = f"{name!r} is neither a file nor a folder here, and as a data set of the hub it can't be read"
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = f"{missing}: the package `datasets` is not installed. Correct the path, or: {NEEDS_DATA}"
        raise ModuleNotFoundError(message) from error
    repo, _, config = name.partition(":")
    try:
        # trust_remote_code is never given: a data set's own script is not run.
        stream = datasets.load_dataset(repo, config or None, split=split, streaming=True)
        rows = iter(stream.skip(skip) if skip else stream)
        first = next(rows, None)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the reader
        raise FileNotFoundError(
            f"{missing} ({type(error).__name__}: {error}). Check the name and the network"
        ) from error
    if first is not None:
        yield f"{name}:{skip}", _text_of(first, f"{name}:{skip}", field)
    for number, row in enumerate(rows, start=skip + 1):
        yield f"{name}:{number}", _text_of(row, f"{name}:{number}", field)
