"""A step whose loss or gradient is infinite or not a number: what is to know about it, in a sentence and in files.

    RUN/nonfinite/step-13/report.json          losses of every micro-batch, where it began, gradients, settings
    RUN/nonfinite/step-13/tokens.safetensors   the step's sequences, [micro-batches, B, width]

Where it came from is found in `culprit.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3_book import checkpoint
from dsv3_book.train.culprit import find, finite, search
from dsv3_book.train.recipe import Settings
from dsv3_book.train.totals import Totals

if TYPE_CHECKING:
    from dsv3_book.train.trainer import Trainer

__all__ = ["LIMIT", "NonFinite", "examine", "finite", "finite_line", "last_checkpoint"]

FOLDER = "nonfinite"
LOSSES = ("loss", "loss_mtp", "balance_loss")
LIMIT = 10  # steps in a row that may be left out, before the run stops all the same (our choice)


class NonFinite(RuntimeError):
    """The loss or the gradient is infinite or not a number; the weights are as they were before that step."""


def examine(trainer: Trainer, now: Settings, mine: Sequence[Tensor], totals: Totals, norm: Tensor) -> str:
    """Writes down what is known of the step under way, and says the most important in a sentence. All must call it,
    after the gradients were summed; they are gone afterwards.

    mine: this pipeline's micro-batches.
    """
    t, step = trainer, trainer.step + 1
    B, count = t.config.batch.micro, now.sequences // t.config.batch.micro
    found = find(t.pipeline, t.optimizer, t.job.mesh, t.parallel, mine)
    culprits = sorted(found.outputs)
    if not found.outputs and found.gradients:
        culprits = search(t.pipeline, t.optimizer, t.job.mesh, t.parallel, mine, now.mtp_weight)
    t.optimizer.zero_grad()

    def which(number: int) -> str:
        first = t.sequences + number * B
        return f"micro-batch {number} (sequence {first}{f' to {first + B - 1}' if B > 1 else ''} of the run)"

    layers = found.layers(t.config.model.num_hidden_layers)
    if (first := found.first()) is not None:
        cause = f"the first output that is not finite is that of {first[1].module}, in {which(first[0])}"
    elif layers:
        layer, names = next(iter(layers.items()))
        among = f" ({', '.join(names)})" if list(names) != [layer] else ""
        where = f", in {which(culprits[0])}" if culprits else ""
        cause = f"all outputs are finite, but gradients are not, first on the way back those of {layer}{among}{where}"
    else:
        cause = "all outputs and all gradients are finite, so the sum over them overflowed"
    main, mtp, balance = totals.losses.tolist()
    said = (
        f"step {step} is not finite (loss {main}, MTP loss {mtp}, balance loss {balance}, gradient norm "
        f"{norm.item()}), so it was not taken: {cause}"
    )
    if t.parallel.rank > 0:
        return said
    report = {
        "step": step,
        "said": said,
        "losses": dict(zip(LOSSES, map(number, (main, mtp, balance)), strict=True)),
        "grad_norm": number(norm.item()),
        "first_output": {"module": first[1].module, "micro_batch": first[0]} if first is not None else None,
        "gradients": [{"layer": layer, "not_finite": counts} for layer, counts in layers.items()],
        "micro_batches": [
            {
                "micro_batch": m,
                "sequences": list(range(t.sequences + m * B, t.sequences + (m + 1) * B)),
                **dict(zip(LOSSES, map(number, losses), strict=True)),
                "first_output": found.outputs[m].module if m in found.outputs else None,
                "guilty": m in culprits,
            }
            for m, losses in enumerate(found.losses)
        ],
        "settings": asdict(now),
        "config": t.config.to_dict(),
    }
    folder = t.config.out / FOLDER / f"step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
        tokens = torch.stack([t.micro_batch(m).cpu() for m in range(count)])
        save_file({"tokens": tokens.to(torch.int32)}, folder / "tokens.safetensors")
    except OSError as error:
        return f"{said}. (No report: cannot write {error.filename or folder}: {error.strerror})"
    except SafetensorError as error:  # a full disk, from a library that has its own errors
        return f"{said}. (No report: cannot write to {folder}: {error})"
    return f"{said}. All about it is in {folder}"


def last_checkpoint(folder: Path) -> str:
    """What there is to go back to, in words."""
    kept = checkpoint.found(folder)
    return f"the last checkpoint is of step {kept[0][0]}" if kept else "there is no checkpoint yet"


def number(value: float) -> float | str:
    """As JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else str(value)


def finite_line(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics of a step that was left out: what is not finite in it is null."""
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return {**known, "skipped": True}
