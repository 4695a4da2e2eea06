"""Records the benchmark of one training step beside transformers, for chapter 7 and the README. Wants a quiet machine.

python experiments/speed.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from train import ROOT, record


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "benchmarks/train_step.py", "--json", str(file)], cwd=ROOT, check=True)
        results = json.loads(file.read_text(encoding="utf-8"))
    record("train_step", "python experiments/speed.py", results, f"{results['threads']} threads")


if __name__ == "__main__":
    main()
