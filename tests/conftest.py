"""What every test gets: signatures checked while they run, one thread, the same examples in CI."""

import os

# Before torch is imported: several workers share the machine, and a reduction's order is part of a bit-for-bit result.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Every function of the package checks its arguments' and results' types and shapes in the tests (and only there).
install_import_hook("dsv3_book", "_typechecker.check")

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes or build books run one after another, on one worker."""
    for item in items:
        if item.get_closest_marker("distributed") or item.get_closest_marker("book"):
            item.add_marker(pytest.mark.xdist_group("one-at-a-time"))
