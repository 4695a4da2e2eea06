"""The traps of DESIGN §4 that concern the model. Each is set on purpose, and the check that guards it must notice.

Most are guarded by agreement with `reference.py`; those about what is saved, trained or cast have a check of their own.
"""

import functools

import pytest
import reference
import torch
from modelkit import SMALL, awake, tokens_for

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer, mla, router, transformer
from dsv3_book.model.experts import Experts
from dsv3_book.model.mtp import MTPModule
from dsv3_book.model.router import Router, Routing

CFG = SMALL.replace(num_nextn_predict_layers=2, aux_loss_alpha=0.05)
TOKENS = tokens_for(CFG, 2, 9)
T = 9


def made(shift: float = 0.0) -> Transformer:
    return awake(Transformer(CFG), shift=shift)


@functools.cache
def expected(shift: float, length: int):
    with torch.no_grad():
        return reference.run(CFG, reference.weights_of(made(shift)), TOKENS[:, : length + 3])


@torch.no_grad()
def agrees(shift: float = 0.0, length: int = T) -> bool:
    """Whether the model, as it now is, gives the reference's logits, losses and load."""
    model, tokens = made(shift), TOKENS[:, : length + 3]
    logits, main, mtp, balance, load = expected(shift, length)
    losses = model.losses(tokens)
    pairs = [(model(tokens[:, :length]), logits), (losses.main, main), (losses.mtp, mtp), (losses.balance, balance)]
    close = [torch.allclose(a.double(), torch.as_tensor(b).double(), atol=1e-5, rtol=1e-5) for a, b in pairs]
    return all(close) and torch.equal(losses.load, load)


def test_without_a_trap_the_model_agrees():
    assert agrees() and agrees(shift=-3.0) and agrees(length=1)


# The router -----------------------------------------------------------------------------------------------------------
def routed_by(choose, weigh):
    """A Router.forward whose choice and gates are the trap's."""

    def forward(self, x):
        cfg = self.cfg
        scores = torch.sigmoid(x.float() @ self.weight.float().t())
        biased = scores + self.e_score_correction_bias
        experts = choose(biased, cfg)
        gates = router.gate_weights(weigh(scores, biased), experts, cfg.norm_topk_prob, cfg.routed_scaling_factor)
        load = torch.bincount(experts.flatten(), minlength=cfg.n_routed_experts).float()
        return Routing(experts, gates, scores, load)

    return forward


def choice(masked: float = -torch.inf, worth=lambda g: g.topk(2, dim=-1).values.sum(-1)):
    def choose(biased, cfg):
        grouped = biased.unflatten(-1, (cfg.n_group, -1))
        best = worth(grouped).topk(cfg.topk_group, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~kept[:, :, None], masked).flatten(-2).topk(cfg.num_experts_per_tok).indices

    return choose


RIGHT = choice()
ROUTER_TRAPS = {
    "gates from the biased scores": (routed_by(RIGHT, lambda s, b: b), 0.0),
    "masked groups get 0": (routed_by(choice(masked=0.0), lambda s, b: s), -3.0),
    "a group scored by its best": (routed_by(choice(worth=lambda g: g.amax(-1)), lambda s, b: s), 0.0),
    "no groups at all": (routed_by(choice(worth=lambda g: g[..., 0] * 0), lambda s, b: s), 0.0),
    "the bias is not used": (routed_by(lambda b, c: torch.arange(3).repeat(len(b), 1), lambda s, b: s), 0.0),
}


@pytest.mark.parametrize("trap", ROUTER_TRAPS)
def test_router_traps(trap, monkeypatch):
    forward, shift = ROUTER_TRAPS[trap]
    monkeypatch.setattr(Router, "forward", forward)
    assert not agrees(shift)


def test_the_router_trap_harness_itself_is_right(monkeypatch):
    monkeypatch.setattr(Router, "forward", routed_by(RIGHT, lambda s, b: s))
    assert agrees() and agrees(-3.0)


def test_a_group_scored_by_the_sum_of_all_its_experts(monkeypatch):
    """Groups of two can't tell a sum from a top-2 sum: this trap needs groups of four."""
    cfg = CFG.replace(n_group=2, topk_group=1, num_nextn_predict_layers=0)
    model = awake(Transformer(cfg))
    tokens = tokens_for(cfg, 2, 9)
    with torch.no_grad():
        load = reference.run(cfg, reference.weights_of(model), tokens)[-1]
        assert torch.equal(model.losses(tokens).load, load)
        monkeypatch.setattr(Router, "forward", routed_by(choice(worth=lambda g: g.sum(-1)), lambda s, b: s))
        assert not torch.equal(model.losses(tokens).load, load)


def router_is_fp32() -> bool:
    """In a bf16 model, scores and gates are fp32 numbers computed in fp32 from the bf16 activations."""
    gate = made().routers()[0][1]
    x = torch.randn(64, CFG.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        routing = gate(x)
    exact = torch.sigmoid(x.double() @ gate.weight.detach().double().t())
    right_type = routing.scores.dtype == routing.gates.dtype == torch.float32
    return right_type and float((routing.scores.double() - exact).abs().max()) < 1e-6


def test_router_in_bf16(monkeypatch):
    assert router_is_fp32()

    def forward(self, x):
        scores = torch.sigmoid(x @ self.weight.to(x.dtype).t()).float()
        args = self.cfg.n_group, self.cfg.topk_group, self.cfg.num_experts_per_tok
        experts = router.select(scores, self.e_score_correction_bias, *args)
        gates = router.gate_weights(scores, experts, True, 2.5)
        return Routing(experts, gates, scores, torch.bincount(experts.flatten(), minlength=8).float())

    monkeypatch.setattr(Router, "forward", forward)
    assert not router_is_fp32()


# The bias -------------------------------------------------------------------------------------------------------------
def bias_is_a_saved_fp32_buffer() -> bool:
    model = made().bfloat16()
    names = [n + ".e_score_correction_bias" for n, _ in model.routers()]
    tensors = model.state_dict()
    trained = {n for n, _ in model.named_parameters()}
    original = dict(made().routers())
    kept = all(torch.equal(r.e_score_correction_bias, original[n].e_score_correction_bias) for n, r in model.routers())
    saved = all(n in tensors and tensors[n].dtype == torch.float32 for n in names)
    return len(names) == 3 and kept and saved and not trained & set(names)


def test_bias_as_a_parameter_unsaved_or_cast(monkeypatch):
    assert bias_is_a_saved_fp32_buffer()
    right = Router.__init__

    def with_bias(make):
        def init(self, cfg):
            right(self, cfg)
            bias = self.e_score_correction_bias
            del self.e_score_correction_bias
            make(self, bias)

        return init

    name = "e_score_correction_bias"
    for make in (
        lambda self, bias: self.register_parameter(name, torch.nn.Parameter(bias)),
        lambda self, bias: self.register_buffer(name, bias, persistent=False),
    ):
        monkeypatch.setattr(Router, "__init__", with_bias(make))
        assert not bias_is_a_saved_fp32_buffer()
    monkeypatch.setattr(Router, "__init__", right)
    monkeypatch.delattr(Router, "_apply")
    assert not bias_is_a_saved_fp32_buffer()


def test_mtp_routers_are_counted_and_named(monkeypatch):
    def every_router_has_a_row_of_load(model):
        return len(model.routers()) == len(model.losses(TOKENS).load) == CFG.num_moe_layers + 2

    assert every_router_has_a_row_of_load(made())
    right = Transformer.routers
    monkeypatch.setattr(Transformer, "routers", lambda self: right(self)[:-2])
    assert not every_router_has_a_row_of_load(made())


# Attention ------------------------------------------------------------------------------------------------------------
def test_rope_halves_instead_of_neighbours(monkeypatch):
    def halves(x, at):
        a, b = x.chunk(2, dim=-1)
        cos, sin = at[0][:, None], at[1][:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    monkeypatch.setattr(mla, "rotate", halves)
    assert not agrees()


def test_yarn_softmax_scale_missing_is_invisible_at_position_0(monkeypatch):
    monkeypatch.setattr(ModelConfig, "softmax_scale", property(lambda self: self.qk_head_dim**-0.5))
    assert agrees(length=1)  # one key: softmax is 1 whatever the scale. That is the trap within the trap
    assert not agrees()


def test_yarn_turning_the_query_only_or_left_out(monkeypatch):
    right = transformer.angles
    plain = CFG.replace(rope_scaling=None)
    monkeypatch.setattr(transformer, "angles", lambda cfg, positions: right(plain, positions))
    assert agrees(length=1) and not agrees()


def test_attention_that_sees_the_future(monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(mla, "causal_attention", lambda q, k, v, scale: attend(q, k, v, scale=scale))
    assert not agrees()


# MTP ------------------------------------------------------------------------------------------------------------------
def test_eh_proj_in_the_reports_order(monkeypatch):
    monkeypatch.setattr(
        MTPModule, "normed", lambda self, embedded, hidden: torch.cat([self.hnorm(hidden), self.enorm(embedded)], -1)
    )
    assert not agrees()


def test_hidden_state_from_before_the_norm(monkeypatch):
    right, before = MTPModule.predict, []

    def predict(self, hidden, embedded, at, dispatch):
        return right(self, before.pop() if before else hidden, embedded, at, dispatch)

    def head_losses(self, x, tokens, routings):
        before.append(x)
        return right_losses(self, x, tokens, routings)

    right_losses = Transformer.head_losses
    monkeypatch.setattr(Transformer, "head_losses", head_losses)
    monkeypatch.setattr(MTPModule, "predict", predict)
    assert not agrees()


def test_mtp_reads_the_token_it_has_already_seen(monkeypatch):
    right = MTPModule.predict
    monkeypatch.setattr(
        MTPModule, "predict", lambda self, h, e, at, dispatch: right(self, h, e.roll(1, dims=1), at, dispatch)
    )
    assert not agrees()


# Balance --------------------------------------------------------------------------------------------------------------
def test_alpha_silently_zero(monkeypatch):
    right = transformer.sequence_balance_loss
    monkeypatch.setattr(transformer, "sequence_balance_loss", lambda scores, k, alpha: right(scores, k, 0.0))
    assert not agrees()


def absent_alpha_is_the_reports() -> bool:
    file = {k: v for k, v in CFG.to_hf().items() if k != "aux_loss_alpha"}
    return ModelConfig.from_hf(file).aux_loss_alpha == ModelConfig.preset("v3-671b").aux_loss_alpha == 1e-4


def test_absent_alpha_read_as_zero(monkeypatch):
    assert absent_alpha_is_the_reports()
    right = ModelConfig.from_hf
    monkeypatch.setattr(ModelConfig, "from_hf", staticmethod(lambda raw: right({"aux_loss_alpha": 0.0} | raw)))
    assert not absent_alpha_is_the_reports()


def test_balance_loss_from_the_biased_choice(monkeypatch):
    """f counts the top K of the scores alone; what the router chose (biased, in groups) is another set."""
    chosen, right = [], Router.forward

    def forward(self, x):
        routing = right(self, x)
        chosen.append(routing.experts)
        return routing

    def biased_balance(scores, k, alpha):
        B, length, E = scores.shape
        experts = chosen.pop(0).view(B, -1)
        f = torch.zeros(B, E).scatter_add_(1, experts, torch.ones(experts.shape)) * E / (k * length)
        return alpha * (f * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()

    monkeypatch.setattr(Router, "forward", forward)
    monkeypatch.setattr(transformer, "sequence_balance_loss", biased_balance)
    chosen.clear()
    assert not agrees()


def test_balance_over_the_batch_instead_of_the_sequence(monkeypatch):
    right = transformer.sequence_balance_loss
    monkeypatch.setattr(
        transformer, "sequence_balance_loss", lambda scores, k, alpha: right(scores.flatten(0, 1)[None], k, alpha)
    )
    assert not agrees()


# Experts --------------------------------------------------------------------------------------------------------------
def test_a_capacity_that_drops_tokens(monkeypatch):
    right = Experts.forward

    def forward(self, arrived):
        y = right(self, arrived)
        start = 0
        for n in arrived.counts.tolist():
            y[start + 2 : start + n] = 0  # room for two tokens an expert
            start += n
        return y

    monkeypatch.setattr(Experts, "forward", forward)
    assert not agrees()


def test_no_routing_scale_and_no_normalisation(monkeypatch):
    right = router.gate_weights
    for wrong in (lambda s, e, n, scale: right(s, e, n, 1.0), lambda s, e, n, scale: right(s, e, False, scale)):
        monkeypatch.setattr(router, "gate_weights", wrong)
        assert not agrees()
