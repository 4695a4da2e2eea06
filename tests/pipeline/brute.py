"""Schedules run by the plainest means: go round the ranks, do what can be done, until nothing can. Shared by tests."""

from dsv3_book.pipeline.schedule import Schedule


def runs(schedule: Schedule) -> bool:
    """Does `schedule`, played action by action, do all the work of a step, once, where activations and weights are?"""
    P, S, M = schedule.num_ranks, schedule.num_stages, schedule.num_microbatches
    done: dict[str, int] = {}  # "F0.1", "I0.1", "W0.1" -> rank
    at = [0] * P
    moved = True
    while moved:
        moved = False
        for rank in range(P):
            while at[rank] < len(schedule.actions[rank]):
                action = schedule.actions[rank][at[rank]]
                if len(action.parts) == 2 and [p.kind for p in action.parts] != ["F", "B"]:
                    return False
                made, ready = [], True
                for part in action.parts:
                    s, m = part.stage, part.microbatch
                    if not (0 <= s < S and 0 <= m < M):
                        return False
                    chunk = f"{s}.{m}"
                    made += {"B": [f"I{chunk}", f"W{chunk}"]}.get(part.kind, [part.kind + chunk])
                    if part.kind == "F":
                        ready &= s == 0 or f"F{s - 1}.{m}" in done
                    if part.kind in "IB":
                        ready &= f"F{chunk}" in done and (s == S - 1 or f"I{s + 1}.{m}" in done)
                    if part.kind == "W":
                        ready &= f"I{chunk}" in done
                if not ready:
                    break
                for what in made:
                    if what in done:
                        return False
                    done[what] = rank
                at[rank] += 1
                moved = True
    if len(done) != 3 * S * M or any(at[r] < len(schedule.actions[r]) for r in range(P)):
        return False
    for s in range(S):
        homes = [done[f"F{s}.{m}"] for m in range(M)]
        if any(done[f"{kind}{s}.{m}"] != homes[m] for kind in "IW" for m in range(M)):
            return False
        first, second = homes[0], homes[-1]
        two_way = [first] * (M // 2) + [P - 1 - first] * (M // 2)
        if not (set(homes) == {first} or homes == two_way) or (s == 0 and first > second):
            return False
    return True
