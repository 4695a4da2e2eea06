"""What a step tells everybody: one vector, so that one message sums it over all processes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_book.model.transformer import Losses
from dsv3_book.parallel import DataParallel


class Totals:
    """Losses, loads and notes of one step, summed over all processes: the same bits on every one.

    losses: main, MTP, balance: means over the step's micro-batches.  load: [routers, E], tokens per expert in the whole
    step.  stop: how many processes were asked to stop.  waited: seconds that a process stood still for others, mean.
    memory: bytes, the largest of all processes'.
    """

    def __init__(
        self, losses: Losses, pp: int, stop: bool, waited: float, memory: float, parallel: DataParallel
    ) -> None:
        """Sends a message: all processes must make theirs.

        losses: of this process's pipeline, the same on its `pp` ranks.  stop, waited, memory: this process's own.
        """
        world = parallel.size
        dp = world // pp
        notes = torch.zeros(2 + world, dtype=torch.float64)
        notes[:2] = torch.tensor([float(stop), waited / world])
        notes[2 + parallel.rank] = memory
        parts = [torch.stack(losses[:3]).double() / dp, losses.load.double().flatten(), notes.to(losses.load.device)]
        values = parallel.sum(torch.cat(parts))  # fp64 counts exactly
        means, load, notes = values.split([3, losses.load.numel(), 2 + world])
        # Every rank of a pipeline brought these two. Divided after the sum, whole numbers stay whole.
        self.losses: Float[Tensor, " 3"] = means / pp
        self.load: Float[Tensor, "routers E"] = (load / pp).view_as(losses.load)
        self.stop, self.waited, *memories = notes.tolist()
        self.memory = max(memories)
