"""What a schedule costs: the time of a step, each rank's bubble, and how many activations it holds at once.

The schedule is the same object that is drawn and executed; only durations are added. A rank runs its list in order; an
action starts when its rank is free and its inputs have arrived: those made on the same rank at once, those from
another rank one `hop` after they were made. Nothing else is assumed, and no torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .queues import Stuck, play
from .schedule import Action, Pair, Schedule, Transfer

StageCost = float | Callable[[int], float]  # one number for all stages, or a function of the stage
PairCost = float | Callable[[int, int], float]  # ... of (stage of the forward, stage of the backward)
HopCost = float | Callable[[int, int], float]  # ... of (rank that sends, rank that receives)


@dataclass(frozen=True)
class Costs:
    """Durations in any one unit.

    `forward`, `input_grad` (I) and `weight_grad` (W) of a chunk: a number, or a function of the stage. A whole backward
    (B) is input_grad + weight_grad. `overlapped` is an overlapped pair (FB): a number, a function of (stage of its
    forward, stage of its backward), or None: nothing gained, the sum of its three parts. `hop` is one tensor's way from
    a stage's rank to the next one's: a number, or a function of (source rank, target rank).
    """

    forward: StageCost = 1.0
    input_grad: StageCost = 1.0
    weight_grad: StageCost = 1.0
    overlapped: PairCost | None = None
    hop: HopCost = 0.0

    def of(self, action: Action | Pair) -> float:
        """How long `action` keeps its rank busy.

        Raises:
            ValueError: a cost that is negative, infinite or not a number.
        """
        if isinstance(action, Pair):
            ahead, back = action.forward.stage, action.backward.stage
            if self.overlapped is None:
                return self._at("forward", ahead) + self._at("input_grad", back) + self._at("weight_grad", back)
            return _checked("overlapped", self.overlapped, ahead, back)
        if action.kind == "B":
            return self._at("input_grad", action.stage) + self._at("weight_grad", action.stage)
        return self._at({"F": "forward", "I": "input_grad", "W": "weight_grad"}[action.kind], action.stage)

    def between(self, source: int, target: int) -> float:
        """How long a tensor travels from rank `source` to rank `target`."""
        return _checked("hop", self.hop, source, target)

    def _at(self, name: str, stage: int) -> float:
        return _checked(name, getattr(self, name), stage)


def _checked(name: str, cost: float | Callable[..., float], *where: int) -> float:
    value = cost(*where) if callable(cost) else cost
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"cost {name!r} at {where} is {value}: a duration must be a finite number, 0 or more")
    return value


class Span(NamedTuple):
    """One action on its rank, from `start` to `end`."""

    rank: int
    action: Action | Pair
    start: float
    end: float


class Flight(NamedTuple):
    """One tensor between two ranks, from `start` to `end` on its link."""

    transfer: Transfer
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step. `spans[rank]` are the rank's actions in order; `flights` what travelled, by departure."""

    name: str
    spans: list[list[Span]]
    flights: list[Flight]

    @property
    def num_ranks(self) -> int:
        return len(self.spans)

    @cached_property
    def makespan(self) -> float:
        """From 0 to the end of the last action of any rank."""
        return max((spans[-1].end for spans in self.spans if spans), default=0.0)

    @cached_property
    def busy(self) -> list[float]:
        """Time each rank works."""
        return [math.fsum(span.end - span.start for span in spans) for spans in self.spans]

    @cached_property
    def bubble(self) -> list[float]:
        """Time each rank does nothing: makespan − busy."""
        return [self.makespan - busy for busy in self.busy]

    def held(self, rank: int) -> list[tuple[float, int]]:
        """(time, how many (stage, micro-batch) activations `rank` holds from then on): from the start of an F to the
        end of its I or B. An FB holds both of its chunks all the time."""
        steps, now = [(0.0, 0)], 0
        for span in self.spans[rank]:
            kinds = [part.kind for part in span.action.parts]
            now += kinds.count("F")
            steps.append((span.start, now))
            now -= kinds.count("I") + kinds.count("B")
            steps.append((span.end, now))
        return steps

    @cached_property
    def peak_activations(self) -> list[int]:
        """The most (stage, micro-batch) activations that each rank holds at once."""
        return [max(count for _, count in self.held(rank)) for rank in range(self.num_ranks)]


def simulate(schedule: Schedule, costs: Costs | None = None, *, busy_links: bool = False) -> Timeline:
    """Run `schedule` on paper.

    Args:
        schedule: actions by rank, as `make_schedule` gives, or a reader's own. Sends are derived by `schedule.sends`.
        costs: durations; without them every F, I and W takes 1 and a hop 0.
        busy_links: a link (source rank, target rank) carries one tensor at a time, in the order of `schedule.sends`;
            otherwise tensors don't hinder each other.

    Raises:
        ValueError: an action appears twice, or nothing can go on; the message says who waits for what.
    """
    costs = costs or Costs()
    transfers = [transfer for rank in range(schedule.num_ranks) for transfer in schedule.sends(rank)]
    # A rank's job is (rank, position in its list); a tensor's is its Transfer, on its link or on a link of its own.
    queues: list[list[Hashable]] = [[(r, i) for i in range(len(todo))] for r, todo in enumerate(schedule.actions)]
    links: dict[Hashable, list[Hashable]] = {}
    for transfer in transfers:
        links.setdefault((transfer.source, transfer.target) if busy_links else transfer, []).append(transfer)
    needs = _needs(schedule, transfers)
    try:
        times = play([*queues, *links.values()], _durations(schedule, transfers, costs), needs)
    except Stuck as stuck:
        raise ValueError(_explain(schedule, stuck, needs)) from None
    spans = [
        [Span(r, action, *times[r, i]) for i, action in enumerate(todo)] for r, todo in enumerate(schedule.actions)
    ]
    flights = sorted((Flight(transfer, *times[transfer]) for transfer in transfers), key=lambda flight: flight.start)
    return Timeline(schedule.name, spans, flights)


def _durations(schedule: Schedule, transfers: list[Transfer], costs: Costs) -> dict[Hashable, float]:
    """How long each job takes. Each kind, stage and link is asked for once: a cost may be a slow function."""
    hops = {link: costs.between(*link) for link in {(transfer.source, transfer.target) for transfer in transfers}}
    durations: dict[Hashable, float] = {transfer: hops[transfer.source, transfer.target] for transfer in transfers}
    known: dict[Hashable, float] = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            alike = tuple((part.kind, part.stage) for part in action.parts)
            if alike not in known:
                known[alike] = costs.of(action)
            durations[rank, position] = known[alike]
    return durations


def _needs(schedule: Schedule, transfers: list[Transfer]) -> dict[Hashable, list[Hashable]]:
    """What each job waits for: jobs that make it or bring it; (kind, stage, micro-batch) where no rank makes it."""
    made: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            for part in action.parts:
                for kind in {"I": "B", "B": "BW"}.get(part.kind, part.kind):
                    what = (kind, part.stage, part.microbatch)
                    if what in made:
                        raise ValueError(
                            f"{part} on rank {rank} does again what rank {made[what][0]} does: see `validate(schedule)`"
                        )
                    made[what] = (rank, position)
    brought = {(t.kind, t.stage, t.microbatch): t for t in transfers}
    needs: dict[Hashable, list[Hashable]] = {t: [made[t.kind, t.stage, t.microbatch]] for t in transfers}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            waits: list[Hashable] = []
            for part in action.parts:
                stage, microbatch = part.stage, part.microbatch
                inputs = []
                if part.kind == "F" and stage > 0:
                    inputs = [("F", stage - 1, microbatch)]
                elif part.kind == "W":
                    inputs = [("B", stage, microbatch)]
                elif part.kind in "IB":
                    inputs = [("F", stage, microbatch)]
                    if stage + 1 < schedule.num_stages:
                        inputs.append(("B", stage + 1, microbatch))
                for what in inputs:
                    maker = made.get(what)
                    waits.append(what if maker is None else maker if maker[0] == rank else brought[what])
            needs[rank, position] = waits
    return needs


def _explain(schedule: Schedule, stuck: Stuck, needs: dict[Hashable, list[Hashable]]) -> str:
    """The ranks that stopped, each with what it waits for. (Links only wait for ranks: they are left out.)"""
    lines = []
    for number, job, missing in stuck.waits:
        if number >= schedule.num_ranks:
            continue
        if isinstance(missing, Transfer):
            [missing] = needs[missing]
        if len(missing) == 3:
            kind, stage, microbatch = missing
            cause = f"{kind}{stage}.{microbatch}, which no rank runs"
        else:
            there, at = missing
            cause = f"{schedule.actions[there][at]}, number {at} of rank {there}'s list"
            cause += " (itself)" if missing == job else ""
        lines.append(
            f"rank {number} stops at {schedule.actions[number][job[1]]} (number {job[1]}) and waits for {cause}"
        )
    return f"schedule {schedule.name!r} can't go on: " + "; ".join(lines)
