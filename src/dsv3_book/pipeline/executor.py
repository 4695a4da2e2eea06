"""Running a schedule: the very list that is drawn, counted and simulated, on real processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.model.dispatch import Dispatch
from dsv3_book.model.transformer import Losses, Part
from dsv3_book.pipeline.agree import PipelineError, agree, checksum
from dsv3_book.pipeline.cut import Ledger
from dsv3_book.pipeline.overlap import Event, Run, overlapped
from dsv3_book.pipeline.place import place_layers
from dsv3_book.pipeline.schedule import Action, Pair, Schedule, Transfer
from dsv3_book.pipeline.stage import Chunk, LossWeights
from dsv3_book.pipeline.transfers import Transfers, sum_over
from dsv3_book.pipeline.validate import check


@dataclass
class Watch:
    """What a step is asked to write down about itself: parts as they were done, and what autograd kept."""

    events: list[Event] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)


class Pipeline(nn.Module):
    """This rank's stages of a model, and the schedule by which all ranks train it together.

    A rank that runs several stages holds them all; the embedding, which an MTP module reads too, is one and the same
    parameter on a rank that holds both ends. All initial weights are those that `Transformer(cfg, seed)` has.

    Args:
        cfg: the whole model.
        schedule: for as many ranks as `group` has; it is checked first.
        group: the pipeline's processes (torch's default group when None; none is needed for one rank).
        seed, compute_dtype: as for `Transformer`.
        layers: which layers each stage has, in order; `place_layers` decides when None.
        dispatch: how tokens come to their experts, and `experts`: those that live here. All do when None.
        opposite: over NCCL, a second group of the same processes: see `Transfers`.
        timeout: how long to wait for another rank before giving up.

    `waited` is how many seconds this rank stood still for others in the last step: its bubble, as it really was.

    Raises:
        ValueError: the schedule is wrong or for another number of ranks; the layers don't fit the stages or the model.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        schedule: Schedule,
        group: dist.ProcessGroup | None = None,
        *,
        seed: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        layers: Sequence[range] | None = None,
        dispatch: Dispatch | None = None,
        experts: range | None = None,
        opposite: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(minutes=5),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check(schedule)
        self.cfg, self.schedule, self.group, self.opposite, self.timeout = cfg, schedule, group, opposite, timeout
        self.seed, self.waited = seed, 0.0
        size = dist.get_world_size(group) if dist.is_initialized() else 1
        if schedule.num_ranks > 1 and size != schedule.num_ranks:
            raise ValueError(f"the schedule is for {schedule.num_ranks} ranks, the group has {size} processes")
        self.rank = dist.get_rank(group) if schedule.num_ranks > 1 else 0
        last = schedule.num_stages - 1
        self.layers = list(layers) if layers is not None else place_layers(cfg, schedule.num_stages)
        if [i for r in self.layers for i in r] != list(range(cfg.num_hidden_layers)) or len(self.layers) != last + 1:
            raise ValueError(
                f"layers {self.layers} must be {last + 1} ranges, one a stage, that together count the model's "
                f"{cfg.num_hidden_layers} layers from 0"
            )
        self.stages = nn.ModuleDict()
        for stage in schedule.stages(self.rank):
            part = Part(self.layers[stage], embed=stage == 0, head=stage == last, experts=experts)
            self.stages[str(stage)] = Transformer(cfg, seed, compute_dtype=compute_dtype, part=part, device=device)
        if dispatch is not None:
            for model in self.stages.values():
                model.dispatch = dispatch  # type: ignore[assignment]
        self.compute_dtype = compute_dtype
        ends = [self.stages[key] for key in ("0", str(last)) if key in self.stages]
        if len(ends) == 2 and hasattr(ends[1], "embed_tokens"):
            ends[1].embed_tokens = ends[0].embed_tokens
        self.chunks: dict[tuple[int, int], Chunk] = {}
        self.failed = False
        self.checksum = self._checksum()

    def follow(self, schedule: Schedule) -> None:
        """From the next step on, this schedule: of the same stages, and as a rule another number of micro-batches.

        Raises:
            ValueError: it is wrong, or gives some rank other stages.
        """
        if schedule is self.schedule:
            return
        check(schedule)
        stages = [[plan.stages(rank) for rank in range(plan.num_ranks)] for plan in (self.schedule, schedule)]
        if stages[0] != stages[1]:
            raise ValueError(
                f"{schedule.name} gives the ranks the stages {stages[1]}, but this pipeline was built for {stages[0]}"
            )
        self.schedule = schedule
        self.checksum = self._checksum()

    def _checksum(self) -> int:
        return checksum((self.schedule.actions, self.layers, self.cfg, self.seed))

    # Who holds what ----------------------------------------------------------------------------------------------
    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by the names they have in the whole model."""
        return {n: p for model in self.stages.values() for n, p in model.named_parameters()}

    def holders(self, name: str) -> list[int]:
        """The ranks of the pipeline that hold this parameter: more than one for mirrored stages, and for an embedding
        that the MTP modules read on another rank."""
        schedule, last = self.schedule, self.schedule.num_stages - 1
        if name.startswith("embed_tokens"):
            stages = {0, last} if self.cfg.num_nextn_predict_layers else {0}
        elif not name.startswith("layers."):
            stages = {last}
        else:
            layer = int(name.split(".")[1])
            stages = {next((s for s, held in enumerate(self.layers) if layer in held), last)}
        return [r for r in range(schedule.num_ranks) if stages & set(schedule.stages(r))]

    def router_names(self) -> list[str]:
        """The routers of the whole model, MTP's last: the order of `Losses.load`."""
        cfg = self.cfg
        layers = range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
        return [f"layers.{i}.mlp.gate" for i in layers if cfg.is_moe_layer(i)]

    # A step ------------------------------------------------------------------------------------------------------
    def step(
        self,
        micro_batches: Sequence[Int[Tensor, "B width"]],
        mtp_weight: float = 0.0,
        of: int | None = None,
        watch: Watch | None = None,
        sum_copies: bool = True,
    ) -> Losses:
        """Forward and backward of all micro-batches; adds to the gradients of (main + λ·mtp + balance) / `of`.

        `micro_batches` are the schedule's M, each [B, T + 1 + J], the same on all ranks of the pipeline; only the first
        and the last stage look into them. `of` is the step's number of micro-batches in all data-parallel pipelines
        together (M when None). Copies of a parameter on several ranks get the sum of their gradients; with
        `sum_copies=False` each keeps its own, for ZeRO-1 to sum over all holders at once (`optim/zero.py`).

        Returns, on every rank, the means over the M micro-batches of the losses, and the summed load of all routers.

        Raises:
            ValueError: micro-batches that no step can be made of.
            PipelineError: the ranks disagree, one of them failed, or did not answer in time. A step after one that was
                broken off is refused: messages may still be under way.
        """
        micro_batches = list(micro_batches)
        if self.failed:
            raise PipelineError(f"rank {self.rank}: an earlier step was broken off; start new processes")
        terms = {"dtype": self.compute_dtype, "mtp_weight": mtp_weight}
        terms["checksum of schedule, layers, model and seed"] = self.checksum
        agree(self.cfg, self.schedule, self.group, micro_batches, of, terms)
        count = len(micro_batches) if of is None else of
        B, width = micro_batches[0].shape
        T = width - 1 - self.cfg.num_nextn_predict_layers
        device: torch.device = next(iter(self.stages.values())).device  # type: ignore[assignment]
        like = torch.empty(B, T, self.cfg.hidden_size, dtype=self.compute_dtype, device=device)
        self.weights = LossWeights.of(count, mtp_weight, self.cfg.num_nextn_predict_layers, device)
        self.transfers = Transfers(self.schedule, self.group, self.opposite, like, self.timeout)
        self.tokens, self.watch = micro_batches, watch
        self.handed: dict[tuple[str, int, int], Tensor] = {}
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.load: dict[str, Tensor] = defaultdict(lambda: torch.zeros(self.cfg.n_routed_experts, device=device))
        if watch is not None:
            watch.ledger.ignore |= {p.untyped_storage().data_ptr() for p in self.parameters()}
        if sum_copies:
            self._set_aside()
        self.failed = self.schedule.num_ranks > 1  # until the step is done
        for action in self.schedule.actions[self.rank]:
            try:
                self._run(action)
            except Exception as error:
                raise PipelineError(f"rank {self.rank}, at {describe(action)}: {error}") from error
        try:
            self.transfers.finish()
            if sum_copies:
                self._sum_copies()
            self.waited = self.transfers.waited
            losses = self._summed(len(micro_batches))
        except Exception as error:
            raise PipelineError(f"rank {self.rank}, after its last action: {error}") from error
        self.failed = False
        return losses

    def _run(self, action: Action | Pair) -> None:
        if isinstance(action, Pair):
            f, b = action.forward, action.backward
            y, dx = overlapped(self._forward(f, paired=True), self._backward(b, paired=True))
            self._hand_on("F", f, y)
            self._hand_on("B", b, dx)
            del self.chunks[b.stage, b.microbatch]
        elif action.kind == "F":
            self._hand_on("F", action, self._forward(action).finish())
        elif action.kind == "W":
            began = time.perf_counter()
            self.chunks.pop((action.stage, action.microbatch)).weight_gradients()
            if done := self._recorder(action, paired=False):
                done("weight gradients", began, time.perf_counter())
        else:
            self._hand_on("B", action, self._backward(action).finish())
            if action.kind == "B":
                del self.chunks[action.stage, action.microbatch]

    def _forward(self, action: Action, paired: bool = False) -> Run:
        stage, m = action.stage, action.microbatch
        model = self.stages[str(stage)]
        x = None if stage == 0 else self._take("F", stage - 1, m)
        entry = self.watch.ledger.entry((stage, m)) if self.watch else None
        chunk = Chunk(model, self.tokens[m], model.dispatch, entry)  # type: ignore[arg-type]
        self.chunks[stage, m] = chunk
        return Run(chunk.forward(x), self._recorder(action, paired))

    def _backward(self, action: Action, paired: bool = False) -> Run:
        stage, m = action.stage, action.microbatch
        chunk = self.chunks[stage, m]
        dy = None if stage == self.schedule.num_stages - 1 else self._take("B", stage + 1, m)
        parts = chunk.backward(dy, self.weights, now=action.kind == "B")
        return Run(parts, self._recorder(action, paired))

    def _recorder(self, action: Action, paired: bool) -> Callable[[str, float, float], None] | None:
        if self.watch is None:
            return None
        kind, events = "B" if action.kind == "I" else action.kind, self.watch.events

        def done(part: str, start: float, end: float) -> None:
            events.append(Event(kind, action.stage, action.microbatch, part, start, end, paired))

        return done

    # What goes from stage to stage -------------------------------------------------------------------------------
    def _take(self, kind: str, stage: int, m: int) -> Tensor:
        """The output ("F") or input gradient ("B") of another stage's chunk, from wherever it was made."""
        source, _ = self.schedule.where(kind, stage, m)
        if source == self.rank:
            return self.handed.pop((kind, stage, m))
        return self.transfers.receive(Transfer(kind, stage, m, source, self.rank))

    def _hand_on(self, kind: str, action: Action, value: Tensor | None) -> None:
        """Gives a chunk's result to whoever runs this micro-batch's next (or, backward, previous) stage."""
        stage, m = action.stage, action.microbatch
        if kind == "F":
            chunk, names = self.chunks[stage, m], [n for n, _ in self.stages[str(stage)].routers()]  # type: ignore[operator]
            self.losses += chunk.losses()
            for name, load in zip(names, chunk.loads(), strict=True):
                self.load[name] += load
        if value is None:
            return
        target, _ = self.schedule.where(kind, stage + 1 if kind == "F" else stage - 1, m)
        if target == self.rank:
            self.handed[kind, stage, m] = value
        else:
            self.transfers.send(Transfer(kind, stage, m, self.rank, target), value)

    # After the last action ---------------------------------------------------------------------------------------
    def _copied(self) -> list[tuple[tuple[int, ...], list[nn.Parameter]]]:
        """This rank's parameters that others hold too, by who does."""
        shared: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for name, p in sorted(self.parameters_by_name().items()):
            holders = self.holders(name)
            if len(holders) > 1:
                shared[tuple(holders)].append(p)
        return sorted(shared.items())

    def _set_aside(self) -> None:
        """Takes the gradients of earlier steps, which are sums over all copies already, out of this one's."""
        self.earlier = {p: p.grad for _, parameters in self._copied() for p in parameters if p.grad is not None}
        for p in self.earlier:
            p.grad = None

    def _sum_copies(self) -> None:
        """Adds to every copy of a parameter the sum of all copies' gradients; those with one holder are left alone.

        Here, after the last W: a weight gradient that was put off would not be in it earlier.
        """
        for ranks, parameters in self._copied():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for p, total in zip(parameters, sum_over(gradients, list(ranks), self.rank, self.group), strict=True):
                p.grad = total + self.earlier.pop(p) if p in self.earlier else total

    def _summed(self, micro_batches: int) -> Losses:
        loads = [self.load[name] for name in self.router_names()]
        totals = torch.cat([self.losses / micro_batches, *(load.double() for load in loads)])
        if self.schedule.num_ranks > 1:
            dist.all_reduce(totals, group=self.group)
        main, mtp, balance = totals[:3].float()
        return Losses(main, mtp, balance, totals[3:].view(len(loads), self.cfg.n_routed_experts).float())


def describe(action: Action | Pair) -> str:
    """An action in words, for messages."""
    names = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "backward"}
    return " with ".join(f"{names[a.kind]} of stage {a.stage}, micro-batch {a.microbatch}" for a in action.parts)
