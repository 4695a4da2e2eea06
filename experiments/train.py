"""The shared part of the experiments: train one small model under one rule of balancing, and measure it.

Every run is a pure function of its `Arm` (plus the corpus), and its result is kept in `runs/experiments/`, so scripts
that need the same run share it. The book imports nothing of this; pages read the recorded JSON through
`dsv3_book.show.recorded`.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "src" / "dsv3_book" / "results"
CACHE = ROOT / "runs" / "experiments"
VERSION = 1  # raise it when the code below would give other numbers for the same arm


@dataclass(frozen=True)
class Arm:
    """One run: how its experts are balanced, its MTP depth, its seed and its size. All of it is *our choice*."""

    name: str
    seed: int = 0
    gamma: float = 0.0  # speed of the routing bias; 0: no bias
    alpha: float = 0.0  # strength of the sequence-wise loss
    alpha_batch: float = 0.0  # strength of the same loss with f and P over the whole batch
    mtp_depth: int = 0
    mtp_weight: float = 0.3
    steps: int = 250
    sequences: int = 16
    length: int = 64
    lr: float = 4e-3
    width: int = 96
    layers: int = 3
    vocab: int = 1024


def config(arm: Arm) -> Any:
    """Laptop-size routing (16 experts, 4 of them chosen from 2 of 4 groups) in a narrower, shallower model."""
    from dsv3_book.config import ModelConfig

    return ModelConfig.preset("laptop").replace(
        vocab_size=arm.vocab, hidden_size=arm.width, num_hidden_layers=arm.layers, intermediate_size=256,
        moe_intermediate_size=48, num_attention_heads=4, kv_lora_rank=32, q_lora_rank=48,
        num_nextn_predict_layers=arm.mtp_depth, aux_loss_alpha=arm.alpha,
    )  # fmt: skip


def data(arm: Arm) -> Any:
    """The standard library of the Python that runs this; a tenth of the documents held out."""
    from dsv3_book.data import prepare

    return prepare(
        vocab_size=arm.vocab, held_out=0.1, fim_rate=0.0, newline_split_rate=0.0, seed=arm.seed, progress=False
    )


def run(arm: Arm) -> dict[str, Any]:
    """Train and measure one arm, or find its result in the cache."""
    key = json.dumps([VERSION, dataclasses.asdict(arm)], sort_keys=True)
    place = CACHE / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"
    if place.exists():
        return json.loads(place.read_text())
    result = _train(arm)
    CACHE.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result))
    print(f"{arm.name:12s} seed {arm.seed}: val {result['val_loss']:.4f}  MaxVio {result['max_violation_held_out']}"
          f"  ({result['seconds']:.0f} s)", flush=True)  # fmt: skip
    return result


def _train(arm: Arm) -> dict[str, Any]:
    import torch

    from dsv3_book.model import Transformer
    from dsv3_book.model.balance import max_violation, sequence_balance_loss, update_bias

    torch.set_num_threads(1)
    torch.manual_seed(arm.seed)
    began, cfg, corpus = time.monotonic(), config(arm), data(arm)
    model = Transformer(cfg, seed=arm.seed)
    routers = [router for _, router in model.routers()]
    decay = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], lr=arm.lr, betas=(0.9, 0.95)
    )
    J, k = arm.mtp_depth, cfg.num_experts_per_tok
    trace: dict[str, list[Any]] = defaultdict(list)
    for step in range(arm.steps):
        for group in opt.param_groups:
            group["lr"] = arm.lr * _schedule(step, arm.steps)
        # The stride does not depend on J, so that arms with and without MTP see the same windows.
        batch = corpus.train.sequences(step * arm.sequences, arm.sequences, arm.length + 1 + J, stride=arm.length)
        x, routings = model.run_blocks(model.embed(batch[:, : arm.length]))
        losses = model.head_losses(x, batch, routings)
        loss = losses.main + arm.mtp_weight * losses.mtp + losses.balance
        for routing in routings if arm.alpha_batch else []:
            loss = loss + sequence_balance_loss(routing.scores[None], k, arm.alpha_batch)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        trace["loss"].append(round(losses.main.item(), 4))
        trace["max_violation"].append([round(v, 3) for v in max_violation(losses.load).tolist()])
        if arm.gamma:
            for router, load in zip(routers, losses.load, strict=True):
                update_bias(router.e_score_correction_bias, load, arm.gamma)
    result = {"arm": dataclasses.asdict(arm), **trace, **_held_out(model, corpus, arm), **_domains(model, corpus, arm)}
    result["bias"] = [[round(b, 4) for b in r.e_score_correction_bias.tolist()] for r in routers]
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["seconds"] = time.monotonic() - began
    return result


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _held_out(model: Any, corpus: Any, arm: Arm) -> dict[str, Any]:
    """Main loss on held-out text (nats a token, bits a byte), the load there, and how often MTP's draft is accepted."""
    import torch

    from dsv3_book.model.balance import max_violation

    nats = tokens = size = agree = right = drafts = 0.0
    load = torch.zeros(len(model.routers()), model.cfg.n_routed_experts)
    with torch.no_grad():
        for batch in corpus.evaluation(64, arm.length, extra=arm.mtp_depth, max_windows=512):
            losses = model.losses(batch.tokens)
            nats, tokens = nats + losses.main.item() * batch.predicted, tokens + batch.predicted
            size, load = size + batch.bytes, load + losses.load
            if arm.mtp_depth:
                a, r, n = _accepted(model, batch.tokens)
                agree, right, drafts = agree + a, right + r, drafts + n
    out = {
        "val_loss": nats / tokens,
        "val_bits_per_byte": nats / math.log(2) / size,
        "val_tokens": int(tokens),
        "load_held_out": [[round(v, 4) for v in row] for row in (load / load.sum(-1, keepdim=True)).tolist()],
        "max_violation_held_out": [round(v, 3) for v in max_violation(load).tolist()],
    }
    if drafts:
        out |= {"accepted": agree / drafts, "draft_correct": right / drafts, "drafts": int(drafts)}
    return out


def _accepted(model: Any, tokens: Any) -> tuple[int, int, int]:
    """Drafts of the second token that equal the main model's own greedy choice; that equal the text; all drafts.

    The context is the held-out text itself (teacher forcing): position t knows tokens up to t, MTP also token t + 1,
    and drafts token t + 2, which the main model chooses one position later.
    """
    T = tokens.shape[1] - 1 - model.cfg.num_nextn_predict_layers
    x, _ = model.run_blocks(model.embed(tokens[:, :T]))
    hidden = model.norm(x)
    own = model.lm_head(hidden).argmax(-1)
    after, _ = model.mtp_modules()[0].predict(
        hidden, model.embed(tokens[:, 1 : T + 1]), model.angles(T), model.dispatch
    )
    draft = model.lm_head(after).argmax(-1)[:, :-1]
    return int((draft == own[:, 1:]).sum()), int((draft == tokens[:, 2 : T + 1]).sum()), draft.numel()


def _domains(model: Any, corpus: Any, arm: Arm, windows: int = 32, fewest: int = 6) -> dict[str, Any]:
    """Each domain's share of every main-model router's load, on held-out documents.

    A domain is a package of the standard library (its first folder) with at least `fewest` windows of held-out text. As
    a control, the same windows are dealt out at random into groups of the same sizes: what is left there is noise.
    """
    import torch

    ids = defaultdict(list)
    for document in corpus.corpus.held_out:
        package = document.name.split("/")[0] if "/" in document.name else "(single modules)"
        ids[package] += corpus.tokenizer.encode(document.text)
    loads, sizes = [], []
    names = sorted(n for n, t in ids.items() if len(t) >= fewest * arm.length)
    with torch.no_grad():
        for name in names:
            count = min(windows, len(ids[name]) // arm.length)
            rows = torch.tensor(ids[name][: count * arm.length]).view(count, arm.length)
            _, routings = model.run_blocks(model.embed(rows))
            per_window = [_window_load(r.experts.view(len(rows), -1), model.cfg.n_routed_experts) for r in routings]
            loads.append(torch.stack(per_window, 1))  # [windows, routers, E]
            sizes.append(len(rows))
    mixed = torch.cat(loads)[torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))].split(sizes)
    share = _shares(loads)
    return {
        "domains": names,
        "domain_windows": sizes,
        "domain_load": [[[round(v, 4) for v in row] for row in d] for d in share.tolist()],
        "specialisation": [round(v, 4) for v in _distance(share).tolist()],
        "specialisation_control": [round(v, 4) for v in _distance(_shares(mixed)).tolist()],
    }


def _window_load(experts: Any, E: int) -> Any:
    import torch

    return torch.zeros(len(experts), E).scatter_add_(1, experts, torch.ones_like(experts, dtype=torch.float32))


def _shares(loads: Any) -> Any:
    import torch

    total = torch.stack([part.sum(0) for part in loads])
    return total / total.sum(-1, keepdim=True)


def _distance(share: Any) -> Any:
    """Per router: the total-variation distance of a domain's load from the domains' mean, averaged over domains."""
    return 0.5 * (share - share.mean(0)).abs().sum(-1).mean(0)


# Running many, and writing down what came out ------------------------------------------------------------------------
def arguments(description: str) -> argparse.Namespace:
    """The command line that all experiments share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def sweep(arms: list[Arm], processes: int) -> list[dict[str, Any]]:
    """All runs, some at a time, in the order of `arms`."""
    data(arms[0])  # built once, before processes would wait for each other
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(run, arms))


def record(name: str, command: str, results: dict[str, Any], how: str = "one thread a run, fp32") -> None:
    """Write `results` as the package data `name`, with what is needed to make them again."""
    import torch

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    about = {
        "date": date.today().isoformat(),
        "command": command,
        "commit": git("rev-parse", "HEAD"),
        "machine": f"{os.cpu_count()} CPU cores ({_cpu()}), {how}, torch {torch.__version__}",
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about, **results}, separators=(",", ":")) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
