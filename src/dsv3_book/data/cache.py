"""A cache of folders named by the hash of what they were made from: found again, or made, but never half-made.

A folder is built beside its place and then renamed into it, which a file system does at once or not at all. A lock
lets one process of a machine build while the others wait for it; where locks don't work (some network disks) the rename
still keeps every folder whole, and processes merely build the same thing twice.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock  # torch brings it

T = TypeVar("T")
ENVIRONMENT = "DSV3_BOOK_CACHE"
DAY = 24 * 60 * 60


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The cache's folder, made if missing: the argument, else $DSV3_BOOK_CACHE, else ~/.cache/dsv3_book."""
    path = Path(cache_dir or os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "dsv3_book").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"can't make the cache folder {path} ({error}); name another with ${ENVIRONMENT}") from error
    return path


def key_of(parts: dict[str, Any]) -> str:
    """A name that changes when any of the parts does (JSON-able values)."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def cached(
    name: str,
    folder: Path,
    build: Callable[[Path], None],
    load: Callable[[Path], T],
) -> T:
    """`load(folder/name)`, after `build` has made it if it is missing or `load` raises ValueError or OSError on it.

    build gets an empty folder to fill; if it fails, nothing is left behind. Safe against other processes doing the
    same.
    """
    place = folder / name
    with FileLock(folder / f"{name}.lock"):
        for leftover in folder.glob(f".{name}-*"):  # of a build that was killed
            if time.time() - leftover.stat().st_mtime > DAY:  # younger: perhaps still at work, where locks don't work
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            return load(place)
        except (ValueError, OSError):
            pass  # missing, cut short, or damaged: made again below
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            build(work)
            try:
                os.rename(work, place)
            except OSError:  # something lies there: what was damaged, or what somebody without our lock has just made
                try:
                    return load(place)
                except (ValueError, OSError):
                    shutil.rmtree(place, ignore_errors=True)
                    os.rename(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return load(place)
