"""Claim C7: do experts specialise more by domain without an auxiliary loss? Uses the runs of `balance.py`.

Run it as `python experiments/specialisation.py`.
"""

from typing import Any

from balance import RULES, arms
from train import arguments, record, sweep


def main() -> None:
    given = arguments(__doc__.splitlines()[0])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RULES}
    results = sweep(arms(given.seeds, given.steps), given.processes)
    for one in results:
        kept = {key: one[key] for key in ("specialisation", "specialisation_control")} | {"seed": one["arm"]["seed"]}
        if one["arm"]["seed"] == 0:
            kept["domain_load"] = one["domain_load"]  # [domain][router][expert], enough for a picture
        runs[one["arm"]["name"]].append(kept)
    command = f"python experiments/specialisation.py --seeds {given.seeds} --steps {given.steps}"
    about = {
        "domains": results[0]["domains"],
        "windows": results[0]["domain_windows"],
        "length": results[0]["arm"]["length"],
    }
    record("specialisation", command, {**about, "rules": RULES, "runs": runs})


if __name__ == "__main__":
    main()
