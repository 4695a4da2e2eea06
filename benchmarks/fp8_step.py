"""What an `--fp8` training step costs on a CPU, and what it saves (claims C10 and C23), beside fp32 and bf16.

One model (that of `train_step.py`), the trainer's own optimiser, three ways to compute, each with and without
recomputing RMSNorm and MLA's up-projections. All steps are taken in turns in one process and timed in CPU seconds of
one thread, so that other programs on the machine count little; a ratio is the median over rounds of the ratio within a
round. Bytes are counted, not measured: what autograd keeps between forward and backward, each storage once, without the
parameters; and AdamW's moments.

    python benchmarks/fp8_step.py [--rounds 5] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _measure import record
from torch import Tensor
from train_step import BATCH, CONFIG, LENGTH, tokens_of

from dsv3_book.fp8.layers import use_fp8
from dsv3_book.fp8.linear import QuantisedWeight
from dsv3_book.model import Transformer, ops
from dsv3_book.optim import adamw, clip_by_global_norm

KINDS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "fp8": ("bf16", "bf16")}  # activations, AdamW's moments
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Run:
    """A model in training: `kind` is fp32, bf16 or fp8 (products in FP8, their results in bf16)."""

    def __init__(self, kind: str, recompute: bool) -> None:
        dtype, moments = KINDS[kind]
        self.model = Transformer(CONFIG, compute_dtype=DTYPES[dtype])
        self.model.set_recompute(recompute)
        if kind == "fp8":
            use_fp8(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.model.named_parameters(), 2e-4, moments=moments)

    def loss(self, number: int, sequences: int = BATCH) -> Tensor:
        losses = self.model.losses(tokens_of(number)[:sequences])
        return losses.main + losses.balance

    def step(self, number: int) -> None:
        self.loss(number).backward()
        clip_by_global_norm([(self.parameters, None)], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> int:
        """Bytes of AdamW's two moments."""
        return sum(t.nbytes for p in self.parameters for t in self.optimizer.state_of(p).values() if t.dim())

    def kept(self, sequences: int) -> int:
        """Bytes that autograd keeps for backward, parameters left out."""
        with counting({p.untyped_storage().data_ptr() for p in self.parameters}) as storages:
            loss = self.loss(0, sequences)
        del loss
        return sum(storages.values())

    def fp8_weights(self) -> int:
        """Bytes of the FP8 weights kept between micro-batches, with their transposes."""
        found = {id(w): w for w in _quantised([m.__dict__.get("product") for m in self.model.modules()])}
        return sum(t.nbytes for w in found.values() for t in (*w.blocks, *w.transposed))


def _quantised(products: list[Any]) -> Iterator[QuantisedWeight]:
    for product in products:
        for cache in getattr(product, "caches", [getattr(product, "cache", None)]):
            if cache is not None and cache.seen is not None:
                yield cache.quantised


@contextmanager
def counting(known: set[int]) -> Iterator[dict[int, int]]:
    """Fills {address: bytes} of every storage that something keeps for backward, unless `known` has it.

    `ops.recomputed` has hooks of its own, and torch calls only the innermost: so what those keep is counted there.
    """
    storages: dict[int, int] = {}
    pack, enter = ops.recomputed._pack, ops.recomputed.__enter__

    def count(saved: Any) -> Any:
        if isinstance(saved, Tensor) and saved.untyped_storage().data_ptr() not in known:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    def entered(self: ops.recomputed) -> Any:
        for one in self.inputs if self.enabled else ():
            count(one)
        return enter(self)

    ops.recomputed._pack = lambda self, saved: count(pack(self, saved))  # type: ignore[method-assign]
    ops.recomputed.__enter__ = entered  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            yield storages
    finally:
        ops.recomputed._pack, ops.recomputed.__enter__ = pack, enter  # type: ignore[method-assign]


def bytes_kept() -> list[dict[str, Any]]:
    """Per way of computing: bytes kept for each token, what is kept beside (a bf16 step's copies of the weights, the
    head's gradient), FP8 weights with their transposes, and moments for each parameter."""
    rows = []
    for kind in KINDS:
        for recompute in (False, True):
            run = Run(kind, recompute)
            one, two = run.kept(1), run.kept(2)
            rows.append({
                "kind": kind, "recompute": recompute, "kept_per_token": (two - one) / LENGTH,
                "kept_beside": one - (two - one), "fp8_weights": run.fp8_weights(),
                "moments_per_parameter": run.moments() / sum(p.numel() for p in run.parameters),
            })  # fmt: skip
    return rows


def timed(rounds: int) -> dict[tuple[str, bool], list[float]]:
    """CPU seconds of each way's steps, taken in turns; one step each beforehand is not counted."""
    runs = {(kind, recompute): Run(kind, recompute) for kind in KINDS for recompute in (False, True)}
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            began = time.process_time()
            run.step(number)
            seconds[key].append(time.process_time() - began)
    return {key: times[1:] for key, times in seconds.items()}


def shares() -> dict[str, float]:
    """Where an fp8 step's time goes on this CPU, as shares, by torch's profiler."""
    run = Run("fp8", False)
    run.step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for number in range(1, 4):
            run.step(number)
    events = {e.key: e for e in profile.key_averages()}
    whole = sum(e.self_cpu_time_total for e in events.values())
    ours = {k.split("::")[1]: e.cpu_time_total / whole for k, e in events.items() if k.startswith("dsv3_book::")}
    products = sum(share for name, share in ours.items() if "quantize" not in name)
    return {
        "products": products,
        "quantisers": sum(ours.values()) - products,
        "everything else": 1 - sum(ours.values()),
        **{f"  {name}": share for name, share in sorted(ours.items(), key=lambda item: -item[1])},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="record as src/dsv3_book/results/fp8_step.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = bytes_kept()
    seconds = timed(given.rounds)
    base = seconds["fp32", False]
    print(f"{'':18}{'s / step':>9}{'of fp32':>9} | for backward: {'B/token':>8}{'of bf16':>9} | moments B/parameter")
    bf16 = next(row["kept_per_token"] for row in rows if row["kind"] == "bf16" and not row["recompute"])
    for row in rows:
        times = seconds[row["kind"], row["recompute"]]
        row["seconds"] = statistics.median(times)
        row["of_fp32"] = statistics.median(a / b for a, b in zip(times, base, strict=True))
        row["of_without"] = statistics.median(
            a / b for a, b in zip(times, seconds[row["kind"], False], strict=True)
        )  # what recomputing costs
        name = row["kind"] + (", recompute" if row["recompute"] else "")
        print(
            f"{name:18}{row['seconds']:9.3f}{row['of_fp32']:9.2f} | {row['kept_per_token']:22.0f}"
            f"{row['kept_per_token'] / bf16:9.2f} | {row['moments_per_parameter']:4.1f}"
        )
    print("\nwhere the time of an fp8 step goes:")
    parts = shares()
    for name, share in parts.items():
        print(f"  {name:24}{share:6.1%}")
    if given.write:
        command = " ".join(["python benchmarks/fp8_step.py", *sys.argv[1:]])
        sizes = {"hidden_size": CONFIG.hidden_size, "layers": CONFIG.num_hidden_layers, "tokens": BATCH * LENGTH}
        record("fp8_step", command, {"sizes": sizes, "rows": rows, "shares": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
