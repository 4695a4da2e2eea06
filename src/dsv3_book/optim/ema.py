"""The exponential moving average of the weights, kept in CPU memory and updated while the next step computes.

Report §3.2.3: an EMA of the parameters gives an early estimate of the model after the learning rate's decay; it is
stored in CPU memory and updated asynchronously after each step, so that it costs neither GPU memory nor time. The
report gives no decay: 0.999, an average over about the last thousand steps, is our choice.

    average ← average + (1 − decay) · (weights − average)          fp32, once after every optimiser step

An update has two parts. The *snapshot* copies the weights out of the optimiser's way. The *average* is then brought up
to date from the snapshot by a thread of its own, under the next step's compute. On a GPU the snapshot travels on a
stream of its own into pinned memory, and only the next optimiser step waits for it; on a CPU it is a plain copy, which
the caller waits for (8 bytes of memory traffic a weight, where AdamW itself moves 28 with fp32 moments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DECAY = 0.999
PIECE = 2**14  # numbers; torch works on so few with one thread. With more, the average's thread would begin a team of
# OpenMP threads of its own, and with two teams on its cores OpenMP no longer lets idle threads spin for the next piece
# of work but puts them to sleep: every operation of the step, with its own team, then waits for them to wake.


class EMA:
    """The average of `weights`, which starts as a copy of them.

        ema = EMA(dict(model.named_parameters()))        # with ZeRO: EMA(optimizer.masters()), this rank's part only
        ...
        ema.before_step()
        optimizer.step()
        ema.update()                                     # returns at once

        with ema.swapped():                              # with ZeRO: ema.swapped(optimizer.gather_weights)
            evaluate(model)

    weights: fp32 tensors by name that the optimiser updates in place. decay: in [0, 1).

    Raises:
        ValueError: a decay outside of [0, 1), or weights that are not fp32 (of bf16 ones give the master weights: an
            average in bf16 would stand still).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float = DECAY) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        for name, weight in weights.items():
            if weight.dtype != torch.float32:
                raise ValueError(f"the average is over fp32 (master) weights, but {name} is {weight.dtype}")
        self.decay = decay
        self.weights = dict(weights)
        self.streams = {w.device: torch.cuda.Stream(w.device) for w in weights.values() if w.is_cuda}
        self.average = {name: torch.empty(w.shape, dtype=w.dtype).copy_(w.detach()) for name, w in weights.items()}
        self.kept = {
            name: torch.empty(w.shape, dtype=w.dtype, pin_memory=bool(self.streams)) for name, w in weights.items()
        }
        self.pieces = [list(_pieces(tensors.values())) for tensors in (self.average, self.kept)]
        self.events: list[Any] = []  # CUDA: the snapshot has been read
        self.worker = ThreadPoolExecutor(1, "ema")
        self.running: Future[None] | None = None
        self.is_swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes a snapshot of the weights as they are now, and lets the average follow; finishes the last one first."""
        if self.is_swapped:
            raise RuntimeError("the weights are swapped with their average: leave `swapped` before the next update")
        self.wait()
        for device, stream in self.streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for name, weight in self.weights.items():
            if weight.is_cuda:
                with torch.cuda.stream(self.streams[weight.device]):
                    self.kept[name].copy_(weight, non_blocking=True)
            else:
                self.kept[name].copy_(weight)
        self.events = [stream.record_event() for stream in self.streams.values()]
        self.running = self.worker.submit(self._follow, self.events)

    def before_step(self) -> None:
        """Makes what is queued on the GPU from now on wait until the snapshot is read. (On a CPU it is already.)"""
        for event in self.events:
            event.wait()

    def wait(self) -> None:
        """Returns when the average is up to date; raises what went wrong in its thread, if anything did."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def tensors(self) -> dict[str, Tensor]:
        """The average by name, up to date: to be saved, or filled in place."""
        self.wait()
        return self.average

    @contextmanager
    def swapped(self, gather: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Inside, the weights *are* their average; afterwards they are what they were, bit for bit.

        gather: called after both exchanges, where what computes is made from these weights (ZeRO's `gather_weights`).
            All ranks of a weight's group must call it alike; so after an error inside it is called only by a process
            that is alone: the others may never come.
        """
        if self.is_swapped:
            raise RuntimeError("the weights are swapped with their average already")
        self.wait()
        self._exchange(self.kept, self.average)
        self.is_swapped = True
        try:
            gather()
            yield
        except BaseException:
            self._swap_back()
            if not dist.is_initialized():
                gather()
            raise
        self._swap_back()
        gather()

    def _swap_back(self) -> None:
        self._exchange(None, self.kept)
        self.is_swapped = False

    def close(self) -> None:
        """Finishes the last update and ends the thread."""
        self.wait()
        self.worker.shutdown()

    @torch.no_grad()
    def _exchange(self, keep: Mapping[str, Tensor] | None, take: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            if keep is not None:
                keep[name].copy_(weight)
            weight.copy_(take[name])

    def _follow(self, events: list[Any]) -> None:
        for event in events:
            event.synchronize()
        average, kept = self.pieces
        if not average:  # this rank has no part of any weight
            return
        with torch.no_grad():
            torch._foreach_lerp_(average, kept, 1 - self.decay)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views of at most PIECE numbers each, which together are these tensors."""
    for tensor in tensors:
        yield from tensor.view(-1).split(PIECE)
