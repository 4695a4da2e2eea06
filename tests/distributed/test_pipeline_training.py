"""Pipeline, experts across ranks, ZeRO-1, clipping and the routing biases together: one process's training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelinekit import LAMBDA, batches, config
from torch import Tensor

from dsv3_book.model import Transformer
from dsv3_book.model.balance import update_bias
from dsv3_book.optim import adamw, clip_by_global_norm
from dsv3_book.optim.kinds import kinds_of
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule

pytestmark = pytest.mark.distributed

STEPS, LR, CLIP, GAMMA = 4, 3e-3, 0.3, 0.01
Curve = list[tuple[float, float]]  # loss and gradient norm of every step


def of_step(cfg: Any, step: int, count: int, first: int = 0) -> list[Tensor]:
    return batches(cfg, count, first=100 * step + first)


def alone(cfg: Any, count: int) -> tuple[Curve, dict[str, Tensor], Tensor]:
    model = Transformer(cfg, seed=5)
    optimizer = adamw(model.named_parameters(), LR)
    curve = []
    for step in range(STEPS):
        found = [model.losses(tokens) for tokens in of_step(cfg, step, count)]
        for losses in found:
            ((losses.main + LAMBDA * losses.mtp + losses.balance) / count).backward()
        norm = clip_by_global_norm([(list(model.parameters()), None)], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        load = torch.stack([losses.load for losses in found]).sum(0)
        for (_, router), own in zip(model.routers(), load, strict=True):
            update_bias(router.e_score_correction_bias, own, GAMMA)
        curve.append((sum(losses.main.item() for losses in found) / count, norm.item()))
    biases = torch.stack([router.e_score_correction_bias for _, router in model.routers()])
    return curve, {name: p.detach() for name, p in model.named_parameters()}, biases


def together(
    cfg: Any, name: str, pp: int, dp: int, ep: int, M: int
) -> tuple[Curve, dict[str, Tensor], dict[str, Tensor]]:
    mesh = make_mesh(pp, dp, ep)
    each = cfg.n_routed_experts // ep
    held = range(mesh.index("ep") * each, (mesh.index("ep") + 1) * each)
    dispatch = AllToAll(mesh.ep, cfg.n_routed_experts)
    pipeline = Pipeline(cfg, make_schedule(name, pp, M), mesh.pp, seed=5, dispatch=dispatch, experts=held)
    optimizer = ZeRO1(kinds_of(pipeline, mesh), dist.group.WORLD, lr=LR, bucket=5000)
    curve = []
    for step in range(STEPS):
        tokens = of_step(cfg, step, M, first=mesh.index("dp") * M)
        losses = pipeline.step(tokens, LAMBDA, of=dp * M, sum_copies=False)
        totals = torch.cat([losses.main.view(1) / dp, losses.load.flatten()])
        dist.all_reduce(totals, group=mesh.dp)
        optimizer.reduce()
        norm = optimizer.clip(CLIP)
        optimizer.step()
        loads = dict(zip(pipeline.router_names(), totals[1:].view_as(losses.load), strict=True))
        routers = {name: router for model in pipeline.stages.values() for name, router in model.routers()}  # type: ignore[operator]
        for name, router in routers.items():
            update_bias(router.e_score_correction_bias, loads[name], GAMMA)
        curve.append((totals[0].item(), norm.item()))
    weights = {n: p.detach().clone() for n, p in pipeline.parameters_by_name().items()}
    weights = {
        n: torch.cat([torch.full((1,), held.start), p.flatten()]) if p.dim() == 3 else p for n, p in weights.items()
    }
    return curve, weights, {n: r.e_score_correction_bias for n, r in routers.items()}


@pytest.mark.parametrize(
    ("name", "pp", "dp", "ep"), [("dualpipe", 2, 2, 2), ("1f1b", 2, 2, 1), ("dualpipev", 2, 1, 1), ("zb1p", 1, 4, 2)]
)
def test_a_few_steps_of_everything_together(pool, name: str, pp: int, dp: int, ep: int) -> None:
    """Loss and norm of every step to 1e-5, biases exactly; copies of a weight stay equal to the last bit."""
    cfg = config(4, 1)
    curve, weights, biases = alone(cfg, 4 * dp)
    ranks = pool(pp * dp).run(together, cfg, name, pp, dp, ep, 4)
    routers = [f"layers.{i}.mlp.gate" for i in range(5) if cfg.is_moe_layer(i)]
    copies: dict[tuple[str, int], Tensor] = {}
    for own, parameters, own_biases in ranks:
        for (loss, norm), (expected, expected_norm) in zip(own, curve, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
            assert norm > CLIP
        for router, bias in own_biases.items():
            assert torch.equal(bias, biases[routers.index(router)])
        for parameter, p in parameters.items():
            expert = ".experts." in parameter
            first = int(p[0]) if expert else 0
            assert torch.equal(copies.setdefault((parameter, first), p), p), parameter
            if not expert:
                assert (p - weights[parameter]).norm() <= 1e-4 * weights[parameter].norm(), parameter
    assert {parameter for parameter, _ in copies} == weights.keys()
