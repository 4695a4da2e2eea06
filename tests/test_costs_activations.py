"""Bytes kept for backward: the closed form against every byte that is alive after a real forward, to the last one."""

import itertools
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsv3_book.config import ModelConfig
from dsv3_book.costs_activations import (
    ATTENTION_OUTPUT,
    AVOIDABLE,
    HEAD_GRADIENT,
    Numbers,
    kept_by_ends,
    kept_by_layer,
    owed_by_layer,
)
from dsv3_book.fp8.layers import use_fp8
from dsv3_book.model import Transformer, ops
from dsv3_book.model.attention import KEEP
from dsv3_book.model.experts import Experts
from dsv3_book.model.grouped import grouped_linear
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import make_mesh
from dsv3_book.parallel.two_hop import TwoHop
from dsv3_book.pipeline.overlap import Run
from dsv3_book.pipeline.stage import Chunk, LossWeights

TINY = ModelConfig.preset("tiny").replace(max_position_embeddings=4096)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = {
    "one MoE layer": TINY.replace(num_hidden_layers=2, num_nextn_predict_layers=0),
    "MTP": TINY.replace(num_hidden_layers=2),
    "no query compression": TINY.replace(num_hidden_layers=2, q_lora_rank=None, n_shared_experts=2),
    "no shared experts": TINY.replace(
        num_hidden_layers=1, first_k_dense_replace=0, n_shared_experts=0, num_nextn_predict_layers=2
    ),
    "gates as they are": TINY.replace(num_hidden_layers=2, norm_topk_prob=False),
}


class Alive(TorchDispatchMode):
    """Follows every storage that is made, whoever holds it, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return out

    def bytes(self, ignore: set[int]) -> int:
        alive = [(ref(), size) for ref, size in self.storages.values()]
        return sum(size for storage, size in alive if storage is not None and storage.data_ptr() not in ignore)


def on_a_gpu(x, scale, counts, gate, up, down):
    """The way `grouped_swiglu` goes there."""
    h = ops.swiglu(grouped_linear(x, gate, counts), grouped_linear(x, up, counts)) * scale.to(x.dtype)[:, None]
    return grouped_linear(h, down, counts)


def measured(cfg: ModelConfig, numbers: Numbers, T: int, dispatch=None) -> tuple[int, int]:
    """Bytes alive after a whole model's forward, and bytes owed after its input gradients."""
    dtype = DTYPES[numbers.weights]
    model = Transformer(cfg, dtype=dtype, compute_dtype=DTYPES[numbers.dtype])
    model.set_recompute(numbers.recompute)
    if numbers.fp8:
        use_fp8(model)
    tokens = torch.randint(0, cfg.vocab_size, (1, T + 1 + cfg.num_nextn_predict_layers))
    weights = LossWeights.of(1, 0.3, cfg.num_nextn_predict_layers, torch.device("cpu"))
    if numbers.fp8:  # makes the codes of the weights, which are not activations
        first = Chunk(model, tokens, model.dispatch, None)
        Run(first.forward(None)).finish()
        Run(first.backward(None, weights, now=True)).finish()
    ignore = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with Alive() as alive:
        chunk = Chunk(model, tokens, dispatch or model.dispatch, None)
        Run(chunk.forward(None)).finish()
    kept = alive.bytes(ignore)
    Run(chunk.backward(None, weights, now=False)).finish()
    return kept, chunk.store.bytes()


def predicted(cfg: ModelConfig, numbers: Numbers, T: int) -> Counter[str]:
    found = kept_by_ends(cfg, T, numbers, embedding=True, head=True)
    for index in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        found += kept_by_layer(cfg, index, T, numbers)
    return found


def on_a_cpu(cfg: ModelConfig, numbers: Numbers, T: int) -> float:
    """What attention keeps there instead of its output: probabilities, of short sequences; and o_proj's input, which on
    a GPU is that output, but where it is kept in FP8."""
    H, layers = cfg.num_attention_heads, cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    p = sum(min(64, T - a) * min(a + 64, T) for a in range(0, T, 64)) if T <= KEEP else 0
    o = 0 if numbers.fp8 else T * cfg.v_head_dim
    return layers * H * (p + o) * numbers.size


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_alive_is_accounted_for(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts, "product", staticmethod(on_a_gpu))
    cfg = SHAPES[shape]
    for dtype, fp8, recompute in itertools.product(DTYPES, (True, False), (True, False)):
        for T in (24, 80):
            numbers = Numbers(dtype, fp8, recompute)
            want = predicted(cfg, numbers, T)
            del want[ATTENTION_OUTPUT]
            kept, _ = measured(cfg, numbers, T)
            assert kept == sum(want.values()) + on_a_cpu(cfg, numbers, T), (numbers, T, want)


def test_weights_in_bf16_need_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts, "product", staticmethod(on_a_gpu))
    cfg, T = SHAPES["MTP"], 24
    numbers = Numbers("bf16", False, True, weights="bf16")
    want = predicted(cfg, numbers, T)
    assert not want["copies of weights"]
    del want[ATTENTION_OUTPUT]
    assert measured(cfg, numbers, T)[0] == sum(want.values()) + on_a_cpu(cfg, numbers, T)


def test_a_long_sequence_and_what_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond KEEP tokens attention keeps no probabilities. Tiles of 128 tokens are nearly full then, so that what is
    owed between I and W is near its closed form."""
    monkeypatch.setattr(Experts, "product", staticmethod(on_a_gpu))
    cfg, T = SHAPES["MTP"], 1024
    for numbers in (Numbers(), Numbers(fp8=False), Numbers("fp32", False, False)):
        want = predicted(cfg, numbers, T)
        del want[ATTENTION_OUTPUT]
        kept, owed = measured(cfg, numbers, T)
        assert kept == sum(want.values()) + on_a_cpu(cfg, numbers, T)
        assert sum(owed_by_layer(cfg, i, T, numbers) for i in range(3)) == pytest.approx(owed, rel=0.02)


def test_tables_of_an_all_to_all() -> None:
    """Of one process with itself; its tables of numbers are the only difference, and about as long as said."""
    cfg, T, numbers = SHAPES["one MoE layer"], 1024, Numbers()
    E = cfg.n_routed_experts
    ways = [None, AllToAll(None, E, fp8=True), TwoHop(make_mesh(), E, fp8=True)]
    found = [measured(cfg, numbers, T, way)[0] for way in ways]
    said = [kept_by_layer(cfg, 1, T, numbers, hops)["routing tables"] for hops in (0, 1, 2)]
    for hops in (1, 2):
        assert found[hops] - found[0] == pytest.approx(said[hops] - said[0], rel=0.05)


def test_a_layer_of_v3_by_hand() -> None:
    """Report, §3.3.3: inputs of products in FP8, with a scale for each 128 numbers; E5M6 after attention."""
    cfg = ModelConfig.preset("v3-671b")
    kept = kept_by_layer(cfg, 10, 4096, hops=2, experts=4)
    per_token = {name: size / 4096 for name, size in kept.items()}
    assert per_token["routed experts"] == 8 * (7168 + 4 * 56 + 2 * (2048 + 4 * 16))
    assert per_token["o_proj's input in E5M6"] == 1.5 * 16384 + 4 * 128
    assert per_token["residual stream"] == 2 * 2 * 7168
    assert sum(kept.values()) == pytest.approx(0.7805e9, rel=1e-3)
    assert sum(size for name, size in kept.items() if name not in AVOIDABLE) == pytest.approx(0.6441e9, rel=1e-3)
    ends = kept_by_ends(cfg, 4096, head=True)
    assert ends[HEAD_GRADIENT] == 2 * 129280 * 7168 * 4
    assert kept_by_ends(cfg, 4096, Numbers(weights="bf16"), head=True)[HEAD_GRADIENT] == ends[HEAD_GRADIENT] / 2
    assert kept_by_ends(cfg, 4096)[HEAD_GRADIENT] == 0


def test_what_could_be_done_without() -> None:
    assert Numbers().avoidable == list(AVOIDABLE)
    assert Numbers(fp8=False).avoidable == [HEAD_GRADIENT]
