"""Dispatch and combine by DeepEP's kernels, where they are installed (github.com/deepseek-ai/DeepEP, version 2).

Its `ElasticBuffer` does on a GPU what `AllToAll` and `TwoHop` do here with torch's collectives: a row goes once to each
rank (across nodes once to each node), K expert numbers and gates with it; expert numbers of other ranks become −1.
This adapter is written from the library's documentation and its reference in plain torch. It has never run on a GPU:
the tests hold it to a stand-in that checks what it is given. Rows must be bf16.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book.fp8.quantize import dequantize_activation, quantize_activation
from dsv3_book.model.dispatch import Dispatch, Exchange
from dsv3_book.parallel.all_to_all import Landing, experts_each
from dsv3_book.parallel.hop import Slots, sum_runs


def available() -> bool:
    """Whether there are a GPU and the library."""
    return torch.cuda.is_available() and importlib.util.find_spec("deep_ep") is not None


class DeepEp(Dispatch):
    """An expert-parallel group whose rows travel in DeepEP's buffers.

    max_tokens: the most tokens any rank will ever dispatch at once, the same number on all ranks; the buffer, made with
    the first rows, is sized by it.  fp8: as for `AllToAll`.

    Raises:
        ValueError: the experts don't divide among the ranks, or rows are too many or not bf16.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, max_tokens: int, *, fp8: bool = False) -> None:
        self.library: Any = importlib.import_module("deep_ep")
        self.group, self.num_experts, self.max_tokens, self.fp8 = group, num_experts, max_tokens, fp8
        self.rank, self.ranks = group.rank(), group.size()
        self.each = experts_each(num_experts, self.ranks)
        self.buffer: Any = None

    def plan(self, experts: Int[Tensor, "N K"], x: Float[Tensor, "N D"] | None = None) -> DeepEpExchange:
        return DeepEpExchange(self, experts)

    def room(self, hidden: int, topk: int) -> Any:
        """The buffer. Deterministic: rows arrive sorted by source rank and token."""
        if self.buffer is None:
            self.buffer = self.library.ElasticBuffer(
                self.group,
                num_max_tokens_per_rank=self.max_tokens,
                hidden=hidden,
                num_topk=topk,
                use_fp8_dispatch=self.fp8,
                deterministic=True,
            )
        return self.buffer


class DeepEpExchange(Exchange):
    """An `Exchange` of one routing. The layout is made by the first scatter, and used again by all that follows."""

    def __init__(self, dispatch: DeepEp, experts: Tensor) -> None:
        self.dispatch, self.experts = dispatch, experts
        self.handle: Any = None
        self.landing: Landing | None = None
        self.chosen: Tensor | None = None  # [C, K]: which entries of what arrived are slots of experts here

    @property
    def counts(self) -> Int[Tensor, " E"]:
        if self.landing is None:
            raise AttributeError("counts: the first scatter must have arrived")
        return self.landing.counts

    def scatter(self, x: Float[Tensor, "N D"], gates: Float[Tensor, "N K"] | None) -> Event:
        at = self.dispatch
        if x.dtype != torch.bfloat16 or len(x) > at.max_tokens:
            raise ValueError(f"{len(x)} rows of {x.dtype}: DeepEP takes up to {at.max_tokens} (max_tokens) of bfloat16")
        buffer = at.room(x.shape[1], self.experts.shape[1])
        weights = None if gates is None else gates.detach().float()
        first = self.handle is None
        layout: dict[str, Any] = {"handle": self.handle}
        if first:
            layout = {"topk_idx": self.experts.to(at.library.topk_idx_t), "topk_weights": weights}
            layout |= {"num_experts": at.num_experts, "num_max_tokens_per_rank": at.max_tokens}
        elif weights is not None:
            layout["topk_weights"] = weights
        x = x.detach().contiguous()
        payload = quantize_activation(x, pow2=True) if at.fp8 else x
        rows, experts, weights, handle, event = buffer.dispatch(payload, async_with_compute_stream=True, **layout)
        if first:
            self.handle = handle

        def finish() -> tuple[Tensor, Tensor | None]:
            if first:
                self._land(experts)
            assert self.landing is not None and self.chosen is not None
            came = dequantize_activation(rows[0], rows[1], x.dtype) if isinstance(rows, tuple) else rows
            numbers = None if gates is None else weights[self.chosen][self.landing.order].to(gates.dtype)
            return came.index_select(0, self.landing.copy), numbers

        return Event(event, finish)

    def gather(self, y: Float[Tensor, "S D"], gates: Float[Tensor, " S"] | None) -> Event:
        landing, chosen = self.landing, self.chosen
        assert landing is not None and chosen is not None, "nothing has arrived that could go back"
        weights = None
        if gates is not None:
            weights = torch.zeros(chosen.shape, dtype=torch.float32, device=y.device)
            weights[chosen] = gates.detach().float()[landing.place]
        rows = sum_runs(y.detach(), landing.place, landing.slots)
        total, back, event = self.dispatch.buffer.combine(
            rows, self.handle, topk_weights=weights, async_with_compute_stream=True
        )
        return Event(event, lambda: (total, None if gates is None else back.to(gates.dtype)))

    def _land(self, experts: Tensor) -> None:
        """experts [C, K]: the number, among those here, of each entry's expert; −1 for an expert elsewhere."""
        at = self.dispatch
        self.chosen = experts >= 0
        row = self.chosen.nonzero()[:, 0]
        key = (experts[self.chosen].long() + at.rank * at.each) * at.ranks
        self.landing = Landing(Slots(row, key), len(experts), at.ranks, at.each, at.rank)


class Event:
    """What is under way on DeepEP's own stream."""

    def __init__(self, event: Any, finish: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        self.event, self.finish = event, finish

    def wait(self) -> tuple[Tensor, Tensor | None]:
        self.event.current_stream_wait()
        return self.finish()
