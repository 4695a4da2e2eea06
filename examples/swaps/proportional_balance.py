r"""A balance rule that moves a bias by how far its expert's load is off, where V3 takes the sign alone.

    python -m dsv3_book.train --preset tiny --out runs/proportional \
        --swap.balance examples/swaps/proportional_balance.py:by_distance
"""


def by_distance(bias, load, gamma):
    mean = load.mean()
    bias += gamma * ((mean - load) / mean).clamp(-1, 1)
