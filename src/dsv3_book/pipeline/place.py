"""Which layers each stage gets. No torch.

A pipeline in its steady state goes at the pace of its slowest stage, so that is what is made small. Layers stay in
order, the embedding is with the first stage, the output head and the MTP modules are with the last (in DualPipe both
are on rank 0 and on rank P − 1, which therefore hold what main model and MTP share). The report says that V3 runs on 16
stages, not how 61 layers are spread over them; this is *our choice*, from forward FLOPs (a backward is about twice that
for every part).

For V3, with sequences of 4096 tokens, head and MTP weigh as much as 3.9 layers. So the last stage gets one layer
besides them, the other fifteen get four each: the slowest stage does 4.9 layers' work where the mean is 4.1. Sixteen
equal stages would need cuts inside a layer.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from dsv3_book.config import ModelConfig
from dsv3_book.costs import REPORT_SEQUENCE_LENGTH, causal_context, head_flops, layer_flops, mtp_flops


def model_costs(cfg: ModelConfig, tokens: int = REPORT_SEQUENCE_LENGTH) -> list[float]:
    """Forward FLOPs per token of what is placed: [with the first stage, each layer …, with the last stage], L + 2 long.

    The embedding is a look-up: 0. The last stage has the head, and for each MTP depth its projection, block and head.
    """
    context = causal_context(tokens)
    layers = [sum(layer_flops(cfg, index, context).values()) for index in range(cfg.num_hidden_layers)]
    depths = range(1, cfg.num_nextn_predict_layers + 1)
    return [0.0, *layers, head_flops(cfg) + sum(sum(mtp_flops(cfg, depth, context).values()) for depth in depths)]


def place_layers(cfg: ModelConfig, num_stages: int, costs: Sequence[float] | None = None) -> list[range]:
    """The layers of each stage: contiguous, in order, the slowest stage as fast as can be.

    Among the placements whose slowest stage is equally fast, the most even one is taken (least sum of squares); among
    those, the one that puts fewer layers into early stages: those keep the activations of more micro-batches (1F1B),
    and the embedding. A stage can be left without layers: where there are more stages than layers, or the last one,
    which has head and MTP to do.

    Args:
        costs: what each piece costs, in any unit, as :func:`model_costs` gives it (the default).

    Returns:
        `num_stages` ranges that together count 0 … L − 1.

    Raises:
        ValueError: no stage, or costs that are not L + 2 finite numbers, 0 or more.
    """
    L = cfg.num_hidden_layers
    costs = model_costs(cfg) if costs is None else costs
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: a model needs at least one stage")
    if len(costs) != L + 2 or not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(
            f"costs {list(costs)} must be {L + 2} finite numbers, 0 or more: with the first stage, each of {L} layers, "
            "with the last stage"
        )
    costs = _whole_numbers(costs)  # exact sums: placements that are equally good must compare equal
    up_to = [0, *accumulate(costs[1:-1])]

    def cost_of(stage: int, first: int, end: int) -> int:
        """Of `stage`, if it gets the layers first … end − 1."""
        fixed = costs[0] * (stage == 0) + costs[-1] * (stage == num_stages - 1)
        return fixed + up_to[end] - up_to[first]

    # Two passes from the last stage to the first, each asking for every `first`: what is the best that the stages from
    # here on can do with the layers first … L − 1? Pass one: the least time of the slowest. Pass two, no slower than
    # that: the least sum of squares, and where this stage's layers end.
    slowest = [cost_of(num_stages - 1, first, L) for first in range(L + 1)]
    for stage in reversed(range(num_stages - 1)):
        slowest = [
            min(max(cost_of(stage, first, end), slowest[end]) for end in range(first, L + 1)) for first in range(L + 1)
        ]
    bound = slowest[0]

    def squares(stage: int, first: int, end: int, rest: float) -> tuple[float, int]:
        cost = cost_of(stage, first, end)
        return (cost**2 + rest if cost <= bound and rest < math.inf else math.inf), end

    table = [[squares(num_stages - 1, first, L, 0) for first in range(L + 1)]]
    for stage in reversed(range(num_stages - 1)):
        rest = [best for best, _ in table[-1]]
        table.append(
            [min(squares(stage, first, end, rest[end]) for end in range(first, L + 1)) for first in range(L + 1)]
        )
    placed, first = [], 0
    for ends in reversed(table):
        end = ends[first][1]
        placed.append(range(first, end))
        first = end
    return placed


def _whole_numbers(costs: Sequence[float]) -> list[int]:
    """The same costs in a unit so small that all are whole."""
    fractions = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]
