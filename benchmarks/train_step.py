"""Tokens per second and peak memory of one training step, beside transformers' `DeepseekV3ForCausalLM`.

Both sides get the same sizes, weights' dtype, threads, optimiser and tokens. Speed is taken in one process, the two
models' steps interleaved, so that a busy moment of the machine hits both; the figure is the ratio of their median step
times. Peak memory is what a process of its own adds to its resident maximum, for each side.

    python benchmarks/train_step.py [--steps 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_nextn_predict_layers=0,
    num_attention_heads=8,
    n_routed_experts=16,
    kv_lora_rank=64,
    q_lora_rank=128,
    qk_rope_head_dim=16,
    v_head_dim=32,
    qk_nope_head_dim=32,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    initializer_range=0.02,
)
BATCH, LENGTH = 8, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[torch.Tensor], float]


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The same for both sides: torch's fused AdamW with the report's constants."""
    return torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def ours(dtype: torch.dtype) -> Step:
    """A step of `Transformer`: main loss and sequence-wise balance loss, backward, AdamW."""
    model = Transformer(CONFIG, dtype=dtype)
    adamw = optimizer(model)

    def step(tokens: torch.Tensor) -> float:
        losses = model.losses(tokens)
        (losses.main + losses.balance).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return losses.main.item()

    return step


def theirs(dtype: torch.dtype) -> Step:
    """A step of transformers' model as it comes: next-token loss, backward, AdamW."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG.to_hf(), use_cache=False)).to(dtype).train()
    adamw = optimizer(model)

    def step(tokens: torch.Tensor) -> float:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


SIDES = {"transformers": theirs, "dsv3_book": ours}


def tokens_of(step: int) -> torch.Tensor:
    """Random tokens, the same for both sides."""
    return torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def speed(dtype: torch.dtype, steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each side, interleaved; three warm-up steps are dropped."""
    sides = {name: make(dtype) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(steps + 3):
        for name, step in sides.items():
            start = time.perf_counter()
            step(tokens_of(i))
            seconds[name].append(time.perf_counter() - start)
    return {name: times[3:] for name, times in seconds.items()}


def memory(side: str, dtype: str) -> float:
    """MiB a fresh process adds to its resident peak by building `side`'s model and training six steps."""
    out = subprocess.run(
        [sys.executable, __file__, "--memory", side, "--dtype", dtype], capture_output=True, text=True, check=True
    )
    return float(out.stdout)


def measure_memory(side: str, dtype: torch.dtype) -> None:
    """Prints the growth of the peak over what the imports took. Run in a process of its own."""
    import transformers  # noqa: F401  imported for both sides, so that only the models differ

    SIDES[side](dtype)(tokens_of(0)[:1, :9])  # libraries load, threads start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = SIDES[side](dtype)
    for i in range(6):
        step(tokens_of(i))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        measure_memory(args.memory, DTYPES[args.dtype])
        return
    rows: list[dict[str, Any]] = []
    print(f"{'':14}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    dtypes = [args.dtype] if args.dtype else list(DTYPES)
    # Memory first: a child's peak starts at its parent's, which must not hold a model yet.
    peaks = {(side, dtype): memory(side, dtype) for dtype in dtypes for side in SIDES}
    for dtype in dtypes:
        seconds = speed(DTYPES[dtype], args.steps)
        base: dict[str, float] = {}
        for side, times in seconds.items():
            rate, peak = BATCH * LENGTH / statistics.median(times), peaks[side, dtype]
            base = base or {"rate": rate, "peak": peak}
            print(
                f"{dtype} {side:13}{rate:6.0f}{rate / base['rate']:8.2f}{peak:10.0f}{peak / base['peak']:8.2f}",
                flush=True,
            )
            rows.append({"dtype": dtype, "side": side, "tokens_per_second": rate, "peak_mib": peak})
    if args.json:
        Path(args.json).write_text(json.dumps({"threads": args.threads, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
