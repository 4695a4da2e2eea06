"""The table that `python -m dsv3_book.costs` prints: every number comes from `costs.py`, here they get their rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .config import PRESETS, ModelConfig
from .costs import (
    REPORT_SEQUENCE_LENGTH,
    attention_params,
    causal_context,
    combine_bytes,
    count,
    dispatch_bytes,
    forward_flops,
    full_bill,
    implied_mfu,
    kv_cache_bytes,
    kv_numbers,
    main_params,
    mha_kv_numbers,
    mtp_params,
    pretraining_bill,
    rule_of_thumb_flops,
    tokens_per_second_per_gpu,
    training_bytes,
    training_flops,
)


def table(cfg: ModelConfig, title: str, context: int | None = None) -> str:
    """The costs of `cfg` as text; sequences (for FLOPs) and cache are `context` tokens long."""
    tokens = context or min(REPORT_SEQUENCE_LENGTH, cfg.max_position_embeddings)
    cache_tokens = context or cfg.max_position_embeddings
    c = count(cfg)
    out = [f"{title}: {cfg.num_hidden_layers} layers, width {cfg.hidden_size}", "", "Weights of the main model"]
    out += _rows(main_params(cfg)) + _rows({"total": c.main})
    out += ["  attention of one layer"] + [f"  {row}" for row in _rows(attention_params(cfg))]
    out += ["", "Used by one token"]
    out += _rows({"without the embedding": c.active, "with the embedding table": c.active_with_embedding})
    if cfg.num_nextn_predict_layers:
        out += ["", f"MTP ({cfg.num_nextn_predict_layers} deep; pieces of one depth)"] + _rows(mtp_params(cfg))
        out += _rows({"total": c.mtp, "with its copies of embedding and head": c.mtp_on_disk})
        out += _rows({"main model and MTP on disk": c.on_disk})
    out += ["", "Routing biases (buffers)"] + _rows({"main model": c.main_biases, "MTP": c.mtp_biases})

    forward = forward_flops(cfg, causal_context(tokens))
    out += ["", f"MFLOP per token, forward, sequences of {tokens} (causal average: {causal_context(tokens):g} keys)"]
    out += _rows({k: v / 1e6 for k, v in forward.items()} | {"total": sum(forward.values()) / 1e6})
    train = {"forward and backward": training_flops(cfg, tokens) / 1e6}
    train["without MTP"] = training_flops(cfg, tokens, mtp=False) / 1e6
    train["6 N alone (no attention scores, no MTP)"] = rule_of_thumb_flops(cfg) / 1e6
    out += _rows(train)

    mha, mla = mha_kv_numbers(cfg), kv_numbers(cfg)
    out += ["", "KV cache, numbers per token and layer"]
    out += _rows({"MLA": mla, f"multi-head attention ({mha / mla:.1f} times)": mha})
    out += _rows({f"MLA, {cache_tokens} tokens in bf16, GB": kv_cache_bytes(cfg, cache_tokens) / 1e9})
    state = training_bytes(c.main + c.mtp)
    out += ["", "Training state, GB (one copy of everything)"]
    out += _rows({"weights bf16": state.weights / 1e9, "master weights fp32": state.master / 1e9})
    out += _rows({"gradients fp32": state.gradients / 1e9, "two moments bf16": state.moments / 1e9})
    out += _rows({"total": state.total / 1e9})
    if cfg.num_moe_layers:
        out += ["", "Bytes a token sends per MoE layer (FP8 out, bf16 back)"]
        for what, n in (("expert", cfg.num_experts_per_tok), ("group, each once", cfg.topk_group)):
            out += _rows(
                {f"dispatch to {n} x {what}": dispatch_bytes(cfg, n), f"combine from {n}": combine_bytes(cfg, n)}
            )
    if cfg == PRESETS["v3-671b"]:
        out += _report_rows(cfg)
    return "\n".join(out)


def _report_rows(cfg: ModelConfig) -> list[str]:
    one, pre, full = pretraining_bill(1e12), pretraining_bill(), full_bill()
    rows = {
        "K GPU-hours per trillion tokens (report)": one.gpu_hours / 1e3,
        f"days per trillion tokens on {one.gpus}": one.days,
        "K GPU-hours, pre-training": pre.gpu_hours / 1e3,
        "days, pre-training": pre.days,
        "K GPU-hours in all": full.gpu_hours / 1e3,
        "million dollars": full.dollars / 1e6,
        "tokens/s per GPU": tokens_per_second_per_gpu(),
        "MFU % of the bf16 peak, 989 TFLOP/s": 100 * implied_mfu(cfg),
        "MFU % of the FP8 peak, 1979 TFLOP/s": 100 * implied_mfu(cfg, peak="fp8"),
    }
    return ["", "The report's run (hours and price: report; the rest derived here)", *_rows(rows)]


def _rows(parts: dict[str, int] | dict[str, float]) -> list[str]:
    return [
        f"  {name:<44}{value:>20,}" if isinstance(value, int) else f"  {name:<44}{value:>20,.3f}"
        for name, value in parts.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `python -m dsv3_book.costs`; wrong input ends it with status 2 and a line that names the remedy."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_book.costs", description="What a model costs.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default="v3-671b", help=f"one of {', '.join(PRESETS)} (default: v3-671b)")
    which.add_argument("--config", help="a released config.json, or the folder that holds one")
    parser.add_argument("--context", type=int, help="tokens per sequence and in the cache (default: from the model)")
    args = parser.parse_args(argv)
    if args.context is not None and args.context < 1:
        parser.error(f"--context must be at least 1, got {args.context}")
    try:
        cfg = ModelConfig.from_hf(args.config) if args.config else ModelConfig.preset(args.preset)
    except FileNotFoundError:
        parser.error(f"--config {args.config}: no such file; give a config.json or the folder that holds one")
    except ValueError as error:
        parser.error(str(error))
    print(table(cfg, args.config or args.preset, args.context))
