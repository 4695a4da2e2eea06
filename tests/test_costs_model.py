"""costs against the model itself: the two count in different ways, by formula and by walking real tensors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_book import costs
from dsv3_book.config import PRESETS, ModelConfig
from dsv3_book.model import Transformer, mla, ops
from dsv3_book.model.attention import BLOCK, plain_attention
from dsv3_book.model.experts import Experts
from dsv3_book.model.flops import Executed, executed_flops
from dsv3_book.model.grouped import grouped_linear

# Part of `main_params` -> what the names of its parameters contain; the first that fits decides.
MARKS = {
    "embedding": "embed_tokens",
    "head": "lm_head",
    "attention": "self_attn",
    "router": "mlp.gate.",
    "routed_experts": "mlp.experts",
    "shared_experts": "shared_experts",
    "dense_ffn": "mlp.",
    "norms": "layernorm",
    "final_norm": "norm.",
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_built_model_has_the_weights_that_costs_predicts(name):
    cfg = ModelConfig.preset(name)
    model = Transformer(cfg, device="meta")
    parts: dict[str, int] = {}
    for weight, p in model.named_parameters():
        is_mtp = weight.startswith("layers.") and int(weight.split(".")[1]) >= cfg.num_hidden_layers
        part = "mtp" if is_mtp else next(part for part, mark in MARKS.items() if mark in weight)
        parts[part] = parts.get(part, 0) + p.numel()
    predicted = costs.count(cfg)
    assert parts.pop("mtp", 0) == predicted.mtp
    assert parts == costs.main_params(cfg)
    assert sum(b.numel() for b in model.buffers()) == predicted.main_biases + predicted.mtp_biases


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2, "num_nextn_predict_layers": 2}])
def test_training_flops_are_what_the_flop_counter_sees(changes, monkeypatch):
    """On the slow twins: the fast paths skip masked scores or compute them again, and use in-place products that
    torch's counter does not know."""

    def experts(self, arrived):
        x, gates, counts = arrived
        gate, up = (grouped_linear(x, w, counts) for w in (self.gate_proj, self.up_proj))
        return grouped_linear(ops.swiglu(gate, up) * gates[:, None], self.down_proj, counts)

    monkeypatch.setattr(mla, "causal_attention", plain_attention)
    monkeypatch.setattr(Experts, "forward", experts)
    monkeypatch.setattr(ops, "_add_mm", lambda total, a, b: total.add_(a @ b))
    cfg, T = ModelConfig.preset("tiny").replace(**changes), 16
    model = Transformer(cfg)
    tokens = torch.randint(cfg.vocab_size, (2, T + 1 + cfg.num_nextn_predict_layers))
    with FlopCounterMode(display=False) as counter:
        sum(model.losses(tokens)[:3]).backward()
    assert counter.get_total_flops() == 2 * T * costs.training_flops(cfg, T, causal=False)


def test_counting_every_expert_as_activated_gives_an_impossible_utilisation():
    v3 = ModelConfig.preset("v3-671b")
    all_experts = 6 * costs.count(v3).main * costs.tokens_per_second_per_gpu() / costs.PEAK_FLOPS["bf16"]
    assert all_experts > 6 > 1 > costs.implied_mfu(v3)


def _training_step(cfg: ModelConfig, T: int, seed: int = 0) -> Executed:
    """FLOPs executed by one step on two sequences of T tokens."""
    model = Transformer(cfg, seed)
    tokens = torch.randint(cfg.vocab_size, (2, T + 1 + cfg.num_nextn_predict_layers))
    return executed_flops(lambda: sum(model.losses(tokens)[:3]).backward())


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 2}])
def test_the_fast_paths_execute_just_the_products_with_weights_that_training_needs(changes):
    cfg, T = ModelConfig.preset("tiny").replace(**changes), 16
    needed = 3 * sum(costs.forward_flops(cfg, 0.0).values())
    assert _training_step(cfg, T).weights == 2 * T * needed


def test_attention_in_blocks_executes_what_chapter_1_says():
    """Blocks of queries, each against all keys up to its end: if this changes, chapter 1's explanation must too."""
    cfg, T = ModelConfig.preset("tiny"), 2 * BLOCK
    with_scores, without = (3 * sum(costs.forward_flops(cfg, keys).values()) for keys in ((T + BLOCK) / 2, 0.0))
    assert _training_step(cfg, T).attention == 2 * T * (with_scores - without)


def test_large_products_are_counted_whatever_library_computes_them():
    x, w = torch.randn(512, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    assert executed_flops(lambda: ops.linear(x, w).sum().backward()) == Executed(3 * 2 * 512 * 256 * 64, 0)
    assert executed_flops(lambda: None) == Executed(0, 0)
