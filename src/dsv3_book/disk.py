"""Files that must be there after a power cut, what they hold, and why one could not be written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

REMEDIES = {
    errno.ENOSPC: "free some space there, or move the run's folder to a larger disk",
    errno.EDQUOT: "free some of your quota, or move the run's folder to another disk",
    errno.EFBIG: "raise the limit on the size of files, or use more processes",
    errno.EACCES: "make it writable for this user",
    errno.EPERM: "make it writable for this user",
    errno.EROFS: "mount it writable",
    errno.ENOENT: "the run's folder must be on storage that all ranks share, and must not be removed",
    errno.ENOTDIR: "something that is no folder is in the way: move it",
    errno.EEXIST: "something that is no folder is in the way: move it",
}


def why(error: Exception, path: Path) -> str:
    """What went wrong with a rank's part. torch hides the system's reason behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    remedy = REMEDIES.get(cause.errno or 0, "look at that disk")
    return f"cannot write {cause.filename or path}: {cause.strerror or cause} ({remedy})"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut (where the system can)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
