"""A small shape with everything in it, and weights that are wide awake."""

import torch

from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.model import Transformer

# YaRN whose original context (4) every test sequence leaves, groups, query compression, two shared experts, odd sizes.
SMALL = ModelConfig(
    vocab_size=23,
    hidden_size=15,
    intermediate_size=21,
    moe_intermediate_size=7,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=3,
    n_shared_experts=2,
    n_routed_experts=8,
    kv_lora_rank=10,
    q_lora_rank=11,
    qk_rope_head_dim=6,
    v_head_dim=5,
    qk_nope_head_dim=4,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    max_position_embeddings=64,
    rope_theta=100.0,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=4, beta_fast=2.0, beta_slow=0.5),
)


@torch.no_grad()
def awake(model: Transformer, seed: int = 0, shift: float = 0.0) -> Transformer:
    """Gives `model` weights that keep activations near one, gains around one, and biases that decide choices."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.2 * noise if p.dim() == 1 else noise * p.shape[-1] ** -0.5)
    for _, router in model.routers():
        bias = router.e_score_correction_bias
        bias.copy_(0.3 * torch.randn(bias.shape, generator=generator) + shift)
    return model


def tokens_for(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random rows of `length` inputs, their next token and one more per MTP depth."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, cfg.vocab_size, (rows, length + 1 + cfg.num_nextn_predict_layers), generator=generator)
