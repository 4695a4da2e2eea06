"""The reader's own parts: good ones train as they should, bad ones are refused in words that help."""

from pathlib import Path

import pytest
import torch
from modelkit import SMALL as CFG
from modelkit import tokens_for
from swapkit import file
from torch import nn

from dsv3_book.generate import tokens
from dsv3_book.model import Transformer
from dsv3_book.model.balance import update_bias
from dsv3_book.model.mla import MLA
from dsv3_book.model.transformer import Part
from dsv3_book.optim.adamw import adamw
from dsv3_book.optim.shards import Kind
from dsv3_book.optim.zero import ZeRO1
from dsv3_book.pipeline.executor import Pipeline
from dsv3_book.pipeline.schedule import make_schedule
from dsv3_book.train.sources import same_parts
from dsv3_book.train.swaps import Swap, Swaps, load_swaps, swaps_to_read

EXAMPLES = Path(__file__).parents[2] / "examples" / "swaps"
GOOD = {
    "attention": f"{EXAMPLES}/plain_attention.py:PlainAttention",
    "router": f"{EXAMPLES}/softmax_router.py:SoftmaxRouter",
    "balance": f"{EXAMPLES}/proportional_balance.py:by_distance",
    "schedule": f"{EXAMPLES}/gpipe.py:gpipe",
    "optimizer": f"{EXAMPLES}/momentum.py:momentum",
}
REFERENCE = {
    "attention": "dsv3_book.model.mla:MLA",
    "router": "dsv3_book.model.router:Router",
    "balance": "dsv3_book.model.balance:update_bias",
    "optimizer": "torch.optim:AdamW",
}


def train(swaps: Swaps, cfg=CFG, steps: int = 2) -> tuple[list[float], Pipeline]:
    """As the trainer does: two micro-batches a step, through the pipeline's executor."""
    schedule = (swaps.schedule or (lambda P, M: make_schedule("1f1b", P, M)))(1, 2)
    pipeline = Pipeline(cfg, schedule, seed=3)
    swaps.apply(pipeline, seed=3)
    (model,) = pipeline.stages.values()
    kinds = [Kind(list(model.named_parameters()), None)]
    optimizer = ZeRO1(kinds, None, lr=0.01, make=swaps.optimizer or adamw)
    curve, (one, two) = [], tokens_for(cfg, 4, 8).split(2)
    for _ in range(steps):
        losses = pipeline.step([one, two], 0.3, sum_copies=False)
        optimizer.reduce()
        optimizer.step()
        for (_, router), load in zip(model.routers(), losses.load, strict=True):
            if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
                (swaps.balance or update_bias)(bias, load, 0.001)
        curve.append(losses.main.item())
    return curve, pipeline


@pytest.fixture(scope="module")
def reference():
    return train(Swaps(CFG), steps=3)


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {n: t for model in pipeline.stages.values() for n, t in model.state_dict().items()}


# Good ones -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_trains(kind, reference) -> None:
    curve, pipeline = train(load_swaps(Swap(**{kind: GOOD[kind]}), CFG), steps=3)
    assert curve[2] < curve[0]
    if kind == "schedule":  # another order of the same work
        assert curve == pytest.approx(reference[0], rel=1e-6)
    else:
        assert curve != reference[0]
    if kind == "router":  # it has no bias to balance, in MTP's layer either
        assert not any(name.endswith("e_score_correction_bias") for name in weights(pipeline))


def test_all_kinds_at_once() -> None:
    curve, pipeline = train(load_swaps(Swap(**GOOD), CFG), steps=3)
    assert curve[2] < curve[0]
    names = weights(pipeline).keys()
    assert {f"layers.{i}.self_attn.k_proj.weight" for i in range(3)} <= names
    assert not any("kv_a_proj" in name for name in names)


def test_the_reference_swapped_for_itself_changes_no_bit(reference) -> None:
    swap = Swap(**{k: v for k, v in REFERENCE.items() if k != "optimizer"})
    curve, pipeline = train(load_swaps(swap, CFG), steps=3)
    assert curve == reference[0]
    expected = weights(reference[1])
    assert [n for n, t in weights(pipeline).items() if not torch.equal(t, expected[n])] == []


def test_torch_adamw_gets_the_runs_betas_and_decay(reference) -> None:
    curve, _ = train(load_swaps(Swap(optimizer="torch.optim:AdamW"), CFG), steps=3)
    assert curve == pytest.approx(reference[0], rel=1e-6)
    optimizer = load_swaps(Swap(optimizer="torch.optim:AdamW"), CFG).optimizer
    made = optimizer(
        [("a", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))], 0.1, (0.8, 0.9), 1e-6, 0.3
    )
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in made.param_groups] == [
        ((0.8, 0.9), 1e-6, 0.3),
        ((0.8, 0.9), 1e-6, 0.0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_keeps_every_contract(dtype) -> None:
    for cfg in (
        CFG,
        CFG.replace(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, num_experts_per_tok=1),
    ):
        load_swaps(Swap(**REFERENCE), cfg, dtype)


def test_every_layout_starts_with_the_same_numbers() -> None:
    swaps = load_swaps(Swap(attention=GOOD["attention"], router=GOOD["router"]), CFG)
    whole = Transformer(CFG, seed=5)
    swaps.apply(whole, seed=5)
    expected = whole.state_dict()
    for part in (Part(range(1), head=False), Part(range(1, 2), embed=False, experts=range(4))):
        stage = Transformer(CFG, seed=5, part=part)
        swaps.apply(stage, seed=5)
        state = {n: t for n, t in stage.state_dict().items() if ".experts." not in n}
        assert any("self_attn.k_proj" in n for n in state)
        assert [n for n, t in state.items() if not torch.equal(t, expected[n])] == []
    drawn = [expected[f"layers.{i}.self_attn.k_proj.weight"] for i in range(3)]
    assert drawn[0].std() == pytest.approx(CFG.initializer_range, rel=0.2) and not torch.equal(drawn[0], drawn[1])


def test_recompute_and_meta_are_handed_on() -> None:
    swaps = load_swaps(Swap(attention=GOOD["attention"]), CFG)
    model = Transformer(CFG, device="meta")
    model.set_recompute(True)
    swaps.apply(model)
    assert all(p.is_meta for p in model.parameters())
    assert all(block.self_attn.recompute for block in model.layers.values())
    x = tokens_for(CFG, 2, 8)
    grads = []
    for recompute in (False, True):
        model = Transformer(CFG)
        swaps.apply(model)
        model.set_recompute(recompute)
        model.losses(x).main.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["attention", "router"])
def test_text_is_sampled_without_decode(name) -> None:
    model = Transformer(CFG, seed=1)
    load_swaps(Swap(**{name: GOOD[name]}), CFG).apply(model, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    found = list(tokens(model, [3, 1, 4], 12, temperature=0))
    text = [3, 1, 4]
    for _ in range(12):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert found == text[3:] and len(set(found)) > 1


def test_initial_weights_of_vectors_biases_and_ones_own(tmp_path) -> None:
    path = file(
        tmp_path,
        """
        class Norms(MLA):
            def __init__(self, cfg, layer):
                super().__init__(cfg, layer)
                self.gain = nn.Parameter(torch.empty(cfg.hidden_size))
                self.o_bias = nn.Parameter(torch.empty(cfg.hidden_size))
            def forward(self, x, at):
                return super().forward(x, at) * self.gain + self.o_bias
            decode = None
        class Own(Norms):
            def reset_parameters(self):
                for p in self.parameters():
                    nn.init.uniform_(p, 1, 2)
        """,
    )
    model = Transformer(CFG)
    load_swaps(Swap(attention=f"{path}:Norms"), CFG).apply(model)
    attention = model.layers["1"].self_attn
    assert torch.equal(attention.gain, torch.ones(15)) and torch.equal(attention.o_bias, torch.zeros(15))
    drawn = []
    for _ in range(2):
        load_swaps(Swap(attention=f"{path}:Own"), CFG).apply(model, seed=4)
        drawn.append([model.layers[i].self_attn.gain.clone() for i in "01"])
    assert torch.equal(drawn[0][1], drawn[1][1]) and not torch.equal(drawn[0][0], drawn[0][1])
    assert drawn[0][0].min() >= 1 and drawn[0][0].max() < 2
    assert torch.equal(Transformer(CFG).lm_head.weight, model.lm_head.weight)  # nothing else drew from another place


def test_a_router_without_anything_to_learn(tmp_path) -> None:
    """By the first number's bits: nothing is trained, and nothing is asked of its gradient."""
    path = file(
        tmp_path,
        """
        class Hash(nn.Module):
            def __init__(self, cfg):
                super().__init__()
                self.cfg = cfg
            def forward(self, x):
                first = (x[:, :1].float().abs() * 1000).long() % 6
                experts = (first // 2 * 2 + torch.arange(3)) % 8  # a whole group, and one of the next
                gates = torch.full(experts.shape, 1 / 3)
                load = torch.bincount(experts.flatten(), minlength=8).float()
                return Routing(experts, gates, torch.full((len(x), 8), 1 / 8), load)
        """,
    )
    curve, _ = train(load_swaps(Swap(router=f"{path}:Hash"), CFG), steps=3)
    assert curve[2] < curve[0]


def test_a_schedule_from_a_text_file(tmp_path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("F0.0 F0.1 B0.1 B0.0\n")
    swaps = load_swaps(Swap(schedule=str(path)), CFG)
    curve, _ = train(swaps)
    assert curve[1] < curve[0]
    with pytest.raises(ValueError, match="is a schedule for 1 ranks and 2 micro-batches, wanted 1 ranks and 4"):
        swaps.schedule(1, 4)


# The optimiser behind AdamW's face ------------------------------------------------------------------------------------
def test_moments_are_adamws() -> None:
    make = load_swaps(Swap(optimizer="torch.optim:SGD"), CFG).optimizer
    with pytest.raises(ValueError, match=r"give --optim\.moments fp32"):
        make([("a", nn.Parameter(torch.ones(2)))], 0.1, moments="bf16")


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_the_optimizers_state_is_saved_and_loaded(name) -> None:
    """Two steps, the state into a new optimiser that has made none yet, a third step: as three steps in a row."""
    make = load_swaps(Swap(optimizer=GOOD["optimizer"] if name == "SGD" else f"torch.optim:{name}"), CFG).optimizer
    start, grads = torch.randn(3, 2), torch.randn(3, 3, 2)

    def fresh(at: torch.Tensor):
        p = nn.Parameter(at.clone())
        return p, make([("p", p)], 0.1)

    def step(p, optimizer, g) -> None:
        p.grad, version = g.clone(), p._version
        optimizer.step()
        assert p._version > version

    p, whole = fresh(start)
    for g in grads[:2]:
        step(p, whole, g)
    q, resumed = fresh(p.detach())
    saved, found = whole.state_of(p), resumed.state_of(q)
    assert saved.keys() == found.keys() and saved
    for key, value in saved.items():
        assert found[key].shape == value.shape and value.shape in (p.shape, ())
        found[key].copy_(value)
    step(p, whole, grads[2])
    step(q, resumed, grads[2])
    assert torch.equal(p, q)


def test_a_step_counts_as_a_change_of_the_weights(tmp_path) -> None:
    """Also where the optimiser hides it from autograd: FP8 codes made from a weight are stale then."""
    path = file(
        tmp_path,
        """
        class Quiet(torch.optim.Optimizer):
            def __init__(self, groups, lr):
                super().__init__(groups, {"lr": lr})
            def step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.data -= group["lr"] * p.grad
        """,
    )
    p = nn.Parameter(torch.ones(3))
    optimizer = load_swaps(Swap(optimizer=f"{path}:Quiet"), CFG).optimizer([("p", p)], 0.1)
    p.grad, version = torch.ones(3), p._version
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.9)) and p._version > version


# Import paths and what is remembered ---------------------------------------------------------------------------------
def test_paths_that_lead_nowhere(tmp_path) -> None:
    path = file(tmp_path, "class Mine(Router): pass")
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ny = = 2\n")
    fails = tmp_path / "fails.py"
    fails.write_text("import torch\nraise RuntimeError('not today')\n")
    for name, says in (
        ("my_router.py", "is no import path; wanted: file.py:Name or package.module:Name"),
        (f"{tmp_path}/none.py:Mine", f"there is no file {tmp_path}/none.py"),
        (f"{path}:Mien", "has no Mien; there are Mine"),
        (f"{bad}:Mine", f"{bad}, line 2: invalid syntax"),
        (f"{fails}:Mine", f"raised RuntimeError: not today ({fails}, line 2)"),
        ("no_such_package.part:Mine", "there is no module no_such_package"),
        ("dsv3_book.model.router:Ruoter", "has no Ruoter; there are Router"),
    ):
        with pytest.raises(ValueError) as caught:
            load_swaps(Swap(router=name), CFG)
        said = str(caught.value)
        assert says in said and said.startswith(f"--swap.router {name}: ") and "class Router" in said


def test_only_what_is_named_is_imported(tmp_path, monkeypatch) -> None:
    mark = tmp_path / "ran"
    path = file(tmp_path, f"open({str(mark)!r}, 'a').write('x')\nclass Mine(Router): pass")
    assert load_swaps(Swap(), CFG) == Swaps(CFG) and not mark.exists()
    same_parts({"router": {"path": f"{path}:Mine", "sha256": "0"}}, {}, tmp_path, kinds=())
    assert not mark.exists()
    monkeypatch.chdir(tmp_path)  # a path is relative to where the command is given
    swaps = load_swaps(Swap(router="mine.py:Mine"), CFG)
    load_swaps(Swap(router=f"{path}:Mine"), CFG)
    assert mark.read_text() == "x"  # and a file runs once
    source = swaps.fingerprints()["router"]
    assert source["path"] == "mine.py:Mine" and len(source["sha256"]) == 64
    path.write_text(path.read_text() + "# changed\n")
    later = load_swaps(Swap(router="mine.py:Mine"), CFG)
    assert mark.read_text() == "xx" and later.fingerprints()["router"]["sha256"] != source["sha256"]
    assert later.same_as(swaps.fingerprints(), tmp_path) == [
        f"--swap.router mine.py:Mine is not the code that {tmp_path} was trained with (mine.py:Mine)"
    ]
    assert swaps.same_as(swaps.fingerprints(), tmp_path) == []


def test_a_run_goes_on_with_the_parts_it_began_with(tmp_path) -> None:
    router = {"router": {"path": "r.py:R", "sha256": "1"}}
    with pytest.raises(
        ValueError, match=r"was trained with --swap\.router r\.py:R: give it again .*only imported when"
    ):
        same_parts(router, {}, tmp_path)
    with pytest.raises(ValueError, match=r"was trained without --swap\.router r\.py:R: leave it out"):
        same_parts({}, router, tmp_path)
    balance = {"balance": {"path": "b.py:b", "sha256": "1"}}
    assert same_parts(balance, {}, tmp_path) == [f"{tmp_path} was trained with --swap.balance b.py:b so far"]
    optimizer = {"optimizer": {"path": "o.py:o", "sha256": "1"}}
    assert same_parts(router | optimizer, router, tmp_path, ("attention", "router"))  # to write text: a note


def test_a_model_that_is_only_read_needs_its_attention_and_router(tmp_path) -> None:
    before = load_swaps(Swap(**GOOD), CFG).fingerprints()
    swaps, notes = swaps_to_read(Swap(**GOOD), CFG, before, tmp_path)
    assert swaps.sources.keys() == {"attention", "router"} and notes == []
    with pytest.raises(ValueError, match=r"was trained with --swap\.router .*:SoftmaxRouter: give it again"):
        swaps_to_read(Swap(attention=GOOD["attention"]), CFG, before, tmp_path)
    with pytest.raises(ValueError, match=r"was trained without --swap\.router .*: leave it out"):
        swaps_to_read(Swap(router=GOOD["router"]), CFG, {}, tmp_path)
    assert swaps_to_read(Swap(), CFG, {"optimizer": before["optimizer"]}, tmp_path) == (Swaps(CFG), [])


def test_a_class_of_a_package_is_known_by_its_own_file() -> None:
    swaps = load_swaps(Swap(optimizer="torch.optim:SGD"), CFG)
    other = load_swaps(Swap(optimizer="torch.optim:Adam"), CFG)
    assert swaps.fingerprints()["optimizer"]["path"] == "torch.optim:SGD"
    assert swaps.fingerprints()["optimizer"]["sha256"] != other.fingerprints()["optimizer"]["sha256"]


def test_mla_is_still_what_it_was() -> None:
    model = Transformer(CFG)
    load_swaps(Swap(router=GOOD["router"]), CFG).apply(model)
    assert all(isinstance(block.self_attn, MLA) for block in model.layers.values())
    assert not hasattr(model.layers["1"].self_attn, "inputs")
