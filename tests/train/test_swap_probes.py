"""Parts that don't keep their contract: each is refused before training begins, in words that say what is wanted."""

import pytest
import torch
from modelkit import SMALL as CFG
from swapkit import attention, file, router, sgd

from dsv3_book.train.swaps import Swap, load_swaps


def refusal(folder, kind: str, code: str, **more) -> str:
    """What is said of the part `Mine` in `code`."""
    path = file(folder, code)
    with pytest.raises(ValueError) as caught:
        load_swaps(Swap(**{kind: f"{path}:Mine"}), CFG, **more)
    said = str(caught.value)
    assert said.startswith(f"--swap.{kind} {path}:Mine: ") and "dsv3_book.train.contracts.Own" in said
    assert "copy from dsv3_book/" in said
    return said


# Routers -------------------------------------------------------------------------------------------------------------
NO_CONFIG = "making it raised AttributeError: 'ModelConfig' object has no attribute 'num_experts'"
RANDOM = """experts = torch.randperm(4).expand(32, 4)[:, :3].contiguous()
                load = torch.bincount(experts.flatten(), minlength=8).float()"""
DEAF = """
    class Mine(Router):
        def forward(self, x):
            kept, self.e_score_correction_bias = self.e_score_correction_bias, torch.zeros(8)
            try:
                return super().forward(x)
            finally:
                self.e_score_correction_bias = kept
"""
SHARED = "shared = []\n" + "\n".join(
    line.removeprefix("        ")
    for line in router(init="shared.append(self.weight); self.weight = shared[0]").splitlines()
)
PARAMETER = "del self.e_score_correction_bias; self.e_score_correction_bias = nn.Parameter(torch.zeros(8))"
UNSAVED = "self.register_buffer('e_score_correction_bias', torch.zeros(8), persistent=False)"
NARROW = "self.e_score_correction_bias = torch.zeros(8, dtype=torch.bfloat16)"
ROUTERS = {
    "is called as MyRouter(cfg), but has the signature (cfg, groups)": "def Mine(cfg, groups): pass",
    "made a list, wanted a torch.nn.Module": "def Mine(cfg): return []",
    "is a int, which can't be called": "Mine = 3",
    NO_CONFIG: router(init="cfg.num_experts"),
    "forward returned a tuple, wanted a model.router.Routing": router("return experts, gates, scores, load"),
    "forward raised ZeroDivisionError": router("1 / 0"),
    "experts: found torch.int32 (32, 3), wanted torch.int64 [N, K] = (32, 3)": router("experts = experts.int()"),
    "experts: found torch.int64 (32, 2)": router("experts, gates = experts[:, :2], gates[:, :2]"),
    "gates: found torch.float64 (32, 3), wanted torch.float32 [N, K]": router("gates = gates.double()"),
    "scores: found torch.float32 (32, 7), wanted torch.float32 [N, E] = (32, 8)": router("scores = scores[:, 1:]"),
    "load: found a int": router("load = 3"),
    "experts: found numbers from 1 to 8, wanted 0 to 7": router("experts = experts + 1"),
    "wanted 3 different ones": router("experts[:, 1] = experts[:, 0]"),
    "has some of 3 groups (nodes), wanted topk_group = 2": router(
        "experts = torch.tensor([0, 2, 4]).expand_as(experts).contiguous()"
    ),
    "gates: not all are finite": router("gates = gates / 0"),
    "scores: wanted finite numbers ≥ 0 with a positive sum": router("scores = scores - 0.6"),
    "wanted how many tokens chose each expert": router("load = load / load.sum()"),
    "the gates carry no gradient": router("gates = gates.detach()"),
    "no gradient reaches unused": router(init="self.unused = nn.Parameter(torch.zeros(3))"),
    "the gradient of weight is not finite": router("gates = gates + 0 * (scores[:, :3] * 0).sqrt()"),
    "experts differ between two calls": router(RANDOM),
    "forward changes its input x in place": router("x.data.mul_(2)"),
    "forward changes the buffer seen; wanted: no memory": router(
        "self.seen += 1", "self.register_buffer('seen', torch.zeros(1))"
    ),
    "forward changes the buffer late": router(
        "self.register_buffer('late', torch.zeros(1)) if not hasattr(self, 'late') else 0"
    ),
    "parameter weight is torch.float64": router(init="self.double()"),
    "parameter t is torch.float32 (); wanted: fp32, one dimension": router(
        init="self.t = nn.Parameter(torch.ones(()))"
    ),
    "parameter weight is frozen": router(init="self.weight.requires_grad_(False)"),
    "has one parameter under two names: again": router(init="self.again = self.weight"),
    "shares its parameter weight with other layers": SHARED,
    "e_score_correction_bias is no buffer": router(init=PARAMETER),
    "e_score_correction_bias is not persistent; wanted: saved": router(init=UNSAVED),
    "e_score_correction_bias: found torch.bfloat16 (8,), wanted torch.float32": router(init=NARROW),
    "e_score_correction_bias starts at [1, 1": router(init="self.e_score_correction_bias += 1"),
    "e_score_correction_bias has no effect: ": DEAF,
}


@pytest.mark.parametrize("says", ROUTERS)
def test_a_router_that_is_refused(tmp_path, says) -> None:
    assert says in refusal(tmp_path, "router", ROUTERS[says])


def test_an_error_names_the_readers_line(tmp_path) -> None:
    said = refusal(tmp_path, "router", router("torch.ones(2) @ torch.ones(3)"))
    lines = (tmp_path / "mine.py").read_text().splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "torch.ones(3)" in line)
    assert f"({tmp_path / 'mine.py'}, line {number})" in said


# Attention -----------------------------------------------------------------------------------------------------------
CLOCK = """
    class Mine(MLA):
        decode = None
        def reset_parameters(self):
            for p in self.parameters():
                nn.init.constant_(p, time.perf_counter_ns() % 10**6)
"""
LATER = "def decode(self, x, at, cache): raise NotImplementedError('later')"
ATTENTIONS = {
    "is called as MyAttention(cfg, layer), but has the signature (cfg)": "def Mine(cfg): pass",
    "forward raised TypeError: ": attention("self(x)"),
    "the output: found torch.float32 (2, 8, 14), wanted torch.float32 [B, T, D] = (2, 8, 15)": attention(
        "y = y[..., 1:]"
    ),
    "the output: found a tuple": attention("return y, None"),
    "the output: found torch.float64": attention("y = y.double()"),
    "the output is not finite": attention("y = y / 0"),
    "when tokens follow; wanted: causal": attention("y = y.flip(1)"),
    "with the other sequences; wanted: each alone": attention("y = y + y.mean(0)"),
    "the output differs between two calls": attention("y = nn.functional.dropout(y, 0.5)"),
    "no gradient reaches its input": attention("y = super().forward(x.detach(), at)"),
    "no gradient reaches extra.weight": attention(init="self.extra = nn.Linear(3, 3, bias=False)"),
    "starts otherwise each time with the same seed": CLOCK,
    "forward changes its input x in place": attention("x.data.add_(1)"),
    "decode differs from forward by": attention("y = 2 * y", more=""),
    "decode left 0 tokens in the cache, wanted 6": attention(more="def decode(self, x, at, cache): return self(x, at)"),
    "decode(x, at, cache) raised NotImplementedError: later": attention(more=LATER),
}


@pytest.mark.parametrize("says", ATTENTIONS)
def test_an_attention_that_is_refused(tmp_path, says) -> None:
    assert says in refusal(tmp_path, "attention", ATTENTIONS[says])


def test_an_attention_that_mixes_in_the_future_a_little(tmp_path) -> None:
    """A mask off by one: token t sees t + 1. The loss would look wonderful."""
    code = attention("y = y + 0.1 * torch.cat([y[:, 1:], y[:, :1] * 0], 1)")
    assert "wanted: causal" in refusal(tmp_path, "attention", code)


def test_weights_must_be_cast_to_what_the_run_computes_in(tmp_path) -> None:
    code = """
        class Mine(nn.Module):
            def __init__(self, cfg, layer):
                super().__init__()
                self.v_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
            def forward(self, x, at):
                return self.v_proj(x).cumsum(1)
    """
    load_swaps(Swap(attention=f"{file(tmp_path, code)}:Mine"), CFG, torch.float32)
    assert "same dtype" in refusal(tmp_path, "attention", code, compute_dtype=torch.bfloat16)


# Balance rules -------------------------------------------------------------------------------------------------------
def rule(body: str) -> str:
    return f"calls = []\ndef Mine(bias, load, gamma):\n    up = torch.sign(load.mean() - load)\n    {body}\n"


RULES = {
    "is called as rule(bias, load, gamma), but has the signature (bias, load)": "def Mine(bias, load): pass",
    "returned the new bias; wanted: the given bias moved in place": rule("return bias + gamma * up"),
    "does nothing to the bias for the load [0, 3, 6": rule("bias = bias + gamma * up"),
    "the busiest one's 0.002; wanted: up where the load is low": rule("bias -= gamma * up"),
    "moves the bias at gamma 0": rule("bias += (gamma + 1e-3) * up"),
    "changes `load` in place": rule("load -= load.mean(); bias -= gamma * load"),
    "left a bias that is not finite": rule("bias += gamma / load"),
    "the second time; wanted: no memory": rule("calls.append(1); bias += gamma * len(calls) * up"),
    "the rule raised RuntimeError": rule("bias += gamma * up[1:]"),
}


@pytest.mark.parametrize("says", RULES)
def test_a_balance_rule_that_is_refused(tmp_path, says) -> None:
    assert says in refusal(tmp_path, "balance", RULES[says])


# Schedules -----------------------------------------------------------------------------------------------------------
def returning(schedule: str) -> str:
    return f"calls = []\ndef Mine(P, M):\n    calls.append(0)\n    return {schedule}\n"


STUCK = "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3\\nF1.0 F1.1 B1.0 B1.1 F1.2 B1.2 F1.3 B1.3"
FORWARDS = "Schedule('x', P, M, 1, [[a for a in make_schedule('1f1b', 1, M).actions[0] if a.kind == 'F'], []])"
SCHEDULES = {
    "returned a list, wanted a pipeline.schedule.Schedule": returning("[]"),
    "is a schedule for 2 ranks and 5 micro-batches, wanted 2 ranks and 4": returning("make_schedule('1f1b', P, M + 1)"),
    "Nobody does the input gradient (I or B) of micro-batches 0–3 at stage 0": returning(FORWARDS),
    "Deadlock: rank 0 stops at its": returning(f"Schedule.from_text('{STUCK}')"),
    "schedule(2, 4) raised KeyError: 'x'": returning("{}['x']"),
    "gives another schedule the second time": returning("make_schedule('zb1p' if len(calls) % 2 else '1f1b', P, M)"),
}


@pytest.mark.parametrize("says", SCHEDULES)
def test_a_schedule_that_is_refused(tmp_path, says) -> None:
    swaps = load_swaps(Swap(schedule=f"{file(tmp_path, SCHEDULES[says])}:Mine"), CFG)
    with pytest.raises(ValueError, match=r"^--swap\.schedule .*mine\.py:Mine: ") as caught:
        swaps.schedule(2, 4)
    assert says in str(caught.value) and "OwnSchedule" in str(caught.value)


def test_a_schedule_that_is_refused_at_once(tmp_path) -> None:
    said = refusal(tmp_path, "schedule", "def Mine(P): return make_schedule('1f1b', P, 4)")
    assert "is called as schedule(num_ranks, num_microbatches)" in said
    for text, says in (
        ("F0.0 X0.0", "rank 0: 'X0.0' is not an action"),
        ("F0.0", "Nobody does the input gradient"),
        ("", "the text holds no action"),
    ):
        (tmp_path / "mine.txt").write_text(text)
        with pytest.raises(ValueError, match=says):
            load_swaps(Swap(schedule=str(tmp_path / "mine.txt")), CFG)


# Optimisers ----------------------------------------------------------------------------------------------------------
FORGETS = "torch.optim.SGD([groups[0], {'params': groups[1]['params'][:1]}], lr=lr)"
NO_STEP = """
    class Mine(torch.optim.SGD):
        def __init__(self, groups, lr):
            super().__init__(groups, lr=lr)
        def step(self, closure):
            pass
"""
OPTIMIZERS = {
    "is called as factory(groups, lr=0.01), but has the signature (groups)": "def Mine(groups): pass",
    "returned a list without .param_groups": "def Mine(groups, lr): return []",
    'param_groups have no "lr"': sgd(init="[g.pop('lr') for g in self.param_groups]"),
    "lists 2 parameters for the 3 it was given": f"def Mine(groups, lr): return {FORGETS}",
    "making it as factory(groups, lr=0.01) raised ValueError": "Mine = lambda groups, lr: torch.optim.SGD(groups, -lr)",
    "step() raised TypeError": NO_STEP,
    "its first step goes up the gradient": "Mine = lambda groups, lr: torch.optim.SGD(groups, lr, maximize=True)",
    'with "lr" 0 in its groups moved a weight by': sgd("for g, p in every: p -= 0.01 * p.grad"),
    "a step with lr 0.01 moved nothing": sgd("for g, p in every: p.grad = None"),
    "weights that are not finite": sgd("for g, p in every: p.grad /= 0"),
    "end apart; wanted: the same weights": sgd("for g, p in every: p.grad += 0.1 * torch.randn_like(p)"),
    "keeps state[p]['seen'] a int for a parameter": sgd("for g, p in every: self.state[p]['seen'] = 1"),
    "keeps state[p]['rows'] of shape (6,)": sgd("for g, p in every: self.state[p]['rows'] = p.grad.sum(-1).clone()"),
    "Run it with --parallel.zero False": sgd("for g, p in every: p.grad /= p.grad.norm()"),
}


@pytest.mark.parametrize("says", OPTIMIZERS)
def test_an_optimizer_that_is_refused(tmp_path, says) -> None:
    assert says in refusal(tmp_path, "optimizer", OPTIMIZERS[says])


def test_one_that_needs_whole_matrices_runs_without_zero(tmp_path) -> None:
    path = file(tmp_path, OPTIMIZERS["Run it with --parallel.zero False"])
    assert load_swaps(Swap(optimizer=f"{path}:Mine"), CFG, zero=False).optimizer is not None
