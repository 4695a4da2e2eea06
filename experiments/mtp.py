"""Claims C8 and C9: does MTP help the main loss, and how often is its draft of the second token accepted?

Both arms are balanced as V3 is (bias and small sequence-wise loss), see the same windows and start from the same
weights, because every matrix is drawn from its own generator.

Run it as `python experiments/mtp.py`.
"""

from typing import Any

from balance import RULES, thin
from train import Arm, arguments, record, sweep


def main() -> None:
    given = arguments(__doc__.splitlines()[0])
    # Both arms are called "v3": the one without MTP is the very run of balance.py.
    todo = [
        Arm("v3", seed, steps=given.steps, mtp_depth=depth, **RULES["v3"])  # type: ignore[arg-type]
        for seed in range(given.seeds)
        for depth in (0, 1)
    ]
    runs: dict[str, list[dict[str, Any]]] = {"0": [], "1": []}
    results = sweep(todo, given.processes)
    for one in results:
        kept = {key: one[key] for key in ("val_loss", "val_bits_per_byte", "parameters")} | {"seed": one["arm"]["seed"]}
        kept |= {key: one[key] for key in ("accepted", "draft_correct", "drafts") if key in one}
        runs[str(one["arm"]["mtp_depth"])].append(kept | {"loss": thin(one["loss"], 5)})
    command = f"python experiments/mtp.py --seeds {given.seeds} --steps {given.steps}"
    sizes = {"arm": results[1]["arm"], "val_tokens": results[0]["val_tokens"]}
    record("mtp", command, {"every": 5, "mtp_weight": 0.3, "sizes": sizes, "runs": runs})


if __name__ == "__main__":
    main()
