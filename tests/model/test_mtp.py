"""The whole model, MTP included, against `reference.py`'s short independent derivation."""

import pytest
import reference
import torch
from modelkit import SMALL, awake, tokens_for

from dsv3_book.model import Transformer


def gradients(cfg, model, weights, tokens):
    """(name, ours, reference's) of main + 0.3·mtp + balance."""
    ours = model.losses(tokens)
    (ours.main + 0.3 * ours.mtp + ours.balance).backward()
    _, main, mtp, aux, _ = reference.run(cfg, weights, tokens)
    (main + 0.3 * mtp + aux).backward()
    return [(n, p.grad, weights[n].grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_losses_load_and_gradients(depth):
    cfg = SMALL.replace(num_nextn_predict_layers=depth, aux_loss_alpha=0.05)  # large enough to see in every number
    model = awake(Transformer(cfg))
    tokens = tokens_for(cfg, 2, 7)
    weights = reference.weights_of(model)
    with torch.no_grad():
        logits, main, mtp, aux, load = reference.run(cfg, weights, tokens)
        losses = model.losses(tokens)
    T = tokens.shape[1] - 1 - depth
    torch.testing.assert_close(model(tokens[:, :T]).detach().double(), logits, atol=1e-5, rtol=1e-5)
    for name, ours, theirs in (("main", losses.main, main), ("mtp", losses.mtp, mtp), ("balance", losses.balance, aux)):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5), name
    assert torch.equal(losses.load, load) and load.shape[0] == cfg.num_moe_layers + depth
    for name, ours, theirs in gradients(cfg, model, weights, tokens):
        norm = float(theirs.norm())
        assert float((ours.double() - theirs).norm()) <= 1e-4 * norm, name
        assert norm > 0 or "experts" in name, f"{name} has no gradient: the test would prove nothing"


def test_mtp_shares_embedding_and_head():
    model = Transformer(SMALL.replace(num_nextn_predict_layers=2))
    names = [n for n, _ in model.named_parameters()]
    assert sum("embed_tokens" in n for n in names) == sum("lm_head" in n for n in names) == 1
    assert [n for n, _ in model.routers()][-2:] == ["layers.2.mlp.gate", "layers.3.mlp.gate"]


def test_depth_k_never_sees_the_token_it_foretells():
    """Changing the last target of the deepest module changes only its loss, not its hidden states."""
    cfg = SMALL.replace(num_nextn_predict_layers=2)
    model = awake(Transformer(cfg))
    tokens = tokens_for(cfg, 1, 9)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % cfg.vocab_size

    def hidden(t):
        T = t.shape[1] - 3
        h = model.norm(model.run_blocks(model.embed(t[:, :T]))[0])
        for j, module in enumerate(model.mtp_modules(), start=1):
            h, _ = module.predict(h, model.embed(t[:, j : T + j]), model.angles(T), model.dispatch)
        return h

    assert torch.equal(hidden(tokens), hidden(other))
    assert model.losses(tokens).mtp != model.losses(other).mtp
    assert model.losses(tokens).main == model.losses(other).main


def test_without_mtp_the_loss_is_zero_and_the_rest_unchanged():
    deep, flat = SMALL.replace(num_nextn_predict_layers=1), SMALL.replace(num_nextn_predict_layers=0)
    tokens = tokens_for(deep, 2, 8)
    a, b = Transformer(deep).losses(tokens), Transformer(flat).losses(tokens[:, :-1])
    assert torch.equal(a.main, b.main) and float(b.mtp) == 0.0 and a.load.shape[0] == b.load.shape[0] + 1


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="got 2 tokens a row, but needs at least 3"):
        Transformer(SMALL.replace(num_nextn_predict_layers=1)).losses(torch.zeros(1, 2, dtype=torch.int64))
