r"""Stochastic gradient descent with momentum: half of AdamW's memory, and no idea of each weight's own scale.

    python -m dsv3_book.train --preset tiny --out runs/sgd --optim.lr 0.1 \
        --swap.optimizer examples/swaps/momentum.py:momentum
"""

import torch


def momentum(groups, lr):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)
