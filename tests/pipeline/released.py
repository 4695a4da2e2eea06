"""The released step, played literally: its eight steps with their loops and flags, writing down what a rank computes.

An independent second description of DualPipe's order (deepseek-ai/DualPipe, ``dualpipe.py`` and ``dualpipev.py``), kept
as close to the released control flow as a test needs: phases, per-phase counters, a flag that splits a backward, a
queue of weight gradients.
"""

from dataclasses import dataclass, field


@dataclass
class Rank:
    """What one rank of the released code remembers during a step."""

    stage: dict[int, int]  # module number -> stage
    first: dict[int, int]  # module number -> number of its first micro-batch
    flipped: bool  # in the second half of a two-way pipeline phase 0 is module 1
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    queue: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def _forward(self, phase: int) -> str:
        module = phase ^ self.flipped
        chunk = self.first[module] + self.forwards[module]
        self.forwards[module] += 1
        return f"F{self.stage[module]}.{chunk}"

    def _backward(self, phase: int, split: bool) -> str:
        module = phase ^ self.flipped
        chunk = self.first[module] + self.backwards[module]
        self.backwards[module] += 1
        if split:
            self.queue.append(f"W{self.stage[module]}.{chunk}")
        return f"{'I' if split else 'B'}{self.stage[module]}.{chunk}"

    def forward(self, phase: int) -> None:
        self.done.append(self._forward(phase))

    def backward(self, phase: int, enable_zb: bool = False) -> None:
        self.done.append(self._backward(phase, enable_zb))

    def both(self, phase_f: int, phase_b: int) -> None:
        self.done.append(self._forward(phase_f) + "+" + self._backward(phase_b, False))

    def weight(self) -> None:
        self.done.append(self.queue.pop(0))


def eight_steps(rank: Rank, half_ranks: int, half_rank: int, chunks: int) -> list[str]:
    """`chunks`: micro-batches of one direction."""
    middle = half_rank == half_ranks - 1
    for _ in range((half_ranks - half_rank - 1) * 2):  # step 1
        rank.forward(0)
    for _ in range(half_rank + 1):  # step 2
        rank.forward(0)
        rank.forward(1)
    for _ in range(half_ranks - half_rank - 1):  # step 3
        rank.backward(1, enable_zb=True)
        rank.weight()
        rank.forward(1)
    for i in range(chunks - 2 * half_ranks + half_rank + 1):  # step 4
        if i == 0 and middle:
            rank.forward(0)
            rank.backward(1)
        else:
            rank.both(0, 1)
        rank.both(1, 0)
    for _ in range(half_ranks - half_rank - 1):  # step 5
        rank.backward(1)
        rank.both(1, 0)
    enable_zb = False
    step_6 = half_rank + 1
    for i in range(step_6):  # step 6
        if i == step_6 // 2 and half_rank % 2 == 1:
            enable_zb = True
        rank.backward(1, enable_zb)
        if i == step_6 // 2 and half_rank % 2 == 0:
            enable_zb = True
        rank.backward(0, enable_zb)
    for _ in range(half_ranks - half_rank - 1):  # step 7
        rank.weight()
        rank.backward(0, enable_zb=True)
    for _ in range(half_rank + 1):  # step 8
        rank.weight()
    assert not rank.queue
    return rank.done


def dualpipe(num_ranks: int, rank: int, num_chunks: int) -> list[str]:
    half = num_ranks // 2
    state = Rank({0: rank, 1: num_ranks - 1 - rank}, {0: 0, 1: num_chunks // 2}, flipped=rank >= half)
    return eight_steps(state, half, min(rank, num_ranks - 1 - rank), num_chunks // 2)


def dualpipev(num_ranks: int, rank: int, num_chunks: int) -> list[str]:
    state = Rank({0: rank, 1: 2 * num_ranks - 1 - rank}, {0: 0, 1: 0}, flipped=False)
    return eight_steps(state, num_ranks, rank, num_chunks)
