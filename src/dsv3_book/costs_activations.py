"""What a micro-batch leaves behind for its backward, in bytes, tensor by tensor: config only, no torch.

A chunk's activations live from its forward to its input gradient (I, or a whole B). What is counted here is what *our*
code holds on a GPU in that time: what autograd saves, what `ops.recomputed` computes again from, and the tables of an
all-to-all. `tests/test_costs_activations.py` holds it against every byte that is really alive after a forward, at small
sizes. Two of the rows are not in the report's account (§3.2.3, §3.3.3): `AVOIDABLE`.

Loads are taken as balanced: as many token-slots arrive at a rank's experts as leave it, `tokens` · K.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .config import ModelConfig
from .costs import BYTES, SCALE_TILE, attention_params, embedding_params, expert_params

ATTENTION_OUTPUT = "attention's output"
HEAD_GRADIENT = "head's weight gradient"
# Held by our code though the report's account has nothing like it, and why.
AVOIDABLE = {
    ATTENTION_OUTPUT: "torch's attention saves its output in bf16 beside the E5M6 codes that o_proj keeps",
    HEAD_GRADIENT: "the head's weight gradient is made in the forward, and kept for each micro-batch until backward",
}


@dataclass(frozen=True)
class Numbers:
    """In what a run computes and keeps."""

    dtype: str = "bf16"  # of activations
    fp8: bool = True  # products, and what they keep, in FP8 (report §3.3)
    recompute: bool = True  # RMSNorm and MLA's up-projections again in backward (report §3.2.3)
    weights: str = "fp32"  # at rest; where that isn't the activations' dtype, products keep a copy of them

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return BYTES[self.dtype]

    @property
    def casts(self) -> bool:
        """Whether a weight is copied for use."""
        return self.weights != self.dtype

    def kept(self, width: int) -> int:
        """Bytes of a product's input, a row of this width: itself, or its codes with their scales."""
        return codes(width) if self.fp8 else width * self.size

    @property
    def avoidable(self) -> list[str]:
        """Which of AVOIDABLE could be done without: without FP8 attention's output is a product's input."""
        return [name for name in AVOIDABLE if self.fp8 or name != ATTENTION_OUTPUT]


def codes(width: int) -> int:
    """Bytes of a row in FP8, with an fp32 scale for every 128 numbers."""
    return width + 4 * -(-width // SCALE_TILE)


def kept_by_layer(
    cfg: ModelConfig, index: int, tokens: int, numbers: Numbers | None = None, hops: int = 0, experts: int | None = None
) -> Counter[str]:
    """Bytes kept of layer `index` for a micro-batch of `tokens` tokens, by what they are.

    hops: of the all-to-all: 0 local, 1 direct, 2 across nodes. Only its tables of int32 and int64 depend on it; those
    of 1 and 2 are rounded (they are under 1 %).  experts: held by this rank (None: all).
    """
    n = numbers or Numbers()
    d, size, T = cfg.hidden_size, n.size, tokens
    found: Counter[str] = Counter({"residual stream": 2 * T * d * size})
    found += _attention(cfg, T, n)
    found["norms"] += 4 * T + d * size * n.casts
    if not cfg.is_moe_layer(index):
        found += _swiglu("dense FFN", d, cfg.intermediate_size, T, n)
        found["normalised inputs"] += (not n.recompute) * T * n.kept(d)
        return +found
    E, K, F = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.moe_intermediate_size
    S = T * K
    held = E if experts is None else experts
    if cfg.n_shared_experts:
        found += _swiglu("shared experts", d, cfg.n_shared_experts * F, T, n)
    if not n.recompute:  # what the router keeps, and in FP8 the shared experts' codes beside it
        found["normalised inputs"] += T * (d * size + n.kept(d) * n.fp8 * bool(cfg.n_shared_experts))
    # scores; chosen, their scores, the sum; the balance loss's sum and frequencies, and the load
    found["router"] += T * (4 * E + 8 * K + 4 * cfg.norm_topk_prob * (K + 1) + 4) + 8 * E + 4
    found["routing tables"] += (24, 61, 97)[hops] * S + (4 if n.fp8 else size) * S + 8 * held  # and the rows' gates
    if n.fp8:
        found["routed experts"] += S * (codes(d) + 2 * codes(F))
    else:  # rows as they arrived; gate and up, their SwiGLU, and that times the router's gate
        found["routed experts"] += S * (d + 4 * F) * size
        found["copies of weights"] += n.casts * held * expert_params(cfg) * size
    return +found


def _attention(cfg: ModelConfig, T: int, n: Numbers) -> Counter[str]:
    """Norm, projections and the core of MLA."""
    d, size, H = cfg.hidden_size, n.size, cfg.num_attention_heads
    Q, C = cfg.q_lora_rank, cfg.kv_lora_rank
    widths = [d, C] if Q is None else [d, Q, C]  # of the norms, whose outputs are products' inputs
    found: Counter[str] = Counter()
    found["norms"] = sum(4 * T + width * size * n.casts for width in widths)
    found["latents"] = T * ((Q or 0) + C + cfg.qk_rope_head_dim) * size
    if n.recompute:
        # Without query compression the up-projection is computed again from the normalised input, so that is kept.
        found["normalised inputs"] = T * d * size * (Q is None)
    else:
        # In FP8 each of the two products that read the layer's normalised input keeps codes of its own.
        found["normalised inputs"] = T * ((1 + n.fp8) * n.kept(d) + sum(n.kept(width) for width in widths[1:]))
        found["q, k, v"] = T * H * (2 * cfg.qk_head_dim + cfg.v_head_dim) * size
    found[ATTENTION_OUTPUT] = T * H * (cfg.v_head_dim * size + 4)  # and the fp32 sum of each row's exponentials
    if n.fp8:
        width = H * cfg.v_head_dim
        found["o_proj's input in E5M6"] = T * (-(-width // 2) * 3 + 4 * -(-width // SCALE_TILE))
    elif n.casts:
        found["copies of weights"] = size * sum(p for k, p in attention_params(cfg).items() if not k.endswith("norm"))
    return found


def _swiglu(name: str, d: int, width: int, T: int, n: Numbers) -> Counter[str]:
    """gate and up; without FP8 also their SwiGLU, which the down-projection reads."""
    if n.fp8:
        return Counter({name: 2 * T * codes(width)})
    copies = 3 * d * width * n.size * n.casts
    return Counter({name: 3 * T * width * n.size, "copies of weights": copies})


def kept_by_ends(
    cfg: ModelConfig, tokens: int, numbers: Numbers | None = None, embedding: bool = False, head: bool = False
) -> Counter[str]:
    """Bytes kept of what a stage has besides layers; `tokens` as above. The MTP modules' blocks are layers.

    embedding: the look-up (its output is the first layer's residual stream).  head: final norm, loss, and for each MTP
    depth the merge of hidden state and embedding, its norm and loss.
    """
    n = numbers or Numbers()
    d, size, T, J = cfg.hidden_size, n.size, tokens, cfg.num_nextn_predict_layers
    found = Counter({"RoPE's angles": T * cfg.qk_rope_head_dim * 4})
    if embedding or head:
        found["token numbers"] = 8 * (T + 1 + J)
    if not head:
        return found
    losses, norm = 1 + J, 4 * T + d * size * n.casts
    found["norms"] = (losses + 2 * J) * norm
    # Of a loss: the norm's input and the gradient of its output. Of a merge: hidden state, embedding.
    found["residual stream"] = (2 * losses + 2 * J) * T * d * size + 4 * losses
    found[HEAD_GRADIENT] = losses * embedding_params(cfg) * BYTES[n.weights]
    found["normalised inputs"] = (not n.recompute) * J * T * 2 * d * size
    found["copies of weights"] = n.casts * J * 2 * d * d * size  # eh_proj, never in FP8
    return +found


def owed_by_layer(cfg: ModelConfig, index: int, tokens: int, numbers: Numbers | None = None) -> float:
    """Bytes kept from an input gradient I to its weight gradient W, of one layer: every product's input and the
    gradient of its output. Rounded: what two products share is counted once, scales of 128×1 tiles as of 1×128."""
    n = numbers or Numbers()
    d, T, H, Q, C = cfg.hidden_size, tokens, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    heads_in, heads_out = H * cfg.qk_head_dim, H * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    o = H * cfg.v_head_dim
    after = 1.5 * o + 4 * -(-o // SCALE_TILE) if n.fp8 else n.kept(o)
    latents = [Q, C] if Q else [C]
    inputs = (1 + n.fp8) * n.kept(d) + sum(map(n.kept, latents)) + after
    outputs = sum(map(n.kept, [Q or 0, C + cfg.qk_rope_head_dim, heads_in, heads_out, d]))

    def swiglu(width: int) -> float:
        return 2 * n.kept(d) + 3 * n.kept(width)  # input, gradient of the output; SwiGLU, and gradients of its inputs

    inputs += 3 * d * n.size * (index >= cfg.num_hidden_layers)  # of an MTP module's eh_proj, never in FP8
    if not cfg.is_moe_layer(index):
        return T * (inputs + outputs + swiglu(cfg.intermediate_size))
    F, K, shared = cfg.moe_intermediate_size, cfg.num_experts_per_tok, cfg.n_shared_experts
    return T * (inputs + outputs + (swiglu(shared * F) if shared else 0) + K * swiglu(F))
