"""Build the book strictly: `python tools/build_book.py [--source DIR] [--out DIR]`, as `make book` does.

What "strictly" means, and how it is reached:

* A cell that fails fails the build, the second time as the first. Outputs of failed pages never enter the cache,
  and every build renders every page afresh, so no earlier build's verdict is remembered.
* Every Sphinx warning is an error (all of them are listed first).
* No page shows output of code that is no longer there. Executed cells are cached in a folder that is named after a hash
  of everything they depend on besides themselves (`INPUTS`): touch `src/` and every page runs again.
* Cells run under the Python that runs this file, whatever kernels the user has registered.
* One exception, said aloud: where Triton is missing (it has wheels for Linux only), pages that import it are shown
  without outputs.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

# What cells depend on besides their own text: the package, the pinned packages, results recorded beforehand.
INPUTS = ("src", "requirements.txt", "experiments", "benchmarks")
IGNORED = ("__pycache__", ".egg-info", ".ipynb_checkpoints", ".DS_Store")


def input_files(root: Path) -> Iterator[Path]:
    """The files that cells depend on, in a fixed order."""
    for name in INPUTS:
        path = root / name
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (f for f in found if f.is_file() and not any(part.endswith(IGNORED) for part in f.parts))


def cache_key(root: Path) -> str:
    """A hash of every input's name and bytes, of the Python version and of the torch that is really installed."""
    digest = hashlib.sha256()
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    digest.update(f"{platform.python_version()} {platform.system()} torch {torch}\n".encode())
    for path in input_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def pages_without_triton(source: Path) -> list[str]:
    """The pages that import Triton, if it is not installed."""
    if importlib.util.find_spec("triton"):
        return []
    pages = sorted(source.glob("book/*.md"))
    return [
        page.relative_to(source).as_posix()
        for page in pages
        if re.search(r"^import triton$", page.read_text(encoding="utf-8"), flags=re.M)
    ]


def write_kernelspec(folder: Path) -> None:
    """A kernel named python3 that is this very Python; JUPYTER_PATH puts it before the user's own."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"],
        "display_name": "Python 3",
        "language": "python",
        "env": {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "default")},
        "metadata": {"debugger": False},
    }
    target = folder / "kernels" / "python3"
    target.mkdir(parents=True, exist_ok=True)
    (target / "kernel.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")


def write_config(source: Path, out: Path, cache: Path) -> Path:
    """`_config.yml` with the cache's folder filled in."""
    config = yaml.safe_load((source / "_config.yml").read_text(encoding="utf-8"))
    config.setdefault("execute", {}).update(execute_notebooks="cache", cache=str(cache))
    local = config.setdefault("sphinx", {}).get("local_extensions") or {}
    config["sphinx"]["local_extensions"] = {name: str((source / path).resolve()) for name, path in local.items()}
    settings = config.setdefault("sphinx", {}).setdefault("config", {})
    settings["nb_execution_raise_on_error"] = True
    if skipped := pages_without_triton(source):
        config["execute"]["exclude_patterns"] = [*config["execute"].get("exclude_patterns", []), *skipped]
        settings["suppress_warnings"] = [*(settings.get("suppress_warnings") or []), "mystnb.glue"]
        print(f"Triton is not installed, so without outputs: {', '.join(skipped)}", flush=True)
    path = out / "config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def build(source: Path, out: Path) -> int:
    """Build the book at `source` into `out`/html. Returns 0 only if every cell and every page is fine."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    caches, key = out / ".jupyter_cache", cache_key(source)
    cache = caches / key
    reused = cache.is_dir()
    if caches.is_dir():
        for old in caches.iterdir():
            if old.name != key:
                shutil.rmtree(old)
    for stale in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(out / stale, ignore_errors=True)
    write_kernelspec(out / "jupyter")
    config = write_config(source, out, cache)

    env = dict(os.environ, JUPYTER_PATH=str(out / "jupyter"), JUPYTER_PREFER_ENV_PATH="1", JUPYTER_PLATFORM_DIRS="1")
    env.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 8)))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait cripple a machine that is shared
    env.setdefault("PYTHONHASHSEED", "0")  # sets print in the same order every time
    env["MPLBACKEND"] = "agg"
    print(
        f"{'Reusing' if reused else 'Starting'} the cache of executed cells {key} (of src/ and the pinned packages)",
        flush=True,
    )
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    # fmt: off
    command += ["build", str(source), "--path-output", str(out.parent), "--config", str(config),
                "--all", "--warningiserror", "--keep-going", "--quiet"]
    # fmt: on
    status = subprocess.run(command, env=env, cwd=source).returncode
    index = out / "html" / "index.html"
    if status == 0 and not index.exists():
        print(f"The build reported success but wrote no {index}", file=sys.stderr)
        status = 1
    seconds = time.monotonic() - started
    if status:
        print(f"\nThe book did NOT build ({seconds:.0f} s): see the messages above.", file=sys.stderr)
        return 1
    print(f"The book is built ({seconds:.0f} s): {index}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, default=Path(__file__).resolve().parent.parent, help="where _config.yml is"
    )
    parser.add_argument("--out", type=Path, help="build folder, named _build (default: SOURCE/_build)")
    arguments = parser.parse_args()
    root = arguments.source.resolve()
    sys.exit(build(root, (arguments.out or root / "_build").resolve()))
