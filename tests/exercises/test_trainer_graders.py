"""The references of chapter 17's graders, held to the package and to brute force."""

import itertools
import random

import pytest
import torch

from dsv3_book.exercises import trainer
from dsv3_book.parallel.mesh import Layout
from dsv3_book.slab import Box, uncovered


@pytest.mark.parametrize(("pp", "dp"), [(1, 1), (2, 2), (4, 2), (1, 4)])
def test_a_rank_works_on_what_the_trainer_gives_it(pp: int, dp: int) -> None:
    layout, M = Layout(pp, dp, 1, 1), 3
    for rank in range(layout.world):
        place = layout.index("dp", rank)
        mine = range(place * M, (place + 1) * M)  # as `Trainer.train_step` has it
        assert trainer._share(rank, layout.world, pp, sequences=2 * M * dp, micro=2) == mine


def test_steps_are_counted_as_a_run_does_them() -> None:
    draw = random.Random(0)
    for _ in range(50):
        steps, every = draw.randrange(20, 40), draw.randrange(1, 9)
        killed, saved, done = [], 0, 0
        for _ in range(draw.randrange(4)):
            killed.append(draw.randrange(saved, steps))
            for step in range(saved + 1, killed[-1] + 1):
                done, saved = done + 1, step if step % every == 0 else saved
        assert trainer._computed(steps, every, killed) == done + steps - saved


def test_what_is_missing_is_what_no_box_covers() -> None:
    draw = random.Random(1)
    for _ in range(50):
        pieces = [(begin, torch.ones(draw.randrange(1, 6))) for begin in draw.choices(range(12), k=3)]
        begin, size = draw.randrange(10), draw.randrange(1, 8)
        values, missing = trainer._fill(pieces, begin, size)
        gaps = uncovered(Box((begin,), (size,)), [Box((offset,), (len(piece),)) for offset, piece in pieces])
        assert missing == sum(gap.numel for gap in gaps) == int((values == 0).sum())


def test_no_cut_is_better() -> None:
    draw = random.Random(2)
    for _ in range(50):
        costs = [draw.choice([1.0, 2.0, 3.5]) for _ in range(draw.randrange(3, 9))]
        stages = draw.randrange(1, len(costs) + 1)
        cuts = itertools.combinations(range(1, len(costs)), stages - 1)
        sizes = [[b - a for a, b in itertools.pairwise([0, *cut, len(costs)])] for cut in cuts]
        best = min(trainer._longest(costs, size) for size in sizes)
        assert trainer._longest(costs, trainer._cut(costs, stages)) == best
