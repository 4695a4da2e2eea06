"""The mesh's groups on real processes."""

import pytest
import torch
import torch.distributed as dist
from pipelinekit import config

from dsv3_book.optim.kinds import key_of, make_groups
from dsv3_book.parallel.mesh import GROUPS, make_mesh
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule

pytestmark = pytest.mark.distributed


def look(pp: int, dp: int | None, ep: int, per_node: int | None) -> dict:
    mesh = make_mesh(pp, dp, ep, per_node)
    found: dict = {"axes": mesh.devices.mesh_dim_names, "shape": tuple(mesh.devices.shape), "node": mesh.node}
    for name in GROUPS:
        group = getattr(mesh, name)
        total = torch.tensor([10 ** dist.get_rank()])
        dist.all_reduce(total, group=group)  # it is a group that works
        assert dist.get_process_group_ranks(group) == mesh.layout.ranks(name, mesh.rank)
        assert dist.get_rank(group) == mesh.index(name)
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 60  # as the pool's
        found[name] = f"{int(total):04}"
    if pp > 1:
        pipeline = Pipeline(config(), make_schedule("dualpipe", pp, 2 * pp), mesh.pp)
        make_groups(pipeline, mesh)
        for expert in (True, False):
            group = mesh.groups[key_of((0, 1), expert)]
            assert dist.get_process_group_ranks(group) == mesh.layout.holders(mesh.rank, expert, mirrored=True)
            total = torch.tensor([10 ** dist.get_rank()])
            dist.all_reduce(total, group=group)
            found["mirrored expert" if expert else "mirrored"] = f"{int(total):04}"
        before = dict(mesh.groups)
        make_groups(pipeline, mesh)
        assert mesh.groups == before  # once is enough
    mesh.close()
    return found


def test_four_processes_as_two_nodes(pool):
    first, *_, last = pool(4).run(look, 1, 4, 4, 2)
    assert first["axes"] == ("pp", "edp", "across", "inside") and first["shape"] == (1, 1, 2, 2)
    assert (first["ep"], first["across"], first["inside"], first["edp"]) == ("1111", "0101", "0011", "0001")
    assert (last["across"], last["inside"], last["node"]) == ("1010", "1100", 1)


def test_four_processes_as_two_mirrored_stages(pool):
    first = pool(4).run(look, 2, None, 2, None)[0]
    assert (first["pp"], first["dp"], first["ep"], first["edp"]) == ("0101", "0011", "0011", "0001")
    assert (first["mirrored"], first["mirrored expert"]) == ("1111", "0101")


def refuse() -> str:
    try:
        make_mesh(2, 3, 1)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_numbers_that_dont_fit_the_processes(pool):
    assert all("pp · dp = 2 · 3 = 6, but there are 2 processes" in answer for answer in pool(2).run(refuse))
