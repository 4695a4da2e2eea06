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
    make_groups(pipeline, mesh)
    experts = {id(p) for module in pipeline.modules() if isinstance(module, Experts) for p in module.parameters()}
    found: dict[tuple[tuple[int, ...], bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, p in sorted(pipeline.parameters_by_name().items()):
        found[tuple(pipeline.holders(name)), id(p) in experts].append((name, p))
    return [Kind(named, mesh.groups[key_of(*kind)]) for kind, named in sorted(found.items())]  # everywhere in one order


def make_groups(pipeline: Pipeline, mesh: Mesh) -> None:
    """Makes the groups of ranks that hold stages together. All ranks take part in making all of them, in one order:
    torch names a group that only its members make after how many groups each of them has, and a name that was used
    before collides with the old group's keys in the store."""
    layers = [f"layers.{i}" for i in range(pipeline.cfg.num_hidden_layers)]
    together = {tuple(pipeline.holders(name)) for name in ("embed_tokens", "norm", *layers)}
    for stages in sorted(stages for stages in together if len(stages) > 1):
        for expert in (False, True):
            key, plain, dp = key_of(stages, expert), "edp" if expert else "dp", mesh.layout.dp
            if key in mesh.groups:
                continue
            mesh.groups[key] = None
            for first in mesh.layout.partition(plain) if mesh.groups[plain] is not None else ():
                if first[0] >= dp:  # of another pipeline rank: one of these is enough
                    continue
                ranks = sorted(rank + stage * dp for rank in first for stage in stages)
                group = dist.new_group(ranks, mesh.timeout)
                if mesh.rank in ranks:
                    mesh.groups[key] = group


def key_of(stages: tuple[int, ...], expert: bool) -> str:
    """The name in `Mesh.groups` of the ranks at these places in the pipeline that are otherwise like this one."""
    plain = "edp" if expert else "dp"
    return plain if len(stages) == 1 else f"{plain} of pipeline ranks {stages}"
