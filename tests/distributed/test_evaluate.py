"""Forwards alone, through any pipeline: one process's loss."""

from __future__ import annotations

import pytest
import torch
from pipelinekit import batches, config
from torch import Tensor

from dsv3_book.model import Transformer
from dsv3_book.parallel.choose import make_dispatch
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.pipeline.evaluate import evaluate
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import forwards, make_schedule
from dsv3_book.pipeline.simulate import simulate

pytestmark = pytest.mark.distributed


def losses(name: str, pp: int, ep: int, count: int) -> tuple[Tensor, Tensor]:
    cfg, mesh = config(5, 1), make_mesh(pp, None, ep)
    each = cfg.n_routed_experts // ep
    held = range(mesh.index("ep") * each, (mesh.index("ep") + 1) * each)
    dispatch = make_dispatch(mesh, cfg.n_routed_experts)
    plan = make_schedule(name, pp, 4 * pp)
    pipeline = Pipeline(cfg, plan, mesh.pp, seed=5, dispatch=dispatch, experts=held)
    mine = [t[:, :-1] for t in batches(cfg, count, first=mesh.index("dp") * count)]
    return evaluate(pipeline, mine), evaluate(pipeline, [mine[0][:, :4]])


@pytest.mark.parametrize(
    ("name", "pp", "dp", "ep"),
    [("dualpipe", 2, 2, 2), ("dualpipev", 2, 1, 1), ("zb1p", 4, 1, 1), ("1f1b", 1, 2, 2), ("dualpipe", 4, 1, 1)],
)
def test_the_losses_of_one_process(pool, name: str, pp: int, dp: int, ep: int) -> None:
    cfg, count = config(5, 1), 5
    model = Transformer(cfg, seed=5)

    def expected(tokens: Tensor) -> Tensor:
        x, _ = model.run_blocks(model.embed(tokens[:, :-1]))
        return model.token_loss(model.norm(x), tokens[:, 1:])

    with torch.no_grad():
        whole = torch.stack([expected(t[:, :-1]) for t in batches(cfg, dp * count)])
        short = torch.stack([expected(batches(cfg, 1, first=d * count)[0][:, :4]) for d in range(dp)])
    for rank, (many, one) in enumerate(pool(pp * dp).run(losses, name, pp, ep, count)):
        place = rank % dp
        torch.testing.assert_close(many, whole[place * count : (place + 1) * count], rtol=1e-6, atol=0)
        torch.testing.assert_close(one, short[place : place + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "chimera", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_no_order_of_forwards_waits_for_itself(name: str, ranks: int) -> None:
    for count in (1, 2, 7, 3 * ranks):
        plan = forwards(make_schedule(name, ranks, 2 * ranks), count)
        line = simulate(plan)  # would say so if it could not go on
        assert line.makespan <= (plan.num_stages / ranks) * count + plan.num_stages
        assert sum(len(mine) for mine in plan.actions) == count * plan.num_stages
