"""Claims C5 and C6: what keeps experts balanced, and what that costs. Five rules, same data, same steps, same seeds.

Run it as `python experiments/balance.py`.
"""

from statistics import fmean
from typing import Any

from train import Arm, arguments, record, sweep

# Strengths are our choice: 0.01 is customary for auxiliary losses; γ is five times the report's 0.001, because these
# runs have hundreds of steps where the report's have over two hundred thousand; 1e-4 is the report's.
RULES: dict[str, dict[str, float]] = {
    "none": {},
    "sequence_loss": {"alpha": 0.01},
    "batch_loss": {"alpha_batch": 0.01},
    "bias": {"gamma": 0.005},
    "v3": {"gamma": 0.005, "alpha": 1e-4},
}


def arms(seeds: int, steps: int) -> list[Arm]:
    """Every rule with every seed; `alpha` is 0 unless the rule names it."""
    return [Arm(name, seed, steps=steps, **rule) for seed in range(seeds) for name, rule in RULES.items()]  # type: ignore[arg-type]


def thin(values: list[Any], every: int) -> list[Any]:
    """Means over stretches of `every` steps (of numbers, or of lists of numbers)."""
    parts = [values[i : i + every] for i in range(0, len(values), every)]
    if isinstance(values[0], list):
        return [[round(fmean(column), 3) for column in zip(*part, strict=True)] for part in parts]
    return [round(fmean(part), 4) for part in parts]


def main() -> None:
    given = arguments(__doc__.splitlines()[0])
    keep = ("val_loss", "val_bits_per_byte", "max_violation_held_out", "load_held_out", "bias")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RULES}
    results = sweep(arms(given.seeds, given.steps), given.processes)
    for one in results:
        kept = {key: one[key] for key in keep} | {"seed": one["arm"]["seed"]}
        kept |= {"loss": thin(one["loss"], 5), "max_violation": thin(one["max_violation"], 5)}
        runs[one["arm"]["name"]].append(kept)
    sizes = {"arm": results[0]["arm"], "parameters": results[0]["parameters"], "val_tokens": results[0]["val_tokens"]}
    command = f"python experiments/balance.py --seeds {given.seeds} --steps {given.steps}"
    record("balance", command, {"every": 5, "sizes": sizes, "rules": RULES, "runs": runs})


if __name__ == "__main__":
    main()
