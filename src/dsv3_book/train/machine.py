"""What a process knows of itself and of the machine it runs on, to be compared with what the others know."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dsv3_book
from dsv3_book.data.readers import expand
from dsv3_book.data.sharded import INDEX, PREFIX
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import TrainConfig

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")  # what files and messages between processes depend on


@dataclass(frozen=True)
class Facts:
    """One process's answers; all of it can be written as JSON."""

    rank: int
    host: str
    local_rank: int
    local_size: int
    versions: dict[str, str]
    """Of Python and `PACKAGES`, and NCCL's where it is used."""
    source: str
    """A hash of the package's code."""
    settings: dict[str, Any]
    data: dict[str, str]
    """What lies at each path that the run reads."""
    cores: int
    threads: int
    gpu: str | None = None
    """Which GPU this process computes on: its number and its name."""
    gpus: int = 0
    address: str = ""
    """What the host's name means here."""
    interface: str = field(default="")
    """$GLOO_SOCKET_IFNAME."""

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"


def look(config: TrainConfig, parallel: DataParallel) -> Facts:
    """This process's facts."""
    environment, cuda = os.environ, parallel.device.type == "cuda"
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    if cuda:
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Facts(
        rank=parallel.rank,
        host=socket.gethostname(),
        local_rank=int(environment.get("LOCAL_RANK", 0)),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", parallel.size)),
        versions=versions,
        source=source_hash(),
        settings=config.to_dict(),
        data=looked_at(config),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=f"{parallel.device.index} ({torch.cuda.get_device_name(parallel.device)})" if cuda else None,
        gpus=torch.cuda.device_count() if cuda else 0,
        address=address(),
        interface=environment.get("GLOO_SOCKET_IFNAME", ""),
    )


def source_hash() -> str:
    """Of the package's `.py` files, names and bytes: equal where the same code runs."""
    root = Path(dsv3_book.__file__).parent
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def looked_at(config: TrainConfig) -> dict[str, str]:
    """For every path of --data and --text.tokenizer what is there, in a few words that are equal for equal things."""
    paths = [*config.data, *([config.text.tokenizer] if config.text.tokenizer else [])]
    return {path: _what(path) for path in paths}


def _what(source: str) -> str:
    folder = Path(source.removeprefix(PREFIX))
    if source.startswith(PREFIX) or (folder / INDEX).is_file():
        try:
            return f"shards {hashlib.blake2b((folder / INDEX).read_bytes(), digest_size=8).hexdigest()}"
        except OSError:
            return "nothing"
    try:
        files = [path for _, path in expand(source)] if not source.endswith(".json") else [Path(source)]
        size = sum(path.stat().st_size for path in files if path is not None)
    except (OSError, ValueError):
        return "nothing"
    return f"{len(files)} file(s), {size:,} bytes" if None not in files else "a data set of the hub"


def free_memory() -> int | None:
    """Bytes of memory that could be had now; None where the system doesn't say (Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def address() -> str:
    """The IPv4 address that this host's own name leads to; "" if to none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def hostname_warning(environment: Mapping[str, str] = os.environ) -> str | None:
    """What to say before processes of several hosts are joined over gloo, if that is bound to fail.

    Gloo tells the others the address that this host's name leads to. Where /etc/hosts says 127.0.1.1 (Debian's way),
    they are sent to themselves, and the joining fails with a refused connection.
    """
    several = int(environment.get("WORLD_SIZE", 1)) > int(environment.get("LOCAL_WORLD_SIZE", 1))
    here = address()
    if not several or environment.get("GLOO_SOCKET_IFNAME") or (here and not here.startswith("127.")):
        return None
    leads = f"leads to {here}, which other hosts can't reach" if here else "leads nowhere"
    return (
        f"the name of this host, {socket.gethostname()}, {leads}: if processes can't be joined, set GLOO_SOCKET_IFNAME "
        "(and NCCL_SOCKET_IFNAME) to the network interface that connects the hosts, as `ip -br address` lists it, or "
        "correct /etc/hosts"
    )
