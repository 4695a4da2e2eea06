"""Is a schedule right? And if not, what is wrong with it, in sentences that help to mend it. No torch.

A schedule is right when every chunk's forward, input gradient and weight gradient are done exactly once and by one
rank, mirrored copies of a stage are where they belong, and the ranks, each going through its list in order, never come
to wait for each other in a circle. What an action waits for follows from the one rule of transfers: an F for the F of
the stage before, an I or B for its own F and for the I or B of the stage after, a W for its own I.
"""

from collections.abc import Iterable
from itertools import groupby

from dsv3_book.pipeline.queues import Stuck, play
from dsv3_book.pipeline.schedule import Action, Pair, Schedule

Chunk = tuple[int, int]  # stage, micro-batch
Place = tuple[int, int]  # rank, position in its list

WORK = {"F": "the forward", "B": "the input gradient", "W": "the weight gradient"}
MAKES = {"F": "F", "I": "B", "W": "W", "B": "BW"}  # which of these an action of a kind does


def check(schedule: Schedule) -> None:
    """Nothing, if `schedule` is right.

    Raises:
        ValueError: it isn't; the message holds the first sentences of :func:`validate`.
    """
    if wrong := validate(schedule):
        more = [f"and {len(wrong) - 10} sentences more, from validate(schedule)"] if len(wrong) > 10 else []
        raise ValueError(f"the schedule {schedule.name!r} can't be run:\n- " + "\n- ".join(wrong[:10] + more))


def validate(schedule: Schedule) -> list[str]:
    """What is wrong with `schedule`, in sentences; an empty list if nothing is.

    Later questions are asked when the earlier ones are answered: the form of the lists; is each piece of work there,
    once, on one rank; are copies mirrored right; the order within a rank; does anybody wait in a circle?
    """
    if wrong := list(_form(schedule)):
        return wrong
    places: dict[tuple[str, int, int], list[Place]] = {}
    for rank, mine in enumerate(schedule.actions):
        for position, action in enumerate(mine):
            for part in action.parts:
                for work in MAKES[part.kind]:
                    places.setdefault((work, part.stage, part.microbatch), []).append((rank, position))
    if wrong := [*_once(schedule, places), *_one_rank(places)]:
        return wrong
    place = {what: there[0] for what, there in places.items()}
    return list(_mirrors(schedule, place)) or list(_order(schedule, place)) or list(_circle(schedule, place))


# --- the questions --------------------------------------------------------------------------------------------------


def _form(schedule: Schedule) -> Iterable[str]:
    """Lists of known actions, with numbers that exist."""
    S, M = schedule.num_stages, schedule.num_microbatches
    for name, number in (("ranks", schedule.num_ranks), ("stages", S), ("micro-batches", M)):
        if number < 1:
            yield f"The schedule says that it has {number} {name}; there must be at least one."
    if max(S, M) > (total := sum(map(len, schedule.actions)) * 2):
        yield f"{S} stages and {M} micro-batches in {total // 2} actions can't be: are both counted from 0, by ones?"
    if len(schedule.actions) != schedule.num_ranks:
        yield f"There are {len(schedule.actions)} lists of actions for {schedule.num_ranks} ranks; each rank needs one."
    for rank, mine in enumerate(schedule.actions):
        for position, action in enumerate(mine):
            here = f"{_nth(position)} action of rank {rank}"
            if not isinstance(action, Action | Pair):
                yield f"The {here} is {action!r}, which is neither an Action nor a Pair."
                continue
            if isinstance(action, Pair):
                yield from _form_of_pair(action, here)
            for part in action.parts:
                if not (0 <= part.stage < S and 0 <= part.microbatch < M):
                    yield (
                        f"The {here}, {action}, names stage {part.stage} and micro-batch {part.microbatch}; stages "
                        f"count from 0 to {S - 1}, micro-batches from 0 to {M - 1}."
                    )


def _form_of_pair(pair: Pair, here: str) -> Iterable[str]:
    if pair.forward.kind != "F":
        yield f"The {here} is the pair {pair}, whose first half is not a forward (F) but {pair.forward.kind}."
    if pair.backward.kind != "B":
        yield f"The {here} is the pair {pair}, whose second half is not a whole backward (B) but {pair.backward.kind}."
    if (pair.forward.stage, pair.forward.microbatch) == (pair.backward.stage, pair.backward.microbatch):
        yield f"The {here} is the pair {pair}: a backward can't run beside the forward of its own chunk."


def _once(schedule: Schedule, places: dict[tuple[str, int, int], list[Place]]) -> Iterable[str]:
    """Every chunk's F, I (or B) and W (or B) is there, and no more than once."""
    for work, name in WORK.items():
        for stage in range(schedule.num_stages):
            missing = [m for m in range(schedule.num_microbatches) if (work, stage, m) not in places]
            if missing:
                doers = {"F": "F", "B": "I or B", "W": "W or B"}[work]
                yield f"Nobody does {name} ({doers}) of {_batches(missing)} at stage {stage}."
    for (work, stage, microbatch), there in places.items():
        if len(there) > 1:
            who = _and(f"rank {r}'s {_nth(i)} action ({schedule.actions[r][i]})" for r, i in there)
            often = "twice" if len(there) == 2 else f"{len(there)} times"
            yield f"{WORK[work].capitalize()} of micro-batch {microbatch} at stage {stage} is done {often}: by {who}."


def _one_rank(places: dict[tuple[str, int, int], list[Place]]) -> Iterable[str]:
    """A chunk's activations stay where its F was: I and W must be there too."""
    for (work, stage, microbatch), there in places.items():
        home = places.get(("F", stage, microbatch), there)
        if work != "F" and len(there) == len(home) == 1 and there[0][0] != home[0][0]:
            yield (
                f"Micro-batch {microbatch} goes forward through stage {stage} on rank {home[0][0]}, which keeps its "
                f"activations, but {WORK[work]} is on rank {there[0][0]}."
            )


def _mirrors(schedule: Schedule, place: dict[tuple[str, int, int], Place]) -> Iterable[str]:
    """A stage is held by one rank for all micro-batches, or by r for the first half and P − 1 − r for the second."""
    P, M = schedule.num_ranks, schedule.num_microbatches
    for stage in range(schedule.num_stages):
        by_rank: dict[int, list[int]] = {}
        for m in range(M):
            by_rank.setdefault(place["F", stage, m][0], []).append(m)
        if len(by_rank) == 1:
            continue
        held = _and(f"rank {rank} for {_batches(batches)}" for rank, batches in by_rank.items())
        ranks, first = sorted(by_rank), by_rank[place["F", stage, 0][0]]
        if len(ranks) > 2 or sum(ranks) != P - 1:
            yield (
                f"Stage {stage} is run by {held}. A stage belongs to one rank, or in a two-way pipeline to "
                f"rank r and its mirror {P - 1} − r."
            )
        elif M % 2 or first != list(range(M // 2)):
            yield (
                f"Stage {stage} is run by {held}. Of a stage held twice, one copy runs the first half of the "
                f"{M} micro-batches, its mirror the second half."
            )
        elif stage == 0 and place["F", 0, 0][0] != ranks[0]:
            yield f"Stage 0 is run by {held}. The first half of the micro-batches enters at the copy on the lower rank."


def _order(schedule: Schedule, place: dict[tuple[str, int, int], Place]) -> Iterable[str]:
    """Within a rank's list: what an action needs from its own rank comes before it."""
    for rank, mine in enumerate(schedule.actions):
        for position, action in enumerate(mine):
            for part in action.parts:
                for need in _needs(schedule, part):
                    there, at = place[need]
                    if there == rank and at >= position:
                        when = f"only the {_nth(at)}" if at > position else "in the same action"
                        yield (
                            f"Rank {rank}'s {_nth(position)} action, {action}, needs {WORK[need[0]]} of micro-batch "
                            f"{need[2]} at stage {need[1]} first; that is {when}, {schedule.actions[rank][at]}."
                        )


def _circle(schedule: Schedule, place: dict[tuple[str, int, int], Place]) -> Iterable[str]:
    """The lists played: does every rank come to its end?"""

    queues = [[(rank, i) for i in range(len(mine))] for rank, mine in enumerate(schedule.actions)]
    needs = {
        (rank, i): [place[need] for part in action.parts for need in _needs(schedule, part)]
        for rank, mine in enumerate(schedule.actions)
        for i, action in enumerate(mine)
    }
    try:
        play(queues, dict.fromkeys(needs, 1.0), needs)
    except Stuck as stuck:
        waits = {rank: (here[1], need) for rank, here, need in stuck.waits}
        seen = [next(iter(waits))]
        while (other := waits[seen[-1]][1][0]) not in seen:  # who stops waits for somebody who stops: follow ...
            seen.append(other)
        circle = seen[seen.index(other) :]  # ... until it closes
        for rank in circle:
            (position, (other, at)), stop = waits[rank], waits[waits[rank][1][0]][0]
            yield (
                f"Deadlock: rank {rank} stops at its {_nth(position)} action, {schedule.actions[rank][position]}, and "
                f"waits for {schedule.actions[other][at]}, rank {other}'s {_nth(at)}; but rank {other} itself stops at "
                f"its {_nth(stop)}, {schedule.actions[other][stop]}."
            )
        if rest := sorted(set(waits) - set(circle)):
            yield f"Behind them {_and(f'rank {r}' for r in rest)} {'wait' if len(rest) > 1 else 'waits'} too."


def _needs(schedule: Schedule, part: Action) -> list[tuple[str, int, int]]:
    """(F, B or W; stage; micro-batch) of what must be done before `part`, wherever it is done."""
    stage, m = part.stage, part.microbatch
    if part.kind == "F":
        return [("F", stage - 1, m)] if stage else []
    if part.kind == "W":
        return [("B", stage, m)]
    return [("F", stage, m)] + ([("B", stage + 1, m)] if stage + 1 < schedule.num_stages else [])


# --- words ----------------------------------------------------------------------------------------------------------


def _nth(position: int) -> str:
    """0 -> "1st", counted as people count."""
    n = position + 1
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _and(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _batches(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "micro-batches 0–2 and 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"micro-batch{'es' * (len(numbers) > 1)} {_and(words)}"
