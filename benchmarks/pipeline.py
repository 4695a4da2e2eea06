"""The pipeline's executor beside torch's own, its overhead, one process against two, and how much of the all-to-alls'
time a pair hides. Real processes over gloo, one thread each; all sides take their steps in turns within one run.

    contest     our `Pipeline` with 1f1b and dualpipev beside torch's `Schedule1F1B` and `ScheduleDualPipeV`: the same
                stages (this package's blocks, each with its balance loss), split, micro-batches and gradients (checked
                first). torch splits a backward into I and W by asking autograd twice, which makes a Function of our own
                work twice; so ScheduleDualPipeV also runs with our deferred weight gradients, through its `dw_builder`,
                and the ratio is to the faster of the two.
    overhead    CPU seconds of a step over those of the same actions in the same order, each a plain forward or
                backward, without cuts, pairs, messages and bookkeeping: all that the executor adds. On one process,
                which has no messages, and on two, where a process that waited finds its caches cold besides.
    throughput  tokens/s of two processes with one thread each (data parallel; pipelined) and of one with two threads.
    hidden      every all-to-all of two processes that share the experts arrives a known time after it left. Hidden is
                what of that time had passed when its receiver first asked for it: in a pair another chunk is computed
                meanwhile; alone, a backward computes its experts' weight gradients behind one of its two journeys.
                On a busy machine time passes without computing, so the same is also reckoned with the CPU seconds
                between leaving and asking. All layers are MoE here: a dense one has nothing to fill a gap with.

Each part takes its sides' steps in turns, every round in another order. A ratio is the median over rounds of the ratio
within a round, of wall time (the slower rank's) and of CPU time (of both ranks), which other programs on the machine
disturb less.

Predicted before the first run: 1f1b 1.00 and dualpipev 0.95 of torch's step time (torch analyses the graph at every I);
overhead 2 %; data parallel 1.25 and 1f1b 1.1 times the tokens/s of two threads (threads wait for each other at every
small product; 1f1b's bubble is 1/9); hidden 98 % in pairs, 0 alone (a backward's weight gradients were forgotten).

    python benchmarks/pipeline.py [--rounds 7] [--write]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _measure import record
from _pipeline_sides import CONFIG, LENGTH, SEQUENCES, M, Ours, Replicas, Theirs, micro_batches
from torch import Tensor

from dsv3_book.model.dispatch import Pending
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.transport import DelayedTransport
from dsv3_book.parallel.workers import Pool
from dsv3_book.pipeline.executor import Pipeline, Watch
from dsv3_book.pipeline.schedule import make_schedule

DELAY = 0.005  # seconds
Step = Callable[[], Any]
Seconds = dict[str, list[tuple[float, float]]]


# What the workers run ------------------------------------------------------------------------------------------------
class Clocked(DelayedTransport):
    """Also writes down the CPU seconds that this thread spent between starting a message and asking for it."""

    def start(self, *args: Any, **kwargs: Any) -> Pending:
        self.spent = getattr(self, "spent", {})
        pending = super().start(*args, **kwargs)
        return Asked(pending, self.spent, id(self.events[-1]), time.thread_time())


class Asked(NamedTuple):
    pending: Pending
    spent: dict[int, float]
    event: int
    began: float

    def wait(self) -> Tensor:
        self.spent[self.event] = time.thread_time() - self.began
        return self.pending.wait()


def in_turns(
    sides: dict[str, tuple[dict[str, Any], Step]], rounds: int
) -> tuple[Seconds, dict[str, dict[str, Tensor]]]:
    """(wall, CPU) seconds of every side's steps on this rank, and what the warm-up round gave as gradients."""
    seconds: Seconds = {name: [] for name in sides}
    gradients: dict[str, dict[str, Tensor]] = {}
    for number in range(rounds + 1):
        # In another order each round (on all ranks the same): what ran just before leaves its mark on memory.
        for name, (named, step) in random.Random(number).sample(list(sides.items()), len(sides)):
            for p in named.values():
                p.grad = None
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            cpu = time.process_time() - cpu
            dist.barrier()
            seconds[name].append((time.perf_counter() - wall, cpu))
            if number == 0:
                gradients[name] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    return {name: times[1:] for name, times in seconds.items()}, gradients


def contest(rounds: int) -> Seconds:
    """The executor and torch's schedules."""
    one, two, copies = Ours("1f1b"), Ours("dualpipev"), Replicas()
    theirs = {
        "torch 1f1b": Theirs(one, "1f1b"),
        "torch dualpipev": Theirs(two, "dualpipev"),
        "torch dualpipev, our W": Theirs(two, "dualpipev", deferred=True),
    }
    sides: dict[str, tuple[dict[str, Any], Step]] = {
        "1f1b": (one.named, one.step),
        "dualpipev": (two.named, two.step),
        **{name: (side.named, side.step) for name, side in theirs.items()},
    }
    _, whole = in_turns({"whole": (copies.named, copies.step)}, 0)
    seconds, gradients = in_turns(sides, rounds)
    for name in ("1f1b", "dualpipev", *theirs):
        for n, g in gradients[name].items():
            if (g - whole["whole"][n]).norm() > 1e-5 * g.norm():
                raise ValueError(f"{name}: the gradient of {n} differs from data parallel's")
    return seconds


def overhead(rounds: int) -> Seconds:
    """The executor and the bare actions. Without third sides: what they leave in memory costs more than is measured."""
    both = {name: Ours(name) for name in ("1f1b", "dualpipev")}
    alone = [
        in_turns({name: (ours.named, ours.step), f"{name} bare": (ours.named, ours.bare)}, rounds)[0]
        for name, ours in both.items()
    ]
    return alone[0] | alone[1]


def throughput(rounds: int) -> Seconds:
    """Two processes with one thread each, and one with two."""
    one, two, copies = Ours("1f1b"), Ours("dualpipev"), Replicas()
    return in_turns(
        {
            "1f1b": (one.named, one.step),
            "dualpipev": (two.named, two.step),
            "data parallel": (copies.named, copies.step),
            "two threads": (copies.named, copies.two_threads),
        },
        rounds,
    )[0]


def journeys(rounds: int) -> dict[str, Any]:
    """How much of the all-to-alls' delay was over when they were asked for, in pairs and alone; length of the parts."""
    each = CONFIG.n_routed_experts // dist.get_world_size()
    held = range(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    transport = Clocked(delay=DELAY)
    dispatch = AllToAll(None, CONFIG.n_routed_experts, transport=transport)
    moe = CONFIG.replace(first_k_dense_replace=0)
    pipeline = Pipeline(moe, make_schedule("dualpipev", 1, M), dispatch=dispatch, experts=held)
    parts: dict[str, list[float]] = {}
    left: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(rounds + 1):
        pipeline.zero_grad()
        watch = Watch()
        transport.events.clear()
        pipeline.step(micro_batches(), watch=watch)
        if number == 0:
            continue
        for part in watch.events:
            parts.setdefault(f"{part.part} {part.kind}", []).append(part.end - part.start)
        for message in transport.events:
            if message.label.part in transport.parts:
                (part,) = (p for p in watch.events if p.start <= message.issued <= p.end)
                passed = message.wait_began - message.issued, transport.spent[id(message)]
                left[part.paired].append((max(0.0, DELAY - passed[0]), max(0.0, DELAY - passed[1])))
    return {
        "left": {paired: [sum(one) / len(times) for one in zip(*times)] for paired, times in left.items()},
        "messages": {paired: len(times) for paired, times in left.items()},
        "parts": {n: statistics.median(t) for n, t in parts.items()},
    }


# The tables ----------------------------------------------------------------------------------------------------------
def ratio(ranks: list[Seconds], a: str, b: str) -> dict[str, float]:
    """Medians over rounds of side a's seconds over side b's: wall time of the slower rank, CPU time of all ranks."""
    rounds = range(len(ranks[0][a]))
    wall = lambda side, i: max(rank[side][i][0] for rank in ranks)
    cpu = lambda side, i: sum(rank[side][i][1] for rank in ranks)
    return {
        "wall": statistics.median(wall(a, i) / wall(b, i) for i in rounds),
        "cpu": statistics.median(cpu(a, i) / cpu(b, i) for i in rounds),
    }


def tokens_per_second(ranks: list[Seconds]) -> dict[str, float]:
    """By the median step of the slower rank."""
    tokens, rounds = M * SEQUENCES * LENGTH, range(len(next(iter(ranks[0].values()))))
    return {s: tokens / statistics.median(max(r[s][i][0] for r in ranks) for i in rounds) for s in ranks[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="record as src/dsv3_book/results/pipeline.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with Pool(1, timeout=3600) as pool:
        beside_bare = {"one process": pool.run(overhead, given.rounds)}
    with Pool(2, timeout=3600) as pool:
        ranks = pool.run(contest, given.rounds)
        beside_bare["two processes"] = pool.run(overhead, given.rounds)
        travelled = pool.run(journeys, max(1, given.rounds // 3))
        threads = pool.run(throughput, max(1, given.rounds // 2))

    rates, beside = tokens_per_second(ranks), ("torch dualpipev", "torch dualpipev, our W")
    faster = max(beside, key=rates.__getitem__)
    print(f"{'':28}tokens/s")
    for part in (ranks, *beside_bare.values(), threads):
        for side, rate in tokens_per_second(part).items():
            print(f"{side:28}{rate:8.0f}")
    results: dict[str, Any] = {
        "sizes": {
            "hidden_size": CONFIG.hidden_size, "layers": CONFIG.num_hidden_layers, "micro_batches": M,
            "tokens": M * SEQUENCES * LENGTH, "processes": 2,
        },
        "others_running": load,
        "contest": {"1f1b": ratio(ranks, "1f1b", "torch 1f1b"), "dualpipev": ratio(ranks, "dualpipev", faster)},
        "contest_beside": {side: ratio(ranks, "dualpipev", side) for side in beside},
        "overhead": {
            processes: {side: ratio(found, side, f"{side} bare")["cpu"] - 1 for side in ("1f1b", "dualpipev")}
            for processes, found in beside_bare.items()
        },
        "tokens_per_second": rates,
        "threads": {
            "tokens_per_second": tokens_per_second(threads),
            "over_two_threads": {
                side: 1 / ratio(threads, side, "two threads")["wall"] for side in ("1f1b", "dualpipev", "data parallel")
            },
        },
        "hidden": {
            "delay": DELAY,
            **{
                name: {
                    "share": 1 - statistics.mean(rank["left"][paired][0] for rank in travelled) / DELAY,
                    "share_cpu": 1 - statistics.mean(rank["left"][paired][1] for rank in travelled) / DELAY,
                    "messages": sum(rank["messages"][paired] for rank in travelled),
                }
                for name, paired in (("in pairs", True), ("alone", False))
            },
            "part_seconds": travelled[0]["parts"],
        },
    }  # fmt: skip
    for name in ("1f1b", "dualpipev"):
        both = results["contest"][name]
        extra = ", ".join(f"{found[name]:+.1%} on {processes}" for processes, found in results["overhead"].items())
        print(f"\n{name}: {both['wall']:.3f} of torch's step time ({both['cpu']:.3f} of its CPU time);"
              f" CPU over the bare actions {extra}")  # fmt: skip
    print("\ntokens/s over one process with two threads:")
    for side, times in results["threads"]["over_two_threads"].items():
        print(f"  {side:28}{times:5.2f}")
    for name in ("in pairs", "alone"):
        found = results["hidden"][name]
        print(f"{name}: {found['share']:.1%} of {1000 * DELAY:g} ms hidden ({found['share_cpu']:.1%} by CPU time), "
              f"{found['messages']} all-to-alls")  # fmt: skip
    if given.write:
        record("pipeline", " ".join(["python benchmarks/pipeline.py", *sys.argv[1:]]), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
