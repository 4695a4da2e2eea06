r"""GPipe: all forwards, then all backwards. Simple, and it holds the activations of every micro-batch at once.

    torchrun --nproc-per-node 2 -m dsv3_book.train --preset tiny --out runs/gpipe --parallel.pp 2 \
        --swap.schedule examples/swaps/gpipe.py:gpipe
"""

from dsv3_book.pipeline.schedule import Action, Schedule


def gpipe(num_ranks, num_microbatches):
    order = range(num_microbatches)
    actions = [
        [*(Action("F", rank, m) for m in order), *(Action("B", rank, m) for m in order)] for rank in range(num_ranks)
    ]
    return Schedule("gpipe", num_ranks, num_microbatches, num_ranks, actions)
