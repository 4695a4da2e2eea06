"""What the workers of the pipeline's tests run, and the one process that they are compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.config import ModelConfig
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.model import Transformer
from dsv3_book.model.transformer import Losses
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.pipeline.executor import Pipeline, Watch
from dsv3_book.pipeline.schedule import make_schedule

LAMBDA = 0.3


def config(layers: int = 4, depths: int = 1, **changes: Any) -> ModelConfig:
    """A very small model, its first layer dense."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
    }
    shape = {"num_hidden_layers": layers, "num_nextn_predict_layers": depths, "aux_loss_alpha": 0.01}
    return ModelConfig.preset("tiny").replace(**sizes | shape | changes)


def batches(cfg: ModelConfig, count: int, first: int = 0) -> list[Tensor]:
    """Micro-batches number first, first + 1, …: 2 sequences of 8 tokens each."""
    width = 9 + cfg.num_nextn_predict_layers
    seeds = (torch.Generator().manual_seed(1000 + i) for i in range(first, first + count))
    return [torch.randint(0, cfg.vocab_size, (2, width), generator=seed) for seed in seeds]


def alone(cfg: ModelConfig, count: int, fp8: bool = False, **settings: Any) -> tuple[Losses, dict[str, Tensor]]:
    """One process, one micro-batch after the other: mean losses, summed loads, every gradient."""
    model = Transformer(cfg, seed=5, **settings)
    if fp8:
        use_fp8(model)
    found = []
    for tokens in batches(cfg, count):
        losses = model.losses(tokens)
        ((losses.main + LAMBDA * losses.mtp + losses.balance) / count).backward()
        found.append(losses)
    main, mtp, balance = (torch.stack([losses[i].detach() for losses in found]).mean() for i in range(3))
    load = torch.stack([losses.load for losses in found]).sum(0)
    return Losses(main, mtp, balance, load), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def pipelined(
    cfg: ModelConfig,
    name: str,
    pp: int,
    M: int,
    dp: int = 1,
    ep: int = 1,
    recompute: bool = False,
    fp8: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """This rank's part of a step over dp · M micro-batches: losses, gradients by name, and what was watched."""
    mesh = make_mesh(pp, dp, ep)
    experts = dispatch = None
    if ep > 1:
        local = cfg.n_routed_experts // ep
        experts = range(mesh.index("ep") * local, (mesh.index("ep") + 1) * local)
        dispatch = AllToAll(mesh.ep, cfg.n_routed_experts)
    pipeline = Pipeline(
        cfg, make_schedule(name, pp, M), mesh.pp, seed=5, dispatch=dispatch, experts=experts, **settings
    )
    for stage in pipeline.stages.values():
        stage.set_recompute(recompute)  # type: ignore[operator]
    if fp8:
        use_fp8(pipeline)
    watch = Watch()
    losses = pipeline.step(batches(cfg, M, first=mesh.index("dp") * M), LAMBDA, of=dp * M, watch=watch)
    totals = torch.cat([t.reshape(-1) for t in losses])
    dist.all_reduce(totals, group=mesh.dp)
    totals[:3] /= dp
    gradients = {}
    for parameter, p in pipeline.parameters_by_name().items():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(gradient, group=mesh.edp if p.dim() == 3 else mesh.dp)
        gradients[parameter] = gradient
    return {
        "losses": Losses(*totals[:3], totals[3:].view_as(losses.load)),
        "gradients": gradients,
        "experts": experts,
        "peak": watch.ledger.peak,
        "left": watch.ledger.live,
        "events": watch.events,
    }
