"""The assembly: one process's mesh, pipeline, dispatch, optimiser and average of the weights, from a run's settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_book.checkpoint import differences
from dsv3_book.config import ModelConfig
from dsv3_book.costs import count
from dsv3_book.fill import fill
from dsv3_book.model import Transformer
from dsv3_book.model.experts import Experts
from dsv3_book.model.router import Router
from dsv3_book.optim.adamw import adamw
from dsv3_book.optim.ema import EMA
from dsv3_book.optim.kinds import kinds_of
from dsv3_book.optim.shards import Shard
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.choose import make_dispatch
from dsv3_book.parallel.mesh import Mesh, make_mesh, node_size
from dsv3_book.parallel.together import Failed, together
from dsv3_book.parallel.transport import DelayedTransport
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import Schedule, make_schedule
from dsv3_book.slab import Slab, Value
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.swaps import Swaps

# Fields of a model's configuration that no weight's shape or meaning depends on.
WEIGHTLESS = ("max_position_embeddings", "rope_scaling", "aux_loss_alpha", "initializer_range")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Job:
    """What one process works with. All hold the same kinds of things, each its own part of them."""

    config: TrainConfig
    mesh: Mesh
    pipeline: Pipeline
    optimizer: ZeRO1
    ema: EMA | None
    swaps: Swaps  # the reader's own parts
    transport: DelayedTransport | None  # writes down what is sent between experts, where a step is to be profiled

    def __post_init__(self) -> None:
        self.schedules: dict[int, Schedule] = {}

    def schedule(self, micro_batches: int) -> Schedule:
        """The pipeline's schedule for so many micro-batches."""
        if micro_batches not in self.schedules:
            self.schedules[micro_batches] = schedule_for(self.config, self.swaps, micro_batches)
        return self.schedules[micro_batches]

    @property
    def model(self) -> Transformer:
        """The whole model, where this process holds it in one piece.

        Raises:
            ValueError: it is cut into stages, or holds only some of the experts; a checkpoint has all.
        """
        if self.config.parallel.ep > 1 or self.pipeline.schedule.num_stages > 1:
            raise ValueError("this process doesn't hold the model in one piece: load a checkpoint (generate.load)")
        return next(iter(self.pipeline.stages.values()))  # type: ignore[return-value]

    def numbers(self) -> int:
        """Parameters of the whole model, MTP's included, each counted once."""
        counts = count(self.config.model)
        return counts.main + counts.mtp

    def routers(self) -> Iterator[tuple[int, Router]]:
        """The routers held here, each with its place in `Losses.load`."""
        places = {name: place for place, name in enumerate(self.pipeline.router_names())}
        for stage in self.pipeline.stages.values():
            for name, router in stage.routers():  # type: ignore[operator]
                yield places[name], router

    # What a checkpoint holds -------------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor | Slab]:
        """Parameters and routing biases held here, by their names in the whole model; some experts as a part of all."""
        held = self._held()
        state = {n: t for stage in self.pipeline.stages.values() for n, t in stage.state_dict().items()}
        values: dict[str, Tensor | Slab] = dict(state)
        for name, experts in held.items():
            local = state[name]
            whole = self.config.model.n_routed_experts, *local.shape[1:]
            values[name] = Slab(local, whole, (experts.start, *[0] * (local.dim() - 1)))
        return values

    def tensors(self) -> dict[str, Value]:
        """All that this process would lose, by name: weights, biases, the optimiser's state and the average. The last
        two are flattened, for a rank's shard of them may be any stretches of a parameter's numbers."""
        values: dict[str, Value] = {f"model.{name}": value for name, value in self.weights().items()}
        flat: dict[str, list[Slab]] = defaultdict(list)
        held = self._held()
        average = self.ema.tensors() if self.ema is not None else {}
        for part in self.optimizer.parts():
            for key, value in self.optimizer.optimizer.state_of(part.weight).items():
                if value.dim():
                    flat[f"optimizer.{part.name}.{key}"].append(self._flat(part, value, held))
                else:
                    values.setdefault(f"optimizer.{part.name}.{key}", value)  # the same for all parts: see `filled`
            if self.ema is not None:
                flat[f"ema.{part.name}"].append(self._flat(part, average[part.key], held))
        return values | flat

    def filled(self) -> None:
        """To be called when `tensors` were filled from a checkpoint: single numbers, of which they have one for each
        parameter, go to all of its parts; and master weights follow the weights."""
        ones: dict[str, Tensor] = {}
        for part in self.optimizer.parts():
            for key, value in self.optimizer.optimizer.state_of(part.weight).items():
                if not value.dim():
                    value.copy_(ones.setdefault(f"{part.name}.{key}", value))
        self.optimizer.take_weights()

    def _flat(self, part: Shard, value: Tensor, held: Mapping[str, range]) -> Slab:
        """A stretch of a parameter's numbers, as a piece of the flattened whole.  held: see `_held`."""
        size, begin = part.parameter.numel(), part.begin
        if (mine := held.get(part.name)) is not None:
            each = size // len(mine)
            size, begin = each * self.config.model.n_routed_experts, begin + each * mine.start
        return Slab(value.view(-1), (size,), (begin,))

    def _held(self) -> dict[str, range]:
        """The experts held here, by the name of each stack of their weights."""
        return {
            f"{module}.{name}": experts.held
            for stage in self.pipeline.stages.values()
            for module, experts in stage.named_modules()
            if isinstance(experts, Experts)
            for name, _ in experts.named_parameters()
        }

    def begin_with(self, folder: Path, parallel: DataParallel) -> None:
        """Takes weights and routing biases from a folder in the released format, and the average from them.

        Raises ValueError, on all processes, if one of them can't, or the folder holds another model.
        """

        def work() -> None:
            own, theirs = (
                {k: v for k, v in asdict(cfg).items() if k not in WEIGHTLESS}
                for cfg in (self.config.model, ModelConfig.from_hf(folder))
            )
            if different := differences(theirs, own):
                raise ValueError(f"it holds another model ({'; '.join(different)}): give the same --model.… settings")
            fill(self.weights(), folder)

        try:
            together(f"the reading of {folder}", parallel, work, lambda done: done)
        except Failed as failed:
            raise ValueError(f"--init {folder}: {failed}") from None
        self.optimizer.take_weights()
        if self.ema is not None:
            masters = self.optimizer.masters()
            for name, value in self.ema.tensors().items():
                value.copy_(masters[name].detach())

    def close(self) -> None:
        """Ends the average's thread and gives up the groups of processes."""
        if self.ema is not None:
            self.ema.close()
        self.mesh.close()


def schedule_for(config: TrainConfig, swaps: Swaps, micro_batches: int) -> Schedule:
    """The schedule that the settings, or the reader's own part, give for so many micro-batches."""
    if swaps.schedule is not None:
        return swaps.schedule(config.parallel.pp, micro_batches)
    return make_schedule(config.schedule, config.parallel.pp, micro_batches)


def assemble(config: TrainConfig, parallel: DataParallel, swaps: Swaps) -> Job:
    """This process's job. All processes must call it.

    Raises:
        ValueError: the settings don't fit the number of processes, or each other.
    """
    p, o, cfg = config.parallel, config.optim, config.model
    layout = config.layout(parallel.size, node_size())
    mesh = make_mesh(p.pp, layout.dp, p.ep, layout.ranks_per_node, p.timeout)
    transport = DelayedTransport(parts=()) if config.profile is not None else None
    each = cfg.n_routed_experts // p.ep
    dispatch = make_dispatch(
        mesh,
        cfg.n_routed_experts,
        fp8=config.fp8,
        direct=p.dispatch == "direct",
        transport=transport,
        max_tokens=config.batch.micro * config.batch.sequence_length if config.dtype == "bf16" else None,
    )
    # Any number of micro-batches gives the ranks the same stages; the first step's will do.
    first = config.batch.start // (config.batch.micro * layout.dp)
    pipeline = Pipeline(
        cfg,
        schedule_for(config, swaps, first),
        mesh.pp,
        seed=config.seed,
        compute_dtype=DTYPES[config.dtype],
        dispatch=dispatch,
        experts=range(mesh.index("ep") * each, (mesh.index("ep") + 1) * each) if p.ep > 1 else None,
        opposite=mesh.groups.get("pp back"),
        timeout=timedelta(seconds=p.timeout),
        device=parallel.device,
    )
    swaps.apply(pipeline, config.seed)
    for stage in pipeline.stages.values():
        stage.set_recompute(config.recompute)  # type: ignore[operator]
    if config.fp8:
        from dsv3_book.fp8.layers import use_fp8

        use_fp8(pipeline)
    world = dist.group.WORLD if dist.is_initialized() else None
    settings = o.lr, o.betas, o.eps, o.weight_decay, config.moments
    optimizer = ZeRO1(kinds_of(pipeline, mesh), world, *settings, zero=p.zero, make=swaps.optimizer or adamw)
    ema = EMA(optimizer.masters(), o.ema) if o.ema else None
    return Job(config, mesh, pipeline, optimizer, ema, swaps, transport)
