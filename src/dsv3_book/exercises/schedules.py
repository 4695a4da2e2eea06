"""Graders of chapter 13: what a rank holds, a bubble derived, a rule of the validator, a schedule of one's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dsv3_book.exercises.grading import Case, Solution, grader, same
from dsv3_book.pipeline.schedule import Action, Pair, Schedule, make_schedule
from dsv3_book.pipeline.simulate import Costs, simulate
from dsv3_book.pipeline.validate import validate

Actions = Sequence[Action | Pair]


def _read(line: str) -> Actions:
    return Schedule.from_text(line).actions[0]


# What a rank holds ---------------------------------------------------------------------------------------------------
def _peak(ends: str = "IB", pair_at_once: bool = True, most: bool = True) -> Solution:
    def solution(actions: Actions) -> int:
        now = found = 0
        for action in actions:
            kinds = [part.kind for part in action.parts]
            begun, ended = kinds.count("F"), sum(kind in ends for kind in kinds)
            if not pair_at_once:
                begun, ended = begun - ended, 0
            now += begun
            found = max(found, now)
            now -= ended
        return found if most else now

    return solution


@grader(
    "schedules.peak",
    minutes=10,
    level="easy",
    reference=lambda: _peak(),
    wrong={"input gradient": lambda: _peak("WB"), "a pair holds both": lambda: _peak(pair_at_once=False)},
)
def peak():
    yield Case(
        (_read("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"),), same(2), says="rank 0 of 1F1B", hint="Count up at F, down at B."
    )
    yield Case(
        (_read("F0.0 I0.0 F0.1 I0.1 W0.0 W0.1"),),
        same(1),
        says="weights put off",
        hint="A chunk is let go at the end of its input gradient, I; its W doesn't count here.",
    )
    yield Case(
        (_read("F0.0 F1.2 F0.1+B1.2 B0.0 B0.1"),),
        same(3),
        says="a pair",
        hint="While it runs, a pair holds both its chunks: count the forward before the backward is over.",
    )
    for rank in (0, 2, 5):
        yield Case(
            (make_schedule("dualpipe", 6, 12).actions[rank],), same(7), says=f"rank {rank} of DualPipe on 6 ranks"
        )


# A bubble derived ----------------------------------------------------------------------------------------------------
def halves_in_turn(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with every backward as an I and at once its W."""
    one = make_schedule("1f1b", num_ranks, num_microbatches)
    cut: Callable[[Action], Actions] = lambda a: [a] if a.kind == "F" else [replace(a, kind="I"), replace(a, kind="W")]
    return replace(one, name="halves", actions=[[x for a in mine for x in cut(a)] for mine in one.actions])  # type: ignore[arg-type]


def _judge_bubble(ranks: int, f: float, i: float, w: float) -> Callable[[float], str | None]:
    counted = max(simulate(halves_in_turn(ranks, 2 * ranks), Costs(f, i, w)).bubble)

    def judge(answer: float) -> str | None:
        if abs(answer - counted) <= 1e-9 * max(1, counted):
            return None
        return f"returned {answer:g}; the simulated schedule waits {counted:g}"

    return judge


@grader(
    "schedules.split_bubble",
    minutes=20,
    level="medium",
    reference=lambda: lambda num_ranks, t_f, t_i, t_w: (num_ranks - 1) * (t_f + t_i),
    wrong={
        "without W": lambda: lambda num_ranks, t_f, t_i, t_w: (num_ranks - 1) * (t_f + t_i + t_w),
        "not put off": lambda: lambda num_ranks, t_f, t_i, t_w: (num_ranks - 1) * (t_f + t_i - t_w),
        "hops": lambda: lambda num_ranks, t_f, t_i, t_w: num_ranks * (t_f + t_i),
    },
)
def split_bubble():
    climb = "P ranks have P − 1 hops between them. A gradient climbs each without W: I sends it on, W comes after."
    drain = "Here W is not put off, so it fills no pause: only ZB1P's drain has owed W's to do while it waits."
    for sizes, hint in (
        ((2, 1.0, 1.0, 1.0), f"{climb} {drain}"),
        ((4, 1.0, 1.0, 0.5), drain),
        ((8, 0.7, 1.6, 1.9), "All three differ now: which of them is a hop of a forward down, which of a gradient up?"),
    ):
        yield Case(sizes, _judge_bubble(*sizes), says=f"{sizes[0]} ranks; F, I, W take {sizes[1:]}", hint=hint)


# A rule of the validator ---------------------------------------------------------------------------------------------
def _too_early(before: dict[str, str], strict: bool = True, missing: int = -1) -> Solution:
    def solution(actions: Actions) -> list[str]:
        place = {(p.kind, p.stage, p.microbatch): n for n, a in enumerate(actions) for p in a.parts}
        wrong = []
        for n, action in enumerate(actions):
            for part in action.parts:
                if part.kind in before:
                    at = place.get((before[part.kind], part.stage, part.microbatch), missing)
                    if at >= n if strict else at > n:
                        wrong.append(str(part))
        return wrong

    return solution


_RULE = {"I": "F", "B": "F", "W": "I"}


@grader(
    "schedules.too_early",
    minutes=25,
    level="medium",
    reference=lambda: _too_early(_RULE),
    wrong={
        "its W": lambda: _too_early({"I": "F", "B": "F"}),
        "same time": lambda: _too_early(_RULE, strict=False),
        "another rule": lambda: _too_early(_RULE, missing=10**9),
    },
)
def too_early():
    yield Case(
        (_read("F0.0 F0.1 B0.0 B0.1"),), same([]), says="nothing wrong", hint="An empty list where all is right."
    )
    yield Case(
        (_read("F0.0 W0.0 I0.0 B0.1 F0.1"),),
        same(["W0.0", "B0.1"]),
        says="a W before its I, a B before its F",
        hint="Two rules: I and B after their F; and an I must be done before its W.",
    )
    yield Case(
        (_read("F0.0 F1.0+B1.0 B0.0"),),
        same(["B1.0"]),
        says="a pair of one chunk's own forward and backward",
        hint="Both parts of a pair run at the same time, so neither is before the other: too early, too.",
    )
    yield Case(
        (_read("F0.0 I0.0 I0.1 W0.0"),),
        same([]),
        says="a forward that isn't in the list",
        hint="F0.1 is missing altogether. That is another rule's business, as the exercise says.",
    )


# A schedule of one's own ---------------------------------------------------------------------------------------------
def held_until_w(actions: Actions) -> int:
    """The most chunks held at once, each from its F to the end of its W (or B)."""
    return _peak("WB")(actions)


@dataclass(frozen=True)
class Score:
    """A schedule of the puzzle: idle time of the worst rank (F = I = W = 1) and chunks held until their W."""

    bubble: float
    memory: int
    beat: float  # 1F1B's bubble
    least: float  # no one-way pipeline has less: the last rank begins after the others' forwards

    def __str__(self) -> str:
        return (
            f"bubble {self.bubble:g} (1F1B: {self.beat:g}, least possible: {self.least:g}), "
            f"memory {self.memory} chunks until their W"
        )


def score(text: str, num_ranks: int, num_microbatches: int) -> Score:
    """Time and memory of a schedule of the puzzle: a line for each rank, one stage a rank, no pairs.

    Raises:
        ValueError: it isn't one, or not valid; the message says why.
    """
    P, M = num_ranks, num_microbatches
    if not isinstance(text, str):
        raise ValueError(f"got a {type(text).__name__}; a schedule is text, a line for each rank")
    schedule = Schedule.from_text(text)
    found = schedule.num_ranks, schedule.num_microbatches, schedule.num_stages
    if found != (P, M, P):
        raise ValueError(
            f"there are {found[0]} lines, {found[1]} micro-batches, {found[2]} stages; asked for: {P} ranks, "
            f"{M} micro-batches, one stage a rank"
        )
    if wrong := validate(schedule):
        raise ValueError("not valid: " + " ".join(wrong[:3]))
    for rank in range(P):
        if schedule.stages(rank) != [rank]:
            raise ValueError(f"rank {rank} runs stages {schedule.stages(rank)}; here rank r runs stage r only")
        if any(action.kind == "FB" for action in schedule.actions[rank]):
            raise ValueError(f"rank {rank} has a pair; with one stage a rank none is allowed")
    memory = max(held_until_w(mine) for mine in schedule.actions)
    beat = max(simulate(make_schedule("1f1b", P, M)).bubble)
    return Score(max(simulate(schedule).bubble), memory, beat, P - 1)


def _judge_schedule(text: str, ranks: int, microbatches: int, memory: int) -> str | None:
    try:
        found = score(text, ranks, microbatches)
    except ValueError as error:
        return str(error)
    if found.memory > memory or found.bubble >= found.beat:
        return f"{found}; allowed: {memory}"
    return None


def _text(name: str) -> Solution:
    return lambda num_ranks, num_microbatches, memory: str(make_schedule(name, num_ranks, num_microbatches))


def _everything_late(num_ranks: int, num_microbatches: int, memory: int) -> str:
    """1F1B's order with I's, and every W at the end: fast, but it holds everything."""
    lines = [
        [*(str(a).replace("B", "I") for a in mine), *(f"W{rank}.{m}" for m in range(num_microbatches))]
        for rank, mine in enumerate(make_schedule("1f1b", num_ranks, num_microbatches).actions)
    ]
    return "\n".join(" ".join(line) for line in lines)


def _circle(num_ranks: int, num_microbatches: int, memory: int) -> str:
    """Rank 0 one micro-batch at a time, the others all forwards first."""
    alone = " ".join(f"F0.{m} B0.{m}" for m in range(num_microbatches))
    others = [
        " ".join(f"{kind}{rank}.{m}" for kind in "FB" for m in range(num_microbatches)) for rank in range(1, num_ranks)
    ]
    return "\n".join([alone, *others])


@grader(
    "schedules.beat_1f1b",
    minutes=120,
    level="hard",
    reference=lambda: _text("zb1p"),
    wrong={"1F1B: 3": lambda: _text("1f1b"), "allowed": lambda: _everything_late, "Deadlock": lambda: _circle},
)
def beat_1f1b():
    for ranks, microbatches in ((2, 4), (3, 6), (4, 8)):

        def judge(text: str, sizes: tuple[int, int, int] = (ranks, microbatches, ranks)) -> str | None:
            return _judge_schedule(text, *sizes)

        yield Case(
            (ranks, microbatches, ranks),
            judge,
            says=f"{ranks} ranks, {microbatches} micro-batches, in the memory of {ranks} chunks",
            hint="Send every gradient up at once (I), and do a W when memory is full or nothing else is there to do.",
        )
