"""Whole models in FP8: which modules, close to the unquantised model, and in every setting the model knows."""

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from layerkit import size

from dsv3_book.config import ModelConfig
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU
from dsv3_book.inference.cache import LatentCache
from dsv3_book.model import Transformer, ops
from dsv3_book.model.experts import Experts
from dsv3_book.model.transformer import Part

TINY = ModelConfig.preset("tiny").replace(initializer_range=0.05)
T = 24


def tokens(cfg, seed=0):
    width = T + 1 + cfg.num_nextn_predict_layers
    return torch.randint(cfg.vocab_size, (2, width), generator=torch.Generator().manual_seed(seed))


def step(model):
    """The three losses and all gradients."""
    model.zero_grad(set_to_none=True)
    losses = model.losses(tokens(model.cfg))
    (losses.main + losses.mtp + losses.balance).backward()
    return torch.stack(losses[:3]), {n: p.grad for n, p in model.named_parameters()}


def pair(cfg=TINY, **kwargs):
    """The same model without and with FP8."""
    plain, fp8 = Transformer(cfg, seed=1, **kwargs), Transformer(cfg, seed=1, **kwargs)
    use_fp8(fp8)
    return plain, fp8


def test_which_weights_are_in_fp8():
    """The report's list: all matrices but embedding, head, router and MTP's eh_proj."""
    model = Transformer(TINY.replace(num_nextn_predict_layers=2))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    names = use_fp8(model)
    assert len(set(names)) == len(names)
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1}
    high = {n for n in matrices if n.split(".")[-2] in ("embed_tokens", "lm_head", "gate", "eh_proj")}
    assert len(high) == 2 + 2 + (TINY.num_hidden_layers - TINY.first_k_dense_replace + 2)
    assert set(names) == matrices - high
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    for name, module in model.named_modules():
        if isinstance(module, ops.Linear) and f"{name}.weight" in high:
            assert module.product is ops.linear
        if name.endswith("o_proj"):
            assert module.product.after_attention
        elif name.endswith(("q_b_proj", "kv_a_proj_with_mqa")):
            assert isinstance(module.product, Fp8Linear) and not module.product.after_attention


def test_no_product_is_shared_between_modules_or_models():
    plain, model = pair()
    kinds = (ops.Linear, ops.SwiGLU, Experts)
    products = [m.product for m in model.modules() if isinstance(m, kinds) and "product" in vars(m)]
    assert len({id(p) for p in products}) == len(products) == 5 * 5 + 1 + 4 * 2
    assert all("product" not in vars(m) for m in plain.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0, "num_nextn_predict_layers": 2}])
def test_losses_and_gradients_are_close(dtype, changes):
    """Within 1 % of the losses, and the gradient of all weights together points the same way (cosine 0.95)."""
    plain, fp8 = pair(TINY.replace(**changes), compute_dtype=dtype)
    (losses, grads), (losses8, grads8) = step(plain), step(fp8)
    torch.testing.assert_close(losses8, losses, rtol=0.01, atol=1e-6)
    assert not torch.equal(losses8, losses)
    a, b = (torch.cat([g.flatten() for g in side.values()]) for side in (grads, grads8))
    assert b.isfinite().all() and all(g.dtype == torch.float32 for g in grads8.values())
    assert torch.cosine_similarity(a, b, dim=0) > 0.95
    assert 0.9 < b.norm() / a.norm() < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [48, None])
def test_recomputing_changes_nothing_and_keeps_less(dtype, rank):
    _, model = pair(TINY.replace(q_lora_rank=rank), compute_dtype=dtype)
    losses, grads = step(model)
    model.set_recompute(True)
    again, again_grads = step(model)
    assert torch.equal(losses, again) and not ops.recomputed.active
    assert all(torch.equal(grads[n], again_grads[n]) for n in grads)


def bytes_kept(model, monkeypatch):
    """What a forward pass leaves for backward, without the parameters themselves."""
    saved = []
    pack = ops.recomputed._pack

    def watched(self, t):
        packed = pack(self, t)
        if isinstance(packed, torch.Tensor):
            saved.append(packed)
        return packed

    with (
        monkeypatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        patch.setattr(ops.recomputed, "_pack", watched)
        model.losses(tokens(model.cfg))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return size([t for t in saved if t.untyped_storage().data_ptr() not in own])


def test_fp8_keeps_fewer_bytes(monkeypatch):
    """A whole step's, in fp32 and bf16, with and without recomputation; and recomputed norms are not kept as codes."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for recompute in (False, True):
            for name, model in zip(("plain", "fp8"), pair(compute_dtype=dtype)):
                model.set_recompute(recompute)
                figures[dtype, recompute, name] = bytes_kept(model, monkeypatch)
    for (dtype, recompute, name), figure in figures.items():
        if name == "fp8":
            assert figure < 0.8 * figures[dtype, recompute, "plain"]
        if recompute:
            assert figure < 0.95 * figures[dtype, False, name]
    _, model = pair()
    model.set_recompute(True)
    block = model.layers["0"]
    x = torch.randn(2, T, TINY.hidden_size, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with ops.recomputed(block.input_layernorm, x) as h:
            assert ops.recomputed.covers(h) and ops.recomputed.covers(h[0]) and not ops.recomputed.covers(x)
            block.self_attn.q_a_proj(h)
            with ops.recomputed(torch.neg, x):
                assert not ops.recomputed.covers(h)  # only the innermost block's hooks see what is saved
    assert all(t.dtype != torch.float8_e4m3fn for t in saved)


def test_a_copied_model_is_on_its_own():
    _, model = pair()
    step(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)
    fresh = Transformer(TINY)
    fresh.load_state_dict(copied.state_dict())
    use_fp8(fresh)
    assert torch.equal(step(copied)[0], step(fresh)[0])
    assert not torch.equal(step(copied)[0], step(model)[0])


def test_a_saved_model_forgets_its_codes():
    """They could not be told from stale ones: a loaded parameter counts its changes from zero."""
    _, model = pair()
    with torch.no_grad():
        model.layers["0"].self_attn.o_proj.weight.mul_(1.5)
    right = step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    caches = [m.product.cache for m in loaded.modules() if isinstance(getattr(m, "product", None), Fp8Linear)]
    assert caches and all(cache.seen is None for cache in caches)
    assert torch.equal(step(loaded)[0], right[0])


def test_a_loaded_state_is_seen():
    _, model = pair()
    other = Transformer(TINY, seed=2)
    step(model)
    model.load_state_dict(other.state_dict())
    use_fp8(other)
    assert torch.equal(step(model)[0], step(other)[0])


@pytest.mark.parametrize("rank", [48, None])
def test_decoding_in_fp8_is_close_to_forward(rank):
    """Not equal: the absorbed form uses W_UK and W_UV as they are."""
    _, model = pair(TINY.replace(q_lora_rank=rank))
    cache, text = LatentCache(model.cfg, 2, T), tokens(TINY)[:, :T]
    decoded = torch.cat([model.decode(t, cache) for t in text.split([9, 1, 1, T - 11], dim=1)], 1)
    with torch.inference_mode():
        logits = model(text)
    assert ((decoded - logits).norm() / logits.norm()) < 0.1
    assert model.layers["0"].self_attn.o_proj.product.cache.quantised._transposed is None  # it is for backward


def test_parts_of_a_pipeline_compute_what_the_whole_does():
    _, whole = pair()
    stages = [
        Transformer(TINY, 1, part=Part(range(2), head=False)),
        Transformer(TINY, 1, part=Part(range(2, 4), embed=False)),
    ]
    for stage in stages:
        assert use_fp8(stage)
    text = tokens(TINY)
    x, first = stages[0].run_blocks(stages[0].embed(text[:, :T]))
    x, second = stages[1].run_blocks(x)
    losses = stages[1].head_losses(x, text, first + second)
    assert torch.equal(torch.stack(losses[:3]), step(whole)[0])


def test_any_module_can_be_given():
    mlp = ops.SwiGLU(16, 24)
    assert use_fp8(mlp) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert isinstance(mlp.product, Fp8SwiGLU)
    assert use_fp8(ops.RMSNorm(4)) == []
    assert use_fp8(Transformer(TINY, device="meta")) == use_fp8(Transformer(TINY))


def in_a_process_of_its_own(code):
    """Runs code without this session's type checks; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_without_a_break():
    in_a_process_of_its_own("""
        import torch
        from dsv3_book.fp8.experts import Fp8Experts
        from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU

        experts, counts = Fp8Experts(), torch.tensor([5, 0, 4])
        for layer, *shapes in (
            (Fp8Linear(), (9, 70), (50, 70)),
            (Fp8Linear(after_attention=True), (9, 70), (50, 70)),
            (Fp8SwiGLU(), (9, 70), (50, 70), (50, 70), (70, 50)),
            (lambda x, g, *w: experts(x, g, counts, *w), (9, 70), (9,), (3, 50, 70), (3, 50, 70), (3, 70, 50)),
        ):
            given = [torch.randn(shape, requires_grad=True) for shape in shapes]
            answers = []
            for fn in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
                y = fn(*given)
                answers.append((y, *torch.autograd.grad(y.square().sum(), given)))
            assert all(torch.equal(a, b) for a, b in zip(*answers))
    """)


def test_without_triton():
    """A step through every FP8 layer on a machine that has no Triton."""
    printed = in_a_process_of_its_own("""
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name="triton")

        sys.meta_path.insert(0, NoTriton())
        import torch
        from dsv3_book.config import ModelConfig
        from dsv3_book.fp8.layers import use_fp8
        from dsv3_book.model import Transformer

        model = Transformer(ModelConfig.preset("tiny"))
        use_fp8(model)
        losses = model.losses(torch.arange(2 * 18).view(2, 18) % model.cfg.vocab_size)
        (losses.main + losses.mtp).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert "triton" not in sys.modules
        try:
            import dsv3_book.fp8.kernels
        except ImportError as error:
            print(error)
    """)
    assert "riton" in printed
