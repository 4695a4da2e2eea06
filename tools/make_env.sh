#!/bin/sh
# Make the Python environment of this project, or bring it up to requirements.txt: tools/make_env.sh VENV
# POSIX sh, nothing but Python >= 3.11 needed. PYTHON names the Python to use; PIP_ARGS is handed to pip install.
set -eu
venv=${1:-.venv}
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
say() { printf '%s\n' "$*"; }
right() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ -d "$venv" ] && [ "$venv" != ".venv" ] && [ ! -e "$venv/.made-for-dsv3_book" ]; then
    # Somebody's own environment: use it, change nothing in it.
    python="$venv/bin/python"; [ -x "$python" ] || python="$venv/Scripts/python.exe"
    right "$python" || { say "error: $venv has no Python >= 3.11" >&2; exit 1; }
    say "Using the environment $venv as it is (not made here, so nothing is installed into it)."
    exit 0
fi

if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if right "$candidate"; then PYTHON=$candidate; break; fi
    done
fi
if [ -z "${PYTHON:-}" ] || ! right "$PYTHON"; then
    found=$("${PYTHON:-python3}" --version 2>&1 || true)
    say "error: Python 3.11 or newer is needed; found: ${found:-none}." >&2
    say "       Name one with: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# The mark .ready is written last: an environment without it is never taken for finished.
rm -f "$venv/.ready"
# A Python that has moved, or a venv that was interrupted, starts over.
if [ -d "$venv" ] && ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version; } >/dev/null 2>&1 &&
    ! { [ -x "$venv/Scripts/python.exe" ] && "$venv/Scripts/python.exe" -m pip --version; } >/dev/null 2>&1; then
    say "The environment $venv is incomplete: making it anew."
    rm -rf "$venv"
fi
if [ ! -d "$venv" ]; then
    say "Making the environment $venv with $("$PYTHON" --version) ..."
    "$PYTHON" -m venv "$venv"
    : > "$venv/.made-for-dsv3_book"
fi
python="$venv/bin/python"; [ -x "$python" ] || python="$venv/Scripts/python.exe"
right "$python" || { say "error: $venv is of an older Python: remove it and run make again" >&2; exit 1; }
say "Installing what requirements.txt pins (the first time: some minutes; the README says what torch brings) ..."
# shellcheck disable=SC2086  # PIP_ARGS holds several words
"$python" -m pip install --disable-pip-version-check --quiet ${PIP_ARGS:-} -r requirements.txt
# shellcheck disable=SC2086
"$python" -m pip install --disable-pip-version-check --quiet ${PIP_ARGS:-} --no-deps --no-build-isolation -e .
"$python" -m pip check >/dev/null || { "$python" -m pip check >&2; exit 1; }
: > "$venv/.made-for-dsv3_book"
: > "$venv/.ready"
say "The environment $venv is ready."
