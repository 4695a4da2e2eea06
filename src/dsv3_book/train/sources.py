"""Code by import path: `file.py:Name` or `package.module:Name`, run once, with a checksum to remember it by."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv3_book.pipeline.schedule import Schedule
from dsv3_book.train.contracts import Refused, need

STATEFUL = ("attention", "router", "optimizer")  # a checkpoint holds their numbers
Source = dict[str, str | None]  # "path": as it was named; "sha256": of the source file, None where there is none
_loaded: dict[str, ModuleType] = {}  # by place and checksum: a file named twice is run once


def load(kind: str, path: str) -> tuple[Any, Source]:
    """What `path` names, and its source. A schedule may be a text file, which holds no code.

    Raises:
        Refused: there is no such file, module or name in it, or it can't be run.
    """
    where, colon, name = path.rpartition(":")
    if kind == "schedule" and not colon:
        raw = _bytes(path)
        try:
            return Schedule.from_text(raw.decode(), Path(path).stem), _source(path, raw)
        except ValueError as error:  # UnicodeDecodeError is one too
            raise Refused(f"can't be read as a schedule: {error}") from error
    also = ", or a text file of a schedule" if kind == "schedule" else ""
    need(where and name, f"is no import path; wanted: file.py:Name or package.module:Name{also}")
    if where.endswith(".py") or "/" in where:
        raw = _bytes(where)
        module, source = _run(Path(where), raw), _source(path, raw)
        return _named(module, name), source
    with _importing(where):
        module = importlib.import_module(where)
    thing = _named(module, name)
    return thing, _source(path, _source_of(thing, module))


def same_parts(
    before: Mapping[str, Source], now: Mapping[str, Source], place: Path, kinds: Sequence[str] = STATEFUL
) -> list[str]:
    """What to tell somebody who goes on with the run in `place`, whose parts were `before`: a sentence each.

    kinds: what must be named again, or not at all, as it was: nothing is imported because a checkpoint says so.

    Raises:
        ValueError: one of these is missing, or wasn't there.
    """
    notes = []
    for kind in sorted({*before, *now}):
        old, new = before.get(kind), now.get(kind)
        if old is None or new is None:
            given, flag = (old, "with") if old else (new, "without")
            assert given is not None
            option = f"--swap.{kind} {given['path']}"
            if kind in kinds:
                remedy = "give it again (code is only imported when the command names it)" if old else "leave it out"
                raise ValueError(f"{place} was trained {flag} {option}: {remedy}")
            notes.append(f"{place} was trained {flag} {option} so far")
        elif old["sha256"] != new["sha256"]:
            notes.append(f"--swap.{kind} {new['path']} is not the code that {place} was trained with ({old['path']})")
    return notes


def line_of(error: BaseException) -> str:
    """Where the reader's own code was when it went wrong: the innermost line that isn't a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("site-packages", "dist-packages", "<frozen", str(Path(__file__).parents[1]))
    own = [f for f in frames if not any(part in f.filename for part in libraries)]
    last = (own or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"there is no file {path} to be read from {Path.cwd()}: {error.strerror}") from None


def _source(path: str, raw: bytes | None) -> Source:
    return {"path": path, "sha256": hashlib.sha256(raw).hexdigest() if raw is not None else None}


def _source_of(thing: Any, module: ModuleType) -> bytes | None:
    """The file that `thing` is written in, or else its module's."""
    for place in (thing, module):
        try:
            if file := inspect.getsourcefile(place):
                return Path(file).read_bytes()
        except (TypeError, OSError):
            continue
    return None


def _run(path: Path, raw: bytes) -> ModuleType:
    """The file as a module: what is run is what was read for the checksum."""
    key = f"{path.resolve()}:{hashlib.sha256(raw).hexdigest()}"
    if key not in _loaded:
        module = ModuleType(f"swapped_{path.stem}_{len(_loaded)}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up
        with _importing(str(path)):
            exec(compile(raw, str(path), "exec"), module.__dict__)
        _loaded[key] = module
    return _loaded[key]


class _importing:
    """An error while code is imported becomes a refusal that says where."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SyntaxError):
            raise Refused(f"{error.filename}, line {error.lineno}: {error.msg}") from error
        if isinstance(error, ModuleNotFoundError) and error.name and self.where.startswith(error.name):
            raise Refused(f"there is no module {error.name}; a file is named as path/to/file.py:Name") from error
        if isinstance(error, Exception | SystemExit):
            what = f"{type(error).__name__}: {error} ({line_of(error)})"
            raise Refused(f"importing {self.where} raised {what}") from error


def _named(module: ModuleType, name: str) -> Any:
    thing: Any = module
    for part in name.split("."):
        if not hasattr(thing, part):
            public = [n for n in vars(thing) if not n.startswith("_")]
            close = difflib.get_close_matches(part, public, 3) or sorted(public)[:8]
            raise Refused(f"has no {part}; there are {', '.join(close) or 'no names'}")
        thing = getattr(thing, part)
    return thing
