"""What a rank does, in words: the five schedules of Part III, each as a few lines of data.

A word is a kind of work and the *lane* it is done in: ``F0`` a forward, ``B0`` a whole backward, ``I0`` its half for
the inputs, ``W`` the half for the weights of the oldest ``I`` that still owes it, ``F0B1`` a forward and a whole
backward as one overlapped pair. A one-way pipeline has lane 0 only. Where a rank holds two stages, lane 0 is the one
nearer to where its micro-batches enter, lane 1 the one nearer to the loss. Within a lane micro-batches come in order,
so a list of words says everything: :func:`dsv3_book.pipeline.schedule.spell` only counts.
"""


def one_f_one_b(num_ranks: int, rank: int, num_microbatches: int) -> list[str]:
    """1F1B: as many forwards as there are ranks below, then forward and backward in turn, then the backwards left.

    Source: PipeDream-Flush (Narayanan et al., 2021); it holds at most ``num_ranks`` micro-batches' activations.
    """
    ahead = min(num_ranks - 1 - rank, num_microbatches)
    return ["F0"] * ahead + ["F0", "B0"] * (num_microbatches - ahead) + ["B0"] * ahead


def zb1p(num_ranks: int, rank: int, num_microbatches: int) -> list[str]:
    """ZB1P: 1F1B with each backward cut in two, and rank ``r``'s weight gradients put off by ``r`` micro-batches.

    The input gradient travels up at once; the work put off fills the end, where a rank of 1F1B would wait. Rank r has
    r micro-batches fewer in flight than rank 0, so what W needs fits in 1F1B's memory.
    Source: ZB-H1 in *Zero Bubble Pipeline Parallelism* (Qi et al., arXiv 2401.10241).
    """
    words: list[str] = []
    owed = 0
    for word in one_f_one_b(num_ranks, rank, num_microbatches):
        words.append(word.replace("B", "I"))
        owed += word == "B0"
        if owed > rank:
            words.append("W")
            owed -= 1
    return words + ["W"] * owed


def chimera(num_stages: int, stage: int, num_microbatches: int) -> list[str]:
    """Chimera: two 1F1B pipelines in opposite directions, merged slot by slot on the rank that holds `stage`.

    Count time in slots of one forward or one backward. A unit is ``num_stages`` micro-batches, half of them each way,
    and fills 2 × ``num_stages`` slots of a rank. Micro-batch i of a unit (i = 0, 1, …) is forwarded at stage s in slot
    s + 2i and comes back in slot 2·num_stages − 1 − s + 2i, each as late as the last stage allows. The mirrored lane
    does the same from the other end; with an even number of stages no slot is asked for twice, nor by the next unit.

    Args:
        stage: the rank's stage nearer the entrance (lane 0); lane 1 is ``num_stages − 1 − stage``.
        num_microbatches: those of one direction, a multiple of ``num_stages / 2``.

    Source: Li and Hoefler, *Chimera* (arXiv 2107.06925), units concatenated directly.
    """
    slots: dict[int, str] = {}
    for lane, s in enumerate((stage, num_stages - 1 - stage)):
        for microbatch in range(num_microbatches):
            unit, i = divmod(microbatch, num_stages // 2)
            start = 2 * num_stages * unit + 2 * i
            slots[start + s] = f"F{lane}"
            slots[start + 2 * num_stages - 1 - s] = f"B{lane}"
    return [slots[slot] for slot in sorted(slots)]


def dualpipe(depth: int, place: int, num_microbatches: int) -> list[str]:
    """DualPipe and DualPipeV: the released code's eight steps, for the rank at `place` on one arm of a fold.

    Fold the pipeline in the middle: each rank of an arm meets every micro-batch twice, on the way in (lane 0) and on
    the way out (lane 1). In DualPipe the arms are the two halves of the ranks and the lanes belong to the two
    directions; in DualPipeV there is one arm. The order is the same.

    Args:
        depth: ranks on an arm: P/2 for DualPipe, P for DualPipeV.
        place: 0 at the open end, where data enters, to ``depth − 1`` at the fold.
        num_microbatches: of one lane, at least ``2 · depth``.

    Source: deepseek-ai/DualPipe, ``dualpipe.py`` and ``dualpipev.py``, ``step``. One order, action for action (tested).
    """
    inward, outward = depth - 1 - place, place + 1  # ranks between here and the fold; ranks from here to the open end
    main = ["F0B1", "F1B0"] * (num_microbatches - 2 * depth + outward)
    if inward == 0:
        main[:1] = ["F0", "B1"]  # at the fold the first B1 waits for the F before it: apart, F needn't wait with it
    return [
        *["F0"] * (2 * inward),  # 1. fill this half of the arm, there and back
        *["F0", "F1"] * outward,  # 2. both lanes run forward
        *["I1", "W", "F1"] * inward,  # 3. the first gradients come: pass them on at once, then their weights
        *main,  # 4. every forward under a backward of the other lane
        *["B1", "F1B0"] * inward,  # 5. lane 0 has nothing left to forward
        *(["B1", "B0"] * outward)[:outward],  # 6. no forwards left. Of these backwards the first half are whole,
        *(["I1", "I0"] * outward)[outward:],  # ... the second half put their weights off
        *["W", "I0"] * inward,  # 7. to fill the gaps between the last gradients
        *["W"] * outward,  # 8. what is still owed
    ]  # fmt: skip
