"""What a model costs, from its configuration alone: parameters, FLOPs, bytes, cluster hours and dollars.

Needs no torch, so it answers at once:  python -m dsv3_book.costs --preset v3-671b

Everything is built from small pieces — parameters and FLOPs *of one part of one layer* — so that a pipeline's cost
model can group them into stages of its own. Three sources of numbers meet here and are kept apart: counts that follow
from the configuration (*derived here*), inputs taken from the DeepSeek-V3 report (the constants named `REPORT_…`), and
hardware peaks (`PEAK_FLOPS`).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig

# Inputs from the report, arXiv 2412.19437 (its abstract, §1 "economical training costs" and table 1).
REPORT_HOURS_PER_TRILLION = 180_000.0  # H800 GPU-hours to train on one trillion tokens
REPORT_PRETRAIN_TOKENS = 14.8e12
REPORT_CONTEXT_EXTENSION_HOURS = 119_000.0
REPORT_POST_TRAINING_HOURS = 5_000.0
REPORT_GPUS = 2048
REPORT_DOLLARS_PER_HOUR = 2.0  # the report's assumed rent of one H800
REPORT_SEQUENCE_LENGTH = 4096
# Dense tensor-core peaks of an H800, FLOP/s: NVIDIA's figures for the same Hopper chip as H100 SXM, without sparsity.
PEAK_FLOPS = {"bf16": 989e12, "fp8": 1979e12}

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
SCALE_TILE = 128  # channels that share one fp32 scale when an activation travels as FP8 (report §3.3)


# Parameters ----------------------------------------------------------------------------------------------------------
def attention_params(cfg: ModelConfig) -> dict[str, int]:
    """Weights of one MLA block by released name (without `.weight`), its two latent norms included."""
    d, h = cfg.hidden_size, cfg.num_attention_heads
    if cfg.q_lora_rank is None:
        query = {"q_proj": d * h * cfg.qk_head_dim}
    else:
        q = cfg.q_lora_rank
        query = {"q_a_proj": d * q, "q_a_layernorm": q, "q_b_proj": q * h * cfg.qk_head_dim}
    return query | {
        "kv_a_proj_with_mqa": d * (cfg.kv_lora_rank + cfg.qk_rope_head_dim),
        "kv_a_layernorm": cfg.kv_lora_rank,
        "kv_b_proj": cfg.kv_lora_rank * h * (cfg.qk_nope_head_dim + cfg.v_head_dim),
        "o_proj": h * cfg.v_head_dim * d,
    }


def expert_params(cfg: ModelConfig) -> int:
    """Weights of one routed expert: gate, up and down projection."""
    return 3 * cfg.hidden_size * cfg.moe_intermediate_size


def layer_params(cfg: ModelConfig, index: int) -> dict[str, int]:
    """Weights of layer `index` by part: attention, norms, and dense_ffn or router, routed_experts, shared_experts.

    The MTP modules' blocks are the indices from `num_hidden_layers` on; their own extra pieces are in `mtp_params`.
    Routing biases are buffers, not weights: see `routing_biases`.
    """
    parts = {"attention": sum(attention_params(cfg).values()), "norms": 2 * cfg.hidden_size}
    if not cfg.is_moe_layer(index):
        return parts | {"dense_ffn": 3 * cfg.hidden_size * cfg.intermediate_size}
    return parts | {
        "router": cfg.n_routed_experts * cfg.hidden_size,
        "routed_experts": cfg.n_routed_experts * expert_params(cfg),
        "shared_experts": cfg.n_shared_experts * expert_params(cfg),
    }


def mtp_params(cfg: ModelConfig, depth: int = 1) -> dict[str, int]:
    """Weights of the MTP module of one depth (1 … J) by piece, without the embedding and head it shares."""
    d = cfg.hidden_size
    pieces = {"enorm": d, "hnorm": d, "eh_proj": 2 * d * d, "shared_head.norm": d}
    return pieces | layer_params(cfg, cfg.num_hidden_layers + depth - 1)


def embedding_params(cfg: ModelConfig) -> int:
    """Weights of the embedding table; the output head has as many, in a matrix of its own."""
    return cfg.vocab_size * cfg.hidden_size


def main_params(cfg: ModelConfig) -> dict[str, int]:
    """Weights of the main model by part, summed over its layers."""
    parts = {"embedding": embedding_params(cfg), "head": embedding_params(cfg), "final_norm": cfg.hidden_size}
    for index in range(cfg.num_hidden_layers):
        for name, count in layer_params(cfg, index).items():
            parts[name] = parts.get(name, 0) + count
    return parts


@dataclass(frozen=True)
class Counts:
    """Numbers of weights (and of routing biases, which are buffers and never part of a sum of weights)."""

    main: int  # the main model
    main_biases: int
    active: int  # used by one token in the main model, its embedding look-up not counted
    active_with_embedding: int  # the same with the whole embedding table
    mtp: int  # all MTP modules, their own weights
    mtp_biases: int
    mtp_on_disk: int  # with the copies of embedding and head that each depth carries in a released checkpoint
    on_disk: int  # main model and MTP as released


def inactive_params(cfg: ModelConfig, index: int) -> int:
    """Weights of layer `index` that one token does not touch: the experts it was not sent to."""
    return (cfg.n_routed_experts - cfg.num_experts_per_tok) * expert_params(cfg) if cfg.is_moe_layer(index) else 0


def routing_biases(cfg: ModelConfig, index: int) -> int:
    """Entries of `e_score_correction_bias` in layer `index` (0 for a dense layer)."""
    return cfg.n_routed_experts if cfg.is_moe_layer(index) else 0


def count(cfg: ModelConfig) -> Counts:
    """All totals of a configuration; for "v3-671b" they are the released model's, to the last weight (claim C1)."""
    layers = range(cfg.num_hidden_layers)
    depths = range(1, cfg.num_nextn_predict_layers + 1)
    main = sum(main_params(cfg).values())
    active = main - sum(inactive_params(cfg, i) for i in layers)
    mtp = sum(sum(mtp_params(cfg, j).values()) for j in depths)
    mtp_on_disk = mtp + len(depths) * 2 * embedding_params(cfg)
    return Counts(
        main=main,
        main_biases=sum(routing_biases(cfg, i) for i in layers),
        active=active - embedding_params(cfg),
        active_with_embedding=active,
        mtp=mtp,
        mtp_biases=sum(routing_biases(cfg, cfg.num_hidden_layers + j - 1) for j in depths),
        mtp_on_disk=mtp_on_disk,
        on_disk=main + mtp_on_disk,
    )


# FLOPs (a multiply and an add are two) -------------------------------------------------------------------------------
def causal_context(tokens: int) -> float:
    """Keys a query sees on average in a causal sequence of `tokens`: (T+1)/2."""
    return (tokens + 1) / 2


def layer_flops(cfg: ModelConfig, index: int, context: float) -> dict[str, float]:
    """Forward FLOPs per token of layer `index` by part, with `context` keys to look at.

    Parts: attention_proj (the MLA matrices), attention_core (scores and weighted values), and dense_ffn or router,
    routed_experts, shared_experts. Norms, RoPE, SiLU and softmax are left out, as is usual: under 1 % of the work.
    """
    matrices = sum(n for name, n in attention_params(cfg).items() if not name.endswith("norm"))
    flops = {
        "attention_proj": 2.0 * matrices,
        "attention_core": 2.0 * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim) * context,
    }
    if not cfg.is_moe_layer(index):
        return flops | {"dense_ffn": 6.0 * cfg.hidden_size * cfg.intermediate_size}
    return flops | {
        "router": 2.0 * cfg.n_routed_experts * cfg.hidden_size,
        "routed_experts": 2.0 * cfg.num_experts_per_tok * expert_params(cfg),
        "shared_experts": 2.0 * cfg.n_shared_experts * expert_params(cfg),
    }


def head_flops(cfg: ModelConfig) -> float:
    """Forward FLOPs per token of the output head. (The embedding is a look-up and costs none.)"""
    return 2.0 * embedding_params(cfg)


def mtp_flops(cfg: ModelConfig, depth: int, context: float) -> dict[str, float]:
    """Forward FLOPs per token of one MTP depth: eh_proj, its block by part, and the shared head run once more."""
    block = layer_flops(cfg, cfg.num_hidden_layers + depth - 1, context)
    return {"eh_proj": 4.0 * cfg.hidden_size**2} | block | {"head": head_flops(cfg)}


def forward_flops(cfg: ModelConfig, context: float, mtp: bool = True) -> dict[str, float]:
    """Forward FLOPs per token of the whole model by part; all MTP depths together under "mtp"."""
    parts: dict[str, float] = {}
    for index in range(cfg.num_hidden_layers):
        for name, flops in layer_flops(cfg, index, context).items():
            parts[name] = parts.get(name, 0.0) + flops
    parts["head"] = head_flops(cfg)
    if mtp and cfg.num_nextn_predict_layers:
        depths = range(1, cfg.num_nextn_predict_layers + 1)
        parts["mtp"] = sum(sum(mtp_flops(cfg, j, context).values()) for j in depths)
    return parts


def training_flops(
    cfg: ModelConfig, tokens: int = REPORT_SEQUENCE_LENGTH, mtp: bool = True, causal: bool = True
) -> float:
    """FLOPs to train on one token in sequences of `tokens`: forward, and twice that backward (the gradients of each
    product's two inputs). Recomputed activations are not counted: they are a way of saving memory, not progress.
    `causal=False` counts the whole square of scores, the half above the diagonal too."""
    context = causal_context(tokens) if causal else tokens
    return 3.0 * sum(forward_flops(cfg, context, mtp).values())


def rule_of_thumb_flops(cfg: ModelConfig) -> float:
    """The field's 6·N per token with N the activated weights (no embedding): no attention scores, no MTP."""
    return 6.0 * count(cfg).active


# Bytes ---------------------------------------------------------------------------------------------------------------
def kv_numbers(cfg: ModelConfig) -> int:
    """Numbers cached per token and layer by MLA: the latent and the shared RoPE key (576 for V3, claim C2)."""
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def mha_kv_numbers(cfg: ModelConfig) -> int:
    """What plain multi-head attention of the same head sizes would cache: a content key and a value for every head."""
    return cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)


def kv_cache_bytes(cfg: ModelConfig, tokens: int, dtype: str = "bf16", mha: bool = False) -> int:
    """Bytes of the main model's KV cache for one sequence of `tokens`."""
    per_token = mha_kv_numbers(cfg) if mha else kv_numbers(cfg)
    return tokens * cfg.num_hidden_layers * per_token * BYTES[dtype]


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that training keeps per copy of the model: what the GEMMs read, and the optimiser's states."""

    weights: int  # bf16, read by the GEMMs
    master: int  # fp32
    gradients: int  # fp32 (report §3.3)
    moments: int  # two, bf16 (report §3.3)

    @property
    def total(self) -> int:
        return self.weights + self.master + self.gradients + self.moments


def training_bytes(params: int) -> TrainingBytes:
    """Training state of `params` weights, before ZeRO-1 spreads master weights and moments over ranks."""
    return TrainingBytes(
        params * BYTES["bf16"], params * BYTES["fp32"], params * BYTES["fp32"], 2 * params * BYTES["bf16"]
    )


def dispatch_bytes(cfg: ModelConfig, copies: float, dtype: str = "fp8") -> float:
    """Bytes a token sends into the experts of one layer: one vector for each of `copies` destinations, FP8 with its
    fp32 scales. `copies` is `topk_group` nodes at most over InfiniBand, `num_experts_per_tok` experts in all."""
    scales = 4 * -(-cfg.hidden_size // SCALE_TILE) if dtype == "fp8" else 0
    return copies * (cfg.hidden_size * BYTES[dtype] + scales)


def combine_bytes(cfg: ModelConfig, copies: float, dtype: str = "bf16") -> float:
    """Bytes that come back to a token from one layer's experts (both combines stay bf16, report §3.3)."""
    return copies * cfg.hidden_size * BYTES[dtype]


# A cluster -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bill:
    """GPU-hours of a run, and what they mean on a cluster."""

    gpu_hours: float
    gpus: int = REPORT_GPUS
    dollars_per_hour: float = REPORT_DOLLARS_PER_HOUR

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.dollars_per_hour


def pretraining_bill(
    tokens: float = REPORT_PRETRAIN_TOKENS, hours_per_trillion: float = REPORT_HOURS_PER_TRILLION
) -> Bill:
    """Hours, days and dollars of pre-training on `tokens` (claim C4: 3.7 days a trillion, all in under 2 months)."""
    return Bill(tokens / 1e12 * hours_per_trillion)


def full_bill() -> Bill:
    """The report's whole bill: pre-training, context extension and post-training (claim C3)."""
    return Bill(pretraining_bill().gpu_hours + REPORT_CONTEXT_EXTENSION_HOURS + REPORT_POST_TRAINING_HOURS)


def tokens_per_second_per_gpu(hours_per_trillion: float = REPORT_HOURS_PER_TRILLION) -> float:
    """Training speed that `hours_per_trillion` GPU-hours imply."""
    return 1e12 / (hours_per_trillion * 3600)


def implied_mfu(
    cfg: ModelConfig,
    hours_per_trillion: float = REPORT_HOURS_PER_TRILLION,
    tokens: int = REPORT_SEQUENCE_LENGTH,
    peak: str = "bf16",
) -> float:
    """Model-FLOPs utilisation behind that speed, as a fraction of `PEAK_FLOPS[peak]`: *derived here* from our FLOP
    count (MTP included) — the report states no MFU."""
    if peak not in PEAK_FLOPS:
        raise ValueError(f"no peak known for {peak!r}: choose one of {', '.join(PEAK_FLOPS)}")
    return training_flops(cfg, tokens) * tokens_per_second_per_gpu(hours_per_trillion) / PEAK_FLOPS[peak]


if __name__ == "__main__":
    from .costs_table import main

    main()
