"""The assembled model: start values, causality, stages, recomputation, dtypes, and its losses against its logits."""

import pytest
import torch
import torch.nn.functional as F
from modelkit import SMALL, awake, tokens_for

from dsv3_book.config import ModelConfig
from dsv3_book.model import Part, Transformer

CFG = SMALL.replace(num_hidden_layers=4)


def total(losses):
    return losses.main + 0.3 * losses.mtp + losses.balance


def test_start_values_have_the_configs_std_and_depend_on_the_seed_alone():
    cfg = ModelConfig.preset("tiny").replace(initializer_range=0.006)
    model, again, other = Transformer(cfg, seed=1), Transformer(cfg, seed=1), Transformer(cfg, seed=2)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        assert not torch.equal(p, r), name
        n = p.numel()
        assert float(p.detach().std()) == pytest.approx(0.006, rel=5 / n**0.5), name
        assert abs(float(p.detach().mean())) < 5 * 0.006 / n**0.5, name
    for name, router in model.routers():
        assert not router.e_score_correction_bias.any(), name
    stacked = model.layers["1"].mlp.experts.gate_proj
    assert not torch.equal(stacked[0], stacked[1])


def test_the_generator_of_the_process_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Transformer(SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_names_are_the_released_ones():
    names = set(Transformer(SMALL).state_dict())
    for name in (
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.1.mlp.experts.gate_proj",
        "layers.1.mlp.shared_experts.down_proj.weight",
        "layers.1.mlp.gate.e_score_correction_bias",
        "layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "layers.2.eh_proj.weight",
        "layers.2.shared_head.norm.weight",
    ):
        assert name in names


def test_later_tokens_change_no_earlier_logits():
    model = awake(Transformer(CFG))
    tokens = tokens_for(CFG, 2, 10)[:, :10]
    logits = model(tokens)
    for t in (1, 5, 9):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % CFG.vocab_size
        torch.testing.assert_close(model(changed)[:, :t], logits[:, :t])
        assert not torch.allclose(model(changed)[:, t:], logits[:, t:])


def test_sequences_of_a_batch_do_not_meet():
    model = awake(Transformer(CFG))
    tokens = tokens_for(CFG, 3, 8)[:, :8]
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]), atol=1e-5, rtol=1e-4)


def test_the_main_loss_is_the_cross_entropy_of_the_logits():
    model = awake(Transformer(CFG))
    tokens = tokens_for(CFG, 2, 8)
    losses = model.losses(tokens)
    expected = F.cross_entropy(model(tokens[:, :8]).flatten(0, 1), tokens[:, 1:9].flatten())
    torch.testing.assert_close(losses.main, expected)
    assert losses.load.shape == (CFG.num_moe_layers + 1, CFG.n_routed_experts)
    assert (losses.load.sum(-1) == 2 * 8 * CFG.num_experts_per_tok).all()


def test_an_untrained_model_knows_nothing():
    cfg = ModelConfig.preset("tiny").replace(initializer_range=0.006)
    losses = Transformer(cfg).losses(tokens_for(cfg, 2, 32))
    uniform = float(torch.log(torch.tensor(512.0)))
    assert losses.main.item() == pytest.approx(uniform, abs=0.05) and losses.mtp.item() == pytest.approx(
        uniform, abs=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(dtype):
    model = awake(Transformer(CFG, compute_dtype=dtype))
    tokens, answers = tokens_for(CFG, 2, 8), []
    for enabled in (False, True):
        model.set_recompute(enabled)
        model.zero_grad()
        losses = model.losses(tokens)
        total(losses).backward()
        answers.append([losses.main.detach(), losses.mtp.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*answers))


@pytest.mark.parametrize("cuts", [[4], [1, 3], [2, 2], [1, 1, 2], [0, 4]])
def test_stages_composed_are_the_whole(cuts):
    """Values and gradients: each stage starts with the whole's weights, and passes hidden states and routings on."""
    whole, tokens = Transformer(CFG, seed=4), tokens_for(CFG, 2, 8)
    stages, start = [], 0
    for i, n in enumerate(cuts):
        part = Part(range(start, start + n), embed=i == 0, head=i == len(cuts) - 1)
        stages.append(Transformer(CFG, seed=4, part=part))
        start += n
    names = [n for stage in stages for n, _ in stage.named_parameters()]
    weights = dict(whole.named_parameters())
    assert set(names) == set(weights)
    for stage in stages:
        assert all(torch.equal(p, weights[n]) for n, p in stage.named_parameters())
    x, routings = stages[0].embed(tokens[:, :8]), []
    for stage in stages:
        x, more = stage.run_blocks(x)
        routings += more
    losses, expected = stages[-1].head_losses(x, tokens, routings), whole.losses(tokens)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected))
    total(losses).backward()
    total(expected).backward()
    for name, p in weights.items():
        held = [dict(s.named_parameters())[name].grad for s in stages if name in dict(s.named_parameters())]
        # MTP's embedding on the last stage is a copy of the first's: its share of the gradient adds up
        torch.testing.assert_close(sum(held), p.grad, atol=1e-7, rtol=1e-5)


def test_bf16_compute_follows_fp32_and_leaves_the_master_weights():
    model = awake(Transformer(CFG))
    tokens = tokens_for(CFG, 2, 16)
    exact = model.losses(tokens).main.item()
    model.compute_dtype = torch.bfloat16
    losses = model.losses(tokens)
    total(losses).backward()
    assert model(tokens[:, :4]).dtype == torch.bfloat16
    assert losses.main.item() == pytest.approx(exact, rel=0.02) and losses.main.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_every_parameter_that_a_token_used_gets_a_gradient():
    model = awake(Transformer(CFG))
    total(model.losses(tokens_for(CFG, 4, 16))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_dense_model_has_no_routers():
    cfg = CFG.replace(first_k_dense_replace=4)
    losses = Transformer(cfg).losses(tokens_for(cfg, 1, 8))
    assert losses.load.shape == (0, cfg.n_routed_experts) and losses.balance.item() == 0.0 and losses.mtp > 0


def test_meta_costs_nothing_and_holds_no_values():
    model = Transformer(ModelConfig.preset("v3-16b"), device="meta")
    assert all(p.is_meta for p in model.parameters())


def test_tiny_learns_to_repeat():
    cfg = ModelConfig.preset("tiny").replace(vocab_size=16)
    model = Transformer(cfg)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = torch.arange(16).repeat(2, 2)[:, : 24 + 2]
    first = None
    for _ in range(25):
        losses = model.losses(tokens)
        first = first or losses.main.item()
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
    assert losses.main.item() < 0.3 * first
