"""Inside one overlapped pair: a GPU's two streams, one that computes and one that communicates.

A chunk's layer has parts (report §3.2.1): attention, all-to-all dispatch, MLP, all-to-all combine. Forward F runs them
in this order; the backward B runs them from the end, and splits the gradients of attention and MLP into one for the
input (here also "B", as in the released profile) and one for the weights, W, that nothing waits for. A transfer's
backward is the opposite transfer: combine(B) sends gradients to the experts as dispatch(F) sends tokens.

Run alone, a chunk waits for every transfer. A pair takes the forward of one micro-batch and the backward of another
and weaves them so that while one's transfer is under way the other computes. `RELEASED` is the order of the released
profile (deepseek-ai/profile-data, train.json). Each stream is a queue in that order; a part starts when its stream is
free and its needs are done, and nothing else is assumed. In particular a part takes as long as it is said to, whatever
runs beside it: on the real GPU the two streams share the chip, so durations measured together must be put in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .queues import Stuck, play

# The parts of one layer's forward and one layer's backward, in the order of the released profile.
# fmt: off
RELEASED = (
    "combine(B)", "attention(F)", "mlp(B)", "dispatch(F)", "dispatch(B)",
    "mlp(W)", "mlp(F)", "attention(B)", "attention(W)", "combine(F)",
)
# fmt: on
FORWARD = ("attention(F)", "dispatch(F)", "mlp(F)", "combine(F)")
BACKWARD = ("combine(B)", "mlp(B)", "dispatch(B)", "attention(B)")
WEIGHTS = {"mlp(W)": "mlp(B)", "attention(W)": "attention(B)"}  # what each needs

# A layer: durations of its parts. A part that is left out doesn't exist (a dense layer has no dispatch; an output head
# is a "layer" of mlp parts alone).
Layer = Mapping[str, float]

# Busy milliseconds of kernels per layer, mean of the four layers of the released profile.
# mlp(W)'s kernels run on two streams beside each other, so its busy time is more than the time it takes.
# fmt: off
PROFILE: Layer = {
    "combine(B)": 5.77, "attention(F)": 4.36, "mlp(B)": 5.31, "dispatch(F)": 6.69, "dispatch(B)": 7.49,
    "mlp(W)": 6.38, "mlp(F)": 4.60, "attention(B)": 9.34, "attention(W)": 2.39, "combine(F)": 8.68,
}
# Wall milliseconds of each part, first kernel's start to last kernel's end, layer by layer (*released profile*, our
# reading of its events): what the parts take in company, short of the waits between them.
PROFILE_LAYERS: tuple[Layer, ...] = tuple(
    dict(zip(RELEASED, row, strict=True))
    for row in (
        # comb B  attn F  mlp B  disp F  disp B  mlp W  mlp F  attn B  attn W  comb F
        (4.424,  4.833,  5.746, 6.087,  7.338,  5.333, 4.289, 9.215,  2.381,  7.327),
        (5.227,  4.393,  5.467, 5.746,  7.912,  5.059, 4.420, 9.563,  2.390,  8.262),
        (6.210,  4.567,  5.467, 7.129,  7.517,  5.260, 5.212, 9.646,  2.400,  9.541),
        (7.275,  4.602,  4.772, 7.988,  7.466,  4.639, 4.644, 9.737,  2.412,  9.653),
    )
)
# fmt: on
PROFILE_SPAN, PROFILE_COMMUNICATION, PROFILE_HIDDEN = 129.0, 114.5, 110.3  # ms, the whole pair (*released profile*)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of one layer on its stream. `layer` counts from 0 in the order that this chunk runs its layers."""

    name: str
    layer: int
    start: float
    end: float

    @property
    def communicates(self) -> bool:
        return is_communication(self.name)


@dataclass(frozen=True)
class Streams:
    """What two streams did. Times are in the unit of the durations; the first part starts at 0."""

    parts: list[Part]  # by start

    @cached_property
    def span(self) -> float:
        return max((part.end for part in self.parts), default=0.0)

    @cached_property
    def compute(self) -> float:
        """Busy time of the compute stream."""
        return sum(part.end - part.start for part in self.parts if not part.communicates)

    @cached_property
    def communication(self) -> float:
        """Busy time of the communication stream."""
        return sum(part.end - part.start for part in self.parts if part.communicates)

    @cached_property
    def hidden(self) -> float:
        """Communication time during which the compute stream is busy."""
        return sum(time for under in self.under.values() for time in under.values())

    @property
    def hidden_share(self) -> float:
        """hidden / communication; 1 when there is no communication."""
        return self.hidden / self.communication if self.communication else 1.0

    @cached_property
    def under(self) -> dict[str, dict[str, float]]:
        """Which computation hides which transfer: {communication part: {compute part: time}}, summed over layers."""
        table: dict[str, dict[str, float]] = {}
        for transfer in self.parts:
            if not transfer.communicates:
                continue
            row = table.setdefault(transfer.name, {})
            for part in self.parts:
                shared = min(part.end, transfer.end) - max(part.start, transfer.start)
                if not part.communicates and shared > 0:
                    row[part.name] = row.get(part.name, 0.0) + shared
        return table


def is_communication(name: str) -> bool:
    """Whether a part belongs to the communication stream."""
    return name.startswith(("dispatch", "combine"))


def pair(forward: Sequence[Layer], backward: Sequence[Layer], order: Sequence[str] = RELEASED) -> Streams:
    """One overlapped pair: the forward of one chunk and the whole backward of another.

    Args:
        forward: durations of the forward chunk's layers, first to last (its own parts are read, the rest ignored).
        backward: durations of the backward chunk's layers in the order they run, so last to first.
        order: in which each step (the i-th layer of both) is issued; each stream takes its parts in this order.

    Raises:
        ValueError: `order` is not made of the ten parts, or makes a part wait for one queued behind it.
    """
    if sorted(order) != sorted(RELEASED):
        raise ValueError(f"an order names each of {', '.join(RELEASED)} once, got {', '.join(order)}")
    issued = [
        (name, i)
        for i in range(max(len(forward), len(backward)))
        for name in order
        if _has(forward if name in FORWARD else backward, i, name)
    ]
    return _run(issued, forward, backward, both=True)


def alone(kind: str, layers: Sequence[Layer], both: bool = False) -> Streams:
    """One chunk with nothing to overlap: every transfer is waited for.

    Args:
        kind: "F", "I" (input gradients only), "W" (weight gradients only) or "B" (I and W of each layer in turn).
        layers: durations in the order that the chunk runs its layers.
        both: keep two streams: in a B, weight gradients then run while a transfer is under way (F, I, W don't change).
    """
    names = {"F": FORWARD, "I": BACKWARD, "W": tuple(WEIGHTS)}
    if kind == "B":
        chosen: tuple[str, ...] = tuple(name for name in RELEASED if name not in FORWARD)
    elif kind in names:
        chosen = names[kind]
    else:
        raise ValueError(f"a chunk is F, I, W or B, not {kind!r}")
    issued = [(name, i) for i in range(len(layers)) for name in chosen if _has(layers, i, name)]
    return _run(issued, layers, layers, both)


def _has(layers: Sequence[Layer], i: int, name: str) -> bool:
    return i < len(layers) and name in layers[i]


def _run(issued: list[tuple[str, int]], forward: Sequence[Layer], backward: Sequence[Layer], both: bool) -> Streams:
    """Play parts (name, layer) on one stream, or on two, in the order they are issued."""
    needs: dict[tuple[str, int], list[tuple[str, int]]] = {}
    here = set(issued)
    for names, layers in ((FORWARD, forward), (BACKWARD, backward)):
        # A chunk is one chain through all its layers: each part needs the one before it, of those that exist.
        chain = [(name, i) for i in range(len(layers)) for name in names if (name, i) in here]
        needs.update({after: [before] for before, after in pairwise(chain)})
    for weights, gradient in WEIGHTS.items():
        needs.update({(name, i): [(gradient, i)] for name, i in issued if name == weights and (gradient, i) in here})
    durations = {(name, i): (forward if name in FORWARD else backward)[i][name] for name, i in issued}
    queues = [[part for part in issued if is_communication(part[0]) == kind] for kind in (False, True)]
    try:
        times = play(queues if both else [issued], durations, needs)
    except Stuck as stuck:
        said = (f"{name} of layer {i} waits for {need} of layer {j}" for _, (name, i), (need, j) in stuck.waits)
        raise ValueError("this order can't run: " + "; ".join(said)) from None
    parts = [Part(name, i, *times[name, i]) for name, i in issued]
    return Streams(sorted(parts, key=lambda part: (part.start, part.communicates)))
