"""A pipeline schedule is data: for each rank, the list of what it does, in order. Nothing else describes it.

The same object is drawn (``draw``), checked (``validate``), timed (``simulate``) and executed (``executor``). When
each thing happens, and what travels, is not in the list; it follows from one rule (:meth:`Schedule.sends`): the output
of an F goes to whoever runs that micro-batch's next stage, the input gradient of an I or B to whoever runs its previous
one, in the order of the list, and a rank takes its next action when all that the action needs is there.

Letters: P ranks, M micro-batches. A *stage* is a contiguous piece of the model; a *chunk* is one micro-batch's work at
one stage: F its forward, I its input gradient, W its weight gradient, B = I and W at once, FB an F and a whole B of two
other chunks run as one overlapped pair. No torch here.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from dsv3_book.pipeline import orders


@dataclass(frozen=True, slots=True)
class Action:
    """One kind of work on one chunk. ``str(Action("F", 3, 0))`` is ``F3.0``: forward at stage 3, micro-batch 0."""

    kind: str  # "F", "I", "W" or "B"
    stage: int
    microbatch: int

    def __post_init__(self) -> None:
        if self.kind not in ("F", "I", "W", "B"):
            raise ValueError(
                f"an action's kind is F, I, W or B, not {self.kind!r}; an overlapped pair is Pair(forward, backward)"
            )

    @property
    def parts(self) -> "tuple[Action, ...]":
        """The actions in it: itself."""
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward and a whole backward of two chunks, overlapped: each one's communication under the other's compute."""

    forward: Action
    backward: Action
    kind: ClassVar[str] = "FB"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The actions in it: the forward, the backward. In this order they send."""
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What an F sends down or an I or B sends up; `stage` and `microbatch` are those of the chunk that sends."""

    kind: str  # "F" or "B"
    stage: int
    microbatch: int
    source: int  # rank
    target: int  # rank


@dataclass(frozen=True, eq=False)
class Schedule:
    """Lists of actions, one for each rank. Don't edit the lists in place; ``dataclasses.replace`` makes a new one."""

    name: str
    num_ranks: int
    num_microbatches: int
    num_stages: int
    actions: list[list[Action | Pair]]

    @classmethod
    def from_text(cls, text: str, name: str = "own") -> "Schedule":
        """Read a schedule as ``str`` writes it: a line for each rank, words like ``F0.1``, ``W2.0`` or ``F0.4+B3.1``.

        The numbers of stages and micro-batches are taken from the words.

        Raises:
            ValueError: no line at all, or a word that is not an action (rank and word are named).
        """
        lines = [line for line in text.splitlines() if line.strip()]
        actions = [[_read_word(word, rank) for word in line.split()] for rank, line in enumerate(lines)]
        parts = [part for mine in actions for action in mine for part in action.parts]
        if not parts:
            raise ValueError("the text holds no action; write a line for each rank, like 'F0.0 B0.0'")
        num_microbatches = 1 + max(part.microbatch for part in parts)
        return cls(name, len(lines), num_microbatches, 1 + max(part.stage for part in parts), actions)

    def __str__(self) -> str:
        return "\n".join(" ".join(str(action) for action in mine) for mine in self.actions)

    @cached_property
    def _places(self) -> dict[tuple[str, int, int], tuple[int, int]]:
        """(F, B or W; stage; micro-batch) -> (rank, position in its list)."""
        places: dict[tuple[str, int, int], tuple[int, int]] = {}
        for rank, mine in enumerate(self.actions):
            for position, action in enumerate(mine):
                for part in action.parts:
                    for what in {"F": "F", "I": "B", "W": "W", "B": "BW"}[part.kind]:
                        places.setdefault((what, part.stage, part.microbatch), (rank, position))
        return places

    def where(self, kind: str, stage: int, microbatch: int) -> tuple[int, int]:
        """The rank that does it, and where in the rank's list.

        Args:
            kind: "F"; "B": the action that gives the input gradient (I or B); "W": that gives the weights' (W or B).

        Raises:
            ValueError: no rank does it.
        """
        try:
            return self._places[kind, stage, microbatch]
        except KeyError:
            raise ValueError(
                f"{self.name}: no rank does {kind} of micro-batch {microbatch} at stage {stage} "
                f"(stages 0 to {self.num_stages - 1}, micro-batches 0 to {self.num_microbatches - 1}); "
                "validate(schedule) says what is wrong"
            ) from None

    def stages(self, rank: int) -> list[int]:
        """The stages that `rank` runs something of, sorted."""
        return sorted({part.stage for action in self.actions[rank] for part in action.parts})

    def sends(self, rank: int) -> list[Transfer]:
        """What `rank` sends to others, in the order in which it sends: the one rule of transfers.

        An F's output goes to the rank that runs the micro-batch's next stage, an I's or B's input gradient to the one
        that ran its previous stage; nothing is sent where that is the rank itself, after the last stage or before the
        first. A pair sends its forward's, then its backward's.

        Raises:
            ValueError: nobody runs the stage that it would be sent to.
        """
        parts = (part for action in self.actions[rank] for part in action.parts)
        transfers = (self.transfer(part, rank) for part in parts)
        return [transfer for transfer in transfers if transfer]

    def transfer(self, part: Action, rank: int) -> Transfer | None:
        """What `rank` sends to another rank when it has done `part` (see :meth:`sends`), if anything."""
        kind = {"F": "F", "I": "B", "B": "B", "W": ""}[part.kind]
        to = part.stage + (1 if kind == "F" else -1)
        if not kind or not 0 <= to < self.num_stages:
            return None
        target = self.where(kind, to, part.microbatch)[0]
        return None if target == rank else Transfer(kind, part.stage, part.microbatch, rank, target)


def _read_word(word: str, rank: int) -> Action | Pair:
    try:
        actions = []
        for piece in word.split("+"):
            stage, microbatch = piece[1:].split(".")
            actions.append(Action(piece[0], int(stage), int(microbatch)))
        return actions[0] if len(actions) == 1 else Pair(*actions)
    except (ValueError, TypeError, IndexError):
        raise ValueError(f"rank {rank}: {word!r} is not an action; write F0.1, I0.1, W0.1, B0.1 or F0.4+B3.1") from None


# --- the five -------------------------------------------------------------------------------------------------------

SCHEDULES = ("1f1b", "zb1p", "chimera", "dualpipe", "dualpipev")


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """One of :data:`SCHEDULES`.

    Stages: ``1f1b`` and ``zb1p`` have P, one a rank. ``chimera`` and ``dualpipe`` have P, each held twice: rank r holds
    r and P − 1 − r; micro-batches 0 … M/2 − 1 enter at rank 0, M/2 … M − 1 at rank P − 1. ``dualpipev`` has 2P, rank r
    holds r and 2P − 1 − r.

    Raises:
        ValueError: an unknown name, or numbers that the schedule can't do (they and the remedy are named).
    """
    P, M = num_ranks, num_microbatches
    check_numbers(name, P, M)
    all_of_them, down, up = range(M), range(M // 2), range(M // 2, M)
    actions: list[list[Action | Pair]] = []
    for rank in range(P):
        near = min(rank, P - 1 - rank)  # of a two-way pipeline's two stages the one nearer the entrance
        mine, mirrored = (down, up) if rank == near else (up, down)
        two_way = [(near, mine), (P - 1 - near, mirrored)]
        match name:
            case "1f1b":
                words, lanes = orders.one_f_one_b(P, rank, M), [(rank, all_of_them)]
            case "zb1p":
                words, lanes = orders.zb1p(P, rank, M), [(rank, all_of_them)]
            case "chimera":
                words, lanes = orders.chimera(P, near, M // 2), two_way
            case "dualpipe":
                words, lanes = orders.dualpipe(P // 2, near, M // 2), two_way
            case _:
                words, lanes = orders.dualpipe(P, rank, M), [(rank, all_of_them), (2 * P - 1 - rank, all_of_them)]
        actions.append(spell(words, lanes))
    return Schedule(name, P, M, 2 * P if name == "dualpipev" else P, actions)


def forwards(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The forwards alone of any number of micro-batches, each stage where `schedule` has it for micro-batch 0.

    Every rank takes its chunks by stage + micro-batch, the time at which an endless line of one-way micro-batches would
    come by; sorted so on all ranks, what a chunk waits for is always earlier in its maker's list.
    """
    actions: list[list[Action | Pair]] = [[] for _ in range(schedule.num_ranks)]
    chunks = [(stage, m) for stage in range(schedule.num_stages) for m in range(num_microbatches)]
    for stage, m in sorted(chunks, key=lambda chunk: (sum(chunk), chunk)):
        actions[schedule.where("F", stage, 0)[0]].append(Action("F", stage, m))
    return Schedule(f"{schedule.name}, forwards", schedule.num_ranks, num_microbatches, schedule.num_stages, actions)


def spell(words: Iterable[str], lanes: Sequence[tuple[int, Sequence[int]]]) -> list[Action | Pair]:
    """Words of :mod:`~dsv3_book.pipeline.orders` to actions: each lane's micro-batches in order, W first in, first out.

    Args:
        words: like ``F0``, ``I1``, ``W``, ``F0B1``; the digit is the lane.
        lanes: for each lane its stage and its micro-batches.

    Raises:
        ValueError: something that is not a word, or a word for which no micro-batch is left.
    """
    todo = {kind: [deque(microbatches) for _, microbatches in lanes] for kind in "FB"}
    owed: deque[Action] = deque()  # the W's of the I's so far

    def action(kind: str, lane: int) -> Action:
        made = Action(kind, lanes[lane][0], todo["F" if kind == "F" else "B"][lane].popleft())
        if kind == "I":
            owed.append(Action("W", made.stage, made.microbatch))
        return made

    def read(word: str) -> Action | Pair:
        match list(word):
            case ["W"]:
                return owed.popleft()
            case ["F" | "B" | "I" as kind, lane]:
                return action(kind, int(lane))
            case ["F", lane, "B", other]:
                return Pair(action("F", int(lane)), action("B", int(other)))
        raise ValueError

    spelled: list[Action | Pair] = []
    for word in words:
        try:
            spelled.append(read(word))
        except IndexError:
            raise ValueError(f"word {len(spelled) + 1}, {word!r}: no micro-batch of its lane is left for it") from None
        except ValueError:
            raise ValueError(
                f"word {len(spelled) + 1}, {word!r}, is none: there are F0, B0, I0 (or any other lane), W and F0B1"
            ) from None
    return spelled


def check_numbers(name: str, P: int, M: int) -> None:
    """Raises ValueError, naming the remedy, if there is no schedule of that name for P ranks and M micro-batches."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    wrong = ""
    if P < 1 or M < 1:
        wrong = "both must be at least 1"
    elif name in ("chimera", "dualpipe") and P % 2:
        wrong = f"two directions need an even number of ranks: take {P + 1}, or dualpipev, which takes any"
    elif name == "chimera" and M % P:
        wrong = f"micro-batches must be divisible by the {P} stages: take {M - M % P + P}"
    elif name == "dualpipe" and M % 2:
        wrong = f"half of the micro-batches go each way: take an even number, {max(2 * P, M + 1)}"
    elif name in ("dualpipe", "dualpipev") and M < 2 * P:
        wrong = f"it needs 2 × {P} = {2 * P} micro-batches or more to fill: take {2 * P}, or fewer ranks, or 1f1b"
    if wrong:
        raise ValueError(f"{name} with {P} ranks and {M} micro-batches: {wrong}")
