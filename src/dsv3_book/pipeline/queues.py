"""Workers that take jobs in a fixed order, each job when what it needs is done: all that a simulation here is.

A rank working through its list of actions, a link sending one tensor after another, a GPU's stream running kernels:
each is a queue. When durations are known and every queue's order is fixed, the times follow with no clock to advance —
a job starts when its queue's last job and everything it needs has ended. Both `simulate` (a whole pipeline) and `pair`
(two streams of one GPU) are this function with different jobs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

Job = Hashable
Interval = tuple[float, float]


class Stuck(ValueError):
    """No queue can go on. `waits`: (queue's number, its next job, the job that it waits for) of each that stopped."""

    def __init__(self, waits: list[tuple[int, Any, Any]]) -> None:
        self.waits = waits
        super().__init__("; ".join(f"queue {q} is at {job}, which waits for {missing}" for q, job, missing in waits))


def play(
    queues: Sequence[Sequence[Job]], durations: Mapping[Any, float], needs: Mapping[Any, Sequence[Job]]
) -> dict[Job, Interval]:
    """When each job starts and ends, every queue starting at time 0.

    Args:
        queues: each a list of jobs, run in list order, one at a time. A job is in one queue, once.
        durations: each job's time, in any unit, not negative.
        needs: the jobs that must have ended before a job starts; a job that is not in it needs none.

    Returns:
        {job: (start, end)}, each job starting as early as these rules allow.

    Raises:
        Stuck: jobs wait for each other in a circle, or for a job that is in no queue.
    """
    times: dict[Job, Interval] = {}
    position = [0] * len(queues)
    free = [0.0] * len(queues)
    asleep: defaultdict[Job, list[int]] = defaultdict(list)  # job -> the queues to wake when it has ended
    awake = list(range(len(queues)))[::-1]
    while awake:
        number = awake.pop()
        queue = queues[number]
        while position[number] < len(queue):
            job = queue[position[number]]
            start = free[number]
            for need in needs.get(job, ()):
                done = times.get(need)
                if done is None:
                    asleep[need].append(number)
                    break
                start = max(start, done[1])
            else:
                free[number] = end = start + durations[job]
                times[job] = (start, end)
                position[number] += 1
                awake.extend(asleep.pop(job, ()))
                continue
            break
    waits = [(number, queues[number][position[number]], need) for need, them in asleep.items() for number in them]
    if waits:
        raise Stuck(sorted(waits, key=lambda wait: wait[0]))
    return times
