"""What every test gets: signatures checked while they run, one thread, the same examples in CI."""

import os

# Before torch is imported: several workers share the machine, and a reduction's order is part of a bit-for-bit result.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ast

import jaxtyping._import_hook as import_hook
import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when it is imported; torch doesn't do
# that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Every function of the package checks its arguments' and results' types and shapes in the tests (and only there); but
# what `@triton.jit` decorates is a program for Triton to read, not a Python function: it stays as written.
_is_no_type_check = import_hook._is_no_type_check
import_hook._is_no_type_check = lambda node: (
    (isinstance(node, ast.Attribute) and node.attr == "jit") or _is_no_type_check(node)
)
import_hook.install_import_hook("dsv3_book", "_typechecker.check")

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes or build books run one after another, on one worker."""
    for item in items:
        if item.get_closest_marker("distributed") or item.get_closest_marker("book"):
            item.add_marker(pytest.mark.xdist_group("one-at-a-time"))
