"""DeepSeek-V3 once more, as slowly and plainly as the report's formulas read: the tests' yardstick for the model.

Written from the report (§2.1.1, §2.1.2, §2.2) and the released gate, one sequence at a time, with heads, tokens and
experts in Python loops and no code shared with the package. Weights come in by name; gradients flow back to them.
"""

import math

import torch

from dsv3_book.config import ModelConfig

Weights = dict[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """A model's parameters and biases in double precision, leaves of a graph of their own."""
    found = {n: t.detach().double().clone() for n, t in model.state_dict().items()}
    return {n: t.requires_grad_(not n.endswith("bias")) for n, t in found.items()}


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def frequency(cfg: ModelConfig, pair: int) -> float:
    """Radians per position of one RoPE pair, with YaRN's ramp between kept and stretched."""
    width, theta = cfg.qk_rope_head_dim, cfg.rope_theta
    base = theta ** (-2 * pair / width)
    s = cfg.rope_scaling
    if s is None:
        return base

    def place(rotations):  # the pair (a real number) that turns so often within the original context
        return width * math.log(s.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(place(s.beta_fast)), 0), min(math.ceil(place(s.beta_slow)), width - 1)
    stretched = min(max((pair - low) / (high - low if high != low else 0.001), 0.0), 1.0)
    return base * (1 - stretched) + base / s.factor * stretched


def rope(cfg: ModelConfig, x, position: int):
    """Turns the pairs (0, 1), (2, 3) … of one vector."""
    s, size, out = cfg.rope_scaling, 1.0, []
    if s is not None:
        size = (0.1 * s.mscale * math.log(s.factor) + 1) / (0.1 * s.mscale_all_dim * math.log(s.factor) + 1)
    for pair in range(cfg.qk_rope_head_dim // 2):
        a, b, angle = x[2 * pair], x[2 * pair + 1], position * frequency(cfg, pair)
        c, d = size * math.cos(angle), size * math.sin(angle)
        out += [a * c - b * d, a * d + b * c]
    return torch.stack(out)


def attention(cfg: ModelConfig, w: Weights, at: str, h):
    """u_t for every token t of one sequence h [T, D]."""
    H, Dh, R, Dv, C = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
        cfg.kv_lora_rank,
    )
    if cfg.q_lora_rank is None:
        q = h @ w[at + "q_proj.weight"].T
    else:
        q = rms(h @ w[at + "q_a_proj.weight"].T, w[at + "q_a_layernorm.weight"], 1e-6) @ w[at + "q_b_proj.weight"].T
    down = h @ w[at + "kv_a_proj_with_mqa.weight"].T
    up = rms(down[:, :C], w[at + "kv_a_layernorm.weight"], 1e-6) @ w[at + "kv_b_proj.weight"].T
    scale = 1 / math.sqrt(Dh + R)
    if cfg.rope_scaling is not None and cfg.rope_scaling.mscale_all_dim:
        scale *= (0.1 * cfg.rope_scaling.mscale_all_dim * math.log(cfg.rope_scaling.factor) + 1) ** 2
    shared_keys = [rope(cfg, down[t, C:], t) for t in range(len(h))]
    rows = []
    for t in range(len(h)):
        heads = []
        for i in range(H):
            mine = q[t].view(H, Dh + R)[i]
            query = torch.cat([mine[:Dh], rope(cfg, mine[Dh:], t)])
            kv = up[: t + 1].view(t + 1, H, Dh + Dv)[:, i]
            keys = torch.stack([torch.cat([kv[j, :Dh], shared_keys[j]]) for j in range(t + 1)])
            heads.append(torch.softmax(keys @ query * scale, 0) @ kv[:, Dh:])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w[at + "o_proj.weight"].T


def ffn(x, gate, up, down):
    a = x @ gate.T
    return (a * torch.sigmoid(a) * (x @ up.T)) @ down.T


def choose(cfg: ModelConfig, scores: list[float], bias: list[float]) -> list[int]:
    """The released gate, for one token: its groups by their two best biased scores, then its experts within them."""
    size = cfg.n_routed_experts // cfg.n_group
    biased = [s + b for s, b in zip(scores, bias)]
    groups = range(cfg.n_group)
    if cfg.n_group > 1:
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in groups]
        groups = sorted(groups, key=lambda g: -worth[g])[: cfg.topk_group]
    allowed = [g * size + i for g in groups for i in range(size)]
    return sorted(sorted(allowed, key=lambda e: -biased[e])[: cfg.num_experts_per_tok])


def moe(cfg: ModelConfig, w: Weights, at: str, h):
    """Experts' output for one sequence, the scores [T, E] and what every token chose."""
    bias = w[at + "gate.e_score_correction_bias"].tolist()
    scores = torch.sigmoid(h @ w[at + "gate.weight"].T)
    rows, chosen = [], []
    for t, token in enumerate(h):
        experts = choose(cfg, scores[t].tolist(), bias)
        gates = scores[t][experts]
        if cfg.norm_topk_prob:
            gates = gates / gates.sum()
        total = torch.zeros_like(token)
        for e, gate in zip(experts, gates * cfg.routed_scaling_factor):
            total = total + gate * ffn(token, *(w[f"{at}experts.{m}_proj"][e] for m in ("gate", "up", "down")))
        if cfg.n_shared_experts:
            total = total + ffn(token, *(w[f"{at}shared_experts.{m}_proj.weight"] for m in ("gate", "up", "down")))
        rows.append(total)
        chosen.append(experts)
    return torch.stack(rows), scores, chosen


def block(cfg: ModelConfig, w: Weights, layer: int, x, routed: list):
    at = f"layers.{layer}."
    x = x + attention(cfg, w, at + "self_attn.", rms(x, w[at + "input_layernorm.weight"], cfg.rms_norm_eps))
    h = rms(x, w[at + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
    if not cfg.is_moe_layer(layer):
        return x + ffn(h, *(w[f"{at}mlp.{m}_proj.weight"] for m in ("gate", "up", "down")))
    y, scores, chosen = moe(cfg, w, at + "mlp.", h)
    routed.append((scores, chosen))
    return x + y


def balance(cfg: ModelConfig, scores) -> torch.Tensor:
    """α Σ f_i P_i of one sequence, with f counted from the scores alone (report eqs. 17–20)."""
    T, E = scores.shape
    K = cfg.num_experts_per_tok
    total = 0.0
    for i in range(E):
        chosen = sum(i in sorted(range(E), key=lambda e: -float(scores[t, e].detach()))[:K] for t in range(T))
        total = total + E / (K * T) * chosen * (scores[:, i] / scores.sum(1)).mean()
    return cfg.aux_loss_alpha * total


def cross_entropy(logits, targets):
    return (torch.logsumexp(logits, -1) - logits[torch.arange(len(targets)), targets]).mean()


def run(cfg: ModelConfig, w: Weights, tokens: torch.Tensor):
    """(logits [B, T, V], main, mtp, balance, load) for tokens [B, T + 1 + J]: report eqs. 21–25, and `losses()`' sums.

    Depth k at place i reads the embedding of token i + k and foretells token i + k + 1. As in the checkpoint, eh_proj
    takes [embedding; hidden], and the hidden state has passed the norm in front of the head.
    """
    J, L = cfg.num_nextn_predict_layers, cfg.num_hidden_layers
    T = tokens.shape[1] - 1 - J
    logits, main, mtp, aux, loads = [], [], [], [], []
    for row in tokens:
        emb, routed = w["embed_tokens.weight"][row], []
        x = emb[:T]
        for layer in range(L):
            x = block(cfg, w, layer, x, routed)
        hidden = rms(x, w["norm.weight"], cfg.rms_norm_eps)
        logits.append(hidden @ w["lm_head.weight"].T)
        main.append(cross_entropy(logits[-1], row[1 : T + 1]))
        for k in range(1, J + 1):
            at = f"layers.{L + k - 1}."
            both = [
                rms(emb[k : T + k], w[at + "enorm.weight"], cfg.rms_norm_eps),
                rms(hidden, w[at + "hnorm.weight"], cfg.rms_norm_eps),
            ]
            x = block(cfg, w, L + k - 1, torch.cat(both, -1) @ w[at + "eh_proj.weight"].T, routed)
            hidden = rms(x, w[at + "shared_head.norm.weight"], cfg.rms_norm_eps)
            mtp.append(cross_entropy(hidden @ w["lm_head.weight"].T, row[k + 1 : T + k + 1]))
        aux.append(sum(balance(cfg, scores) for scores, _ in routed))
        loads.append([[sum(e in c for c in chosen) for e in range(cfg.n_routed_experts)] for _, chosen in routed])
    mean = lambda values: sum(values) / max(len(values), 1)
    load = torch.tensor(loads).sum(0).float()
    return torch.stack(logits), mean(main), mean(mtp), mean(aux), load
