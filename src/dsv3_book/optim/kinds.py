"""Which ranks hold a pipeline's parameters: what ZeRO-1 shards, and sums gradients, over.

Three things decide it. Experts are alike on the data parallel ranks that hold the same ones (edp), all other weights
on all (dp). A stage may be held by several ranks of the pipeline, as DualPipe's mirrored pairs do. And the embedding
is also where an MTP module reads it.
"""

from __future__ import annotations

from collections import defaultdict

import torch.distributed as dist
from torch import nn

from dsv3_book.model.experts import Experts
from dsv3_book.optim.shards import Kind
from dsv3_book.parallel.mesh import Mesh
from dsv3_book.pipeline.executor import Pipeline


def kinds_of(pipeline: Pipeline, mesh: Mesh) -> list[Kind]:
    """This rank's parameters, sorted by who else holds them; each with a group of exactly these ranks.

    Gradients are then summed over copies by the optimiser, so the step that made them must not have done it:
    `pipeline.step(…, sum_copies=False)`. All ranks must call it; groups that the mesh doesn't have yet are made, and
    kept there.
    """
    experts = {id(p) for module in pipeline.modules() if isinstance(module, Experts) for p in module.parameters()}
    found: dict[tuple[tuple[int, ...], bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, p in sorted(pipeline.parameters_by_name().items()):
        found[tuple(pipeline.holders(name)), id(p) in experts].append((name, p))
    return [Kind(named, _group(mesh, *key)) for key, named in sorted(found.items())]  # the same order everywhere


def _group(mesh: Mesh, stages: tuple[int, ...], expert: bool) -> dist.ProcessGroup | None:
    """The group of the ranks at these places in the pipeline that are otherwise like this one."""
    plain = "edp" if expert else "dp"
    if mesh.groups[plain] is None or len(stages) == 1:
        return mesh.groups[plain]
    key = f"{plain} of pipeline ranks {stages}"
    if key not in mesh.groups:
        dp = mesh.layout.dp
        ranks = sorted(r % dp + stage * dp for r in mesh.layout.ranks(plain, mesh.rank) for stage in stages)
        mesh.groups[key] = dist.new_group(ranks, mesh.timeout, use_local_synchronization=True)
    return mesh.groups[key]
