"""What one rank keeps of a model and its optimiser, for a given parallel layout: config only, no torch.

The layouts' numbers: pp pipeline ranks, dp data-parallel ranks, ep of these share one set of experts, so dp/ep hold the
same experts. In DualPipe a pipeline rank and its mirror hold the same two stages, so that twice as many ranks hold each
parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple

from .config import ModelConfig
from .costs import BYTES, TrainingBytes, embedding_params, layer_params, mtp_params


def rank_params(
    cfg: ModelConfig, layers: Iterable[int], ep: int = 1, embedding: bool = False, head: bool = False
) -> tuple[int, int]:
    """Weights on a rank that has these layers: (all but routed experts, its share 1/ep of the routed experts).

    embedding, head: whether it has the embedding table; the final norm, output head and MTP modules.

    Raises:
        ValueError: the routed experts don't divide among ep ranks.
    """
    if cfg.n_routed_experts % ep:
        raise ValueError(f"{cfg.n_routed_experts} experts don't divide among ep = {ep} ranks")
    pieces = [layer_params(cfg, index) for index in layers]
    if head:
        pieces += [mtp_params(cfg, depth) for depth in range(1, cfg.num_nextn_predict_layers + 1)]
        pieces += [{"norm": cfg.hidden_size, "head": embedding_params(cfg)}]
    experts = sum(piece.get("routed_experts", 0) for piece in pieces)
    others = sum(sum(piece.values()) for piece in pieces) - experts + embedding * embedding_params(cfg)
    return others, experts // ep


def zero1_bytes(
    others: int, experts: int, dp: int, edp: int, weights: str = "bf16", moments: str = "bf16"
) -> TrainingBytes:
    """Bytes one rank keeps under ZeRO-1; with dp = edp = 1 that is what it keeps without it.

    others, experts: weights on this rank, of routed experts and of everything else (`rank_params`).
    dp, edp: how many ranks hold the very same others, the very same experts.
    weights: "bf16", with fp32 master weights of the shard apart; "fp32": the shard's master weights are the weights.
    moments: dtype of the two moments of the shard.

    Gradients are fp32 and whole, because they add up on every rank over the step's micro-batches. Shares are rounded
    up; the padding of the buckets (`parallel/buckets.py`) is not counted, nor are the sums while they are there.
    """
    shard = -(-others // dp) + -(-experts // edp)
    return TrainingBytes(
        weights=(others + experts) * BYTES[weights],
        master=shard * BYTES["fp32"] if weights != "fp32" else 0,
        gradients=(others + experts) * BYTES["fp32"],
        moments=2 * shard * BYTES[moments],
    )


def layout_bytes(
    cfg: ModelConfig,
    placed: Sequence[range],
    held: Sequence[Sequence[int]],
    dp: int,
    ep: int = 1,
    weights: str = "bf16",
    moments: str = "bf16",
) -> list[TrainingBytes]:
    """What each pipeline rank keeps under ZeRO-1, every kind of parameter sharded over all ranks that hold it.

    placed: the layers of each stage (`pipeline/place.py`).  held: the stages of each pipeline rank, as a schedule's
    `stages(rank)`; the first has the embedding, the last has head and MTP, and with MTP the embedding's copy too.

    Raises:
        ValueError: ep doesn't divide dp, or the experts.
    """
    if dp % ep:
        raise ValueError(f"ep = {ep} doesn't divide dp = {dp}")
    last = len(placed) - 1
    readers = {0, last} if cfg.num_nextn_predict_layers else {0}
    found = []
    for stages in held:
        kinds = []  # (others, experts, how many pipeline ranks hold them)
        for stage in stages:
            numbers = rank_params(cfg, placed[stage], ep, head=stage == last)
            kinds.append((*numbers, sum(stage in other for other in held)))
        if readers & set(stages):
            kinds.append((embedding_params(cfg), 0, sum(bool(readers & set(other)) for other in held)))
        bytes_ = [astuple(zero1_bytes(o, e, dp * n, dp // ep * n, weights, moments)) for o, e, n in kinds]
        found.append(TrainingBytes(*map(sum, zip(*bytes_, strict=True))))
    return found


def ema_bytes(others: int, experts: int, dp: int, edp: int) -> int:
    """Bytes of CPU memory for the weights' average of a rank's shard, fp32: the average and the snapshot it follows."""
    return 2 * BYTES["fp32"] * (-(-others // dp) + -(-experts // edp))
