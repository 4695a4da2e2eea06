"""The reader's own parts on several processes: the training that one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelinekit import LAMBDA, batches, config
from torch import Tensor

from dsv3_book.model.balance import update_bias
from dsv3_book.optim.kinds import kinds_of
from dsv3_book.optim.shards import Kind
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.train.swaps import Swap, load_swaps

pytestmark = pytest.mark.distributed

EXAMPLES = Path(__file__).parents[2] / "examples" / "swaps"
OWN = Swap(
    attention=f"{EXAMPLES}/plain_attention.py:PlainAttention",
    router=f"{EXAMPLES}/softmax_router.py:SoftmaxRouter",
    balance=f"{EXAMPLES}/proportional_balance.py:by_distance",
    schedule=f"{EXAMPLES}/gpipe.py:gpipe",
    optimizer=f"{EXAMPLES}/momentum.py:momentum",
)
BIASED = Swap(attention=OWN.attention, balance=OWN.balance, optimizer="torch.optim:RMSprop")  # the reference's router
COUNT, STEPS = 8, 3


def train(cfg: Any, swap: Swap, pp: int = 1, dp: int = 1, ep: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Main losses, and what the stages hold in the end, experts aside."""
    swaps, M = load_swaps(swap, cfg), COUNT // dp
    schedule = swaps.schedule(pp, M) if swaps.schedule else make_schedule("dualpipe" if pp > 1 else "1f1b", pp, M)
    if pp * dp == 1:
        pipeline = Pipeline(cfg, schedule, seed=5)
    else:
        mesh = make_mesh(pp, dp, ep)
        each = cfg.n_routed_experts // ep
        held = range(mesh.index("ep") * each, (mesh.index("ep") + 1) * each)
        dispatch = AllToAll(mesh.ep, cfg.n_routed_experts)
        pipeline = Pipeline(cfg, schedule, mesh.pp, seed=5, dispatch=dispatch, experts=held)
    swaps.apply(pipeline, seed=5)
    kinds = kinds_of(pipeline, mesh) if pp * dp > 1 else [Kind(list(pipeline.parameters_by_name().items()), None)]
    world = dist.group.WORLD if pp * dp > 1 else None
    optimizer = ZeRO1(kinds, world, lr=1e-3, bucket=5000, make=swaps.optimizer)
    curve = []
    for step in range(STEPS):
        first = 100 * step + (mesh.index("dp") * M if pp * dp > 1 else 0)
        losses = pipeline.step(batches(cfg, M, first=first), LAMBDA, of=COUNT, sum_copies=False)
        totals = torch.cat([losses.main.view(1) / dp, losses.load.flatten()])
        if dp > 1:
            dist.all_reduce(totals, group=mesh.dp)
        optimizer.reduce()
        optimizer.step()
        loads = dict(zip(pipeline.router_names(), totals[1:].view_as(losses.load), strict=True))
        for name, router in (pair for model in pipeline.stages.values() for pair in model.routers()):
            if hasattr(router, "e_score_correction_bias"):
                (swaps.balance or update_bias)(router.e_score_correction_bias, loads[name], 0.01)
        curve.append(totals[0].item())
    state = {n: t.clone() for model in pipeline.stages.values() for n, t in model.state_dict().items()}
    return curve, {n: t for n, t in state.items() if ".experts." not in n}


@pytest.mark.parametrize(("swap", "pp", "dp", "ep"), [(OWN, 2, 2, 2), (BIASED, 2, 1, 1), (OWN, 1, 2, 1)])
def test_every_layout_trains_alike(pool, swap: Swap, pp: int, dp: int, ep: int) -> None:
    cfg = config(4, 1)
    curve, state = train(cfg, swap)
    assert any(name.endswith("self_attn.k_proj.weight") for name in state)  # the part is there
    seen = set()
    for found, held in pool(pp * dp).run(train, cfg, swap, pp, dp, ep):
        assert found == pytest.approx(curve, rel=1e-5)
        for name, value in held.items():
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5)
        seen |= held.keys()
    assert seen == state.keys()
