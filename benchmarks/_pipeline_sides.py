"""The sides of `pipeline.py`: our executor, torch's schedules over the same stages, and the model in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.model.balance import sequence_balance_loss
from dsv3_book.model.wgrad import WeightGradients
from dsv3_book.parallel.data import DataParallel
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule

CONFIG = ModelConfig.preset("laptop").replace(num_nextn_predict_layers=0)
M, SEQUENCES, LENGTH = 8, 2, 256  # micro-batches a step, and their size


def micro_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, CONFIG.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator) for _ in range(M)]


class Ours:
    """A step of the executor, and the same chunks without it."""

    def __init__(self, name: str) -> None:
        self.batches, self.dy = micro_batches(), torch.randn(SEQUENCES, LENGTH, CONFIG.hidden_size)
        self.pipeline = Pipeline(CONFIG, make_schedule(name, dist.get_world_size(), M))
        self.named = self.pipeline.parameters_by_name()

    def step(self) -> None:
        self.pipeline.step(self.batches)

    def bare(self) -> None:
        """This rank's actions in their order, each a plain forward or backward, from made-up inputs and gradients."""
        pipeline, kept = self.pipeline, {}
        for action in pipeline.schedule.actions[pipeline.rank]:
            for part in action.parts:
                key = part.stage, part.microbatch
                if part.kind == "F":
                    model = pipeline.stages[str(part.stage)]
                    kept[key] = _forward(model, self.batches[part.microbatch], self.dy), WeightGradients()  # type: ignore[arg-type]
                elif part.kind == "W":
                    kept.pop(key)[1].run()
                elif part.kind == "I":
                    outputs, store = kept[key]
                    kept[key] = [], store
                    with store:
                        torch.autograd.backward(*outputs)
                else:
                    torch.autograd.backward(*kept.pop(key)[0])


def _forward(model: Transformer, tokens: Tensor, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A chunk's outputs, and the gradients that backward starts from."""
    x = model.embed(tokens[:, :-1]) if model.part.embed else torch.randn_like(dy).requires_grad_()
    y, routings = model.run_blocks(x)
    one = torch.ones(()) / M
    if model.part.head:
        losses = model.head_losses(y, tokens, routings)
        return [losses.main + losses.balance], [one]
    balance = [_balance(routing.scores) for routing in routings]
    return [y, *balance], [dy, *(one for _ in balance)]


def _balance(scores: Tensor) -> Tensor:
    return sequence_balance_loss(scores.view(SEQUENCES, LENGTH, -1), CONFIG.num_experts_per_tok, CONFIG.aux_loss_alpha)


class Theirs:
    """A step of torch's schedule over the same stages as `ours`."""

    def __init__(self, ours: Ours, name: str, deferred: bool = False) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV

        batches = micro_batches()
        self.inputs = torch.cat([b[:, :-1] for b in batches])
        self.targets = torch.cat([b[:, 1:] for b in batches])
        self.later = Later() if deferred else None
        schedule = ours.pipeline.schedule
        models = {
            stage: Transformer(CONFIG, part=ours.pipeline.stages[str(stage)].part)  # type: ignore[arg-type]
            for stage in schedule.stages(dist.get_rank())
        }
        self.named = {n: p for model in models.values() for n, p in model.named_parameters()}
        rows = torch.empty_like(ours.dy).requires_grad_()
        stages = [
            PipelineStage(
                Stage(model), number, schedule.num_stages, torch.device("cpu"),
                input_args=rows if number else batches[0][:, :-1], output_args=rows, dw_builder=self.later,
            )
            for number, model in models.items()
        ]  # fmt: skip
        self.first, self.last = 0 in models, schedule.num_stages - 1 in models
        head = models.get(schedule.num_stages - 1)
        loss = lambda hidden, targets: head.token_loss(hidden, targets)  # type: ignore[union-attr]
        if name == "1f1b":
            self.schedule: Any = Schedule1F1B(stages[0], M, loss_fn=loss)
        else:
            self.schedule = ScheduleDualPipeV(stages, M, loss_fn=loss)

    def step(self) -> None:
        if self.later:
            self.later.begin()
        self.schedule.step(
            *([self.inputs] if self.first else []),
            target=self.targets if self.last else None,
            losses=[] if self.last else None,
            return_outputs=False,
        )
        if self.later:
            self.later.end()


class Stage(nn.Module):
    """A part of the model as torch's schedules want it: a tensor in, a tensor out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x, routings = model.run_blocks(model.embed(x) if model.part.embed else x)
        for routing in routings:
            x = _WithLoss.apply(x, _balance(routing.scores))
        return model.norm(x) if model.part.head else x


class _WithLoss(torch.autograd.Function):
    """x unchanged; in backward `loss` gets the gradient of a loss. A balance loss on its way out of a stage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.mark_dirty(x)  # no view: torch's stages detach their outputs in place
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones(())


class Later:
    """Our deferred weight gradients as torch's `dw_builder`: called after a backward, gives what computes its W."""

    def begin(self) -> None:
        self.store = WeightGradients().__enter__()

    def end(self) -> None:
        self.store.__exit__()

    def __call__(self) -> Callable[..., None]:
        done = self.store
        self.end()
        self.begin()
        return lambda *args, **kwargs: done.run()


class Replicas:
    """Each of the processes computes its share of the micro-batches with the whole model; gradients are summed."""

    def __init__(self) -> None:
        self.model, self.batches = Transformer(CONFIG), micro_batches()
        self.named = dict(self.model.named_parameters())

    def step(self) -> None:
        parallel = DataParallel(dist.get_rank(), dist.get_world_size())
        self._compute([self.batches[i] for i in parallel.share(M)])
        parallel.sum_gradients(list(self.model.parameters()))

    def two_threads(self) -> None:
        """All of them on rank 0, with two threads."""
        if dist.get_rank() == 0:
            torch.set_num_threads(2)
            self._compute(self.batches)
            torch.set_num_threads(1)

    def _compute(self, batches: list[Tensor]) -> None:
        for tokens in batches:
            losses = self.model.losses(tokens)
            ((losses.main + losses.balance) / M).backward()
