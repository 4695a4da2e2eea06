"""A run's checkpoint to the released format, and from there into any layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv3_book.interop as interop
from dsv3_book import checkpoint, export, generate
from dsv3_book import fill as filling
from dsv3_book.config import ModelConfig
from dsv3_book.data import Tokenizer
from dsv3_book.interop import fill, load_pretrained, save_pretrained
from dsv3_book.model import Transformer
from dsv3_book.model.transformer import Part
from dsv3_book.parallel import DataParallel
from dsv3_book.slab import Slab, Value

CFG = ModelConfig.preset("tiny").replace(
    hidden_size=24, num_hidden_layers=3, vocab_size=300, num_nextn_predict_layers=1, first_k_dense_replace=1
)
E = CFG.n_routed_experts


def made(seed: int) -> Transformer:
    model = Transformer(CFG, seed=seed)
    for i, (_, router) in enumerate(model.routers()):
        router.e_score_correction_bias.copy_(torch.linspace(-1, 1, E) * 0.0007 + i)
    return model


def rows(tensor: Tensor, begin: int, end: int) -> Slab:
    return Slab(tensor[begin:end].detach().clone(), tuple(tensor.shape), (begin,) + (0,) * (tensor.dim() - 1))


def flat(tensor: Tensor, begin: int, end: int | None) -> Slab:
    return Slab(tensor.detach().flatten()[begin:end].clone(), (tensor.numel(),), (begin,))


@pytest.fixture(scope="module")
def weights() -> Transformer:
    return made(1)


@pytest.fixture(scope="module")
def average() -> Transformer:
    return made(2)


@pytest.fixture(scope="module")
def run(weights: Transformer, average: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ranks that share experts and ZeRO-1 shards leave it."""
    folder = tmp_path_factory.mktemp("run")
    values: dict[str, Value] = {}
    for name, tensor in weights.state_dict().items():
        experts = [rows(tensor, 0, 3), rows(tensor, 3, E)]
        values[f"model.{name}"] = experts if ".experts." in name else tensor
    for name, parameter in average.named_parameters():
        half = parameter.numel() // 2
        values[f"ema.{name}"] = [flat(parameter, 0, half), flat(parameter, half, None)]
    state = {"config": {"model": json.loads(json.dumps(CFG.__dict__, default=vars))}}
    checkpoint.save(folder / "checkpoints", 7, values, state, DataParallel())
    Tokenizer.train(["a few words"] * 3, 300).save(folder)
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


# Out ------------------------------------------------------------------------------------------------------------------
def test_a_run_goes_out_and_comes_back_bit_for_bit(run, weights, average, tmp_path, capsys) -> None:
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "w")]) == 0
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'w'}: weights after step 7 (config.json, model.safetensors, tokenizer.json)\n"
    assert same(load_pretrained(tmp_path / "w"), weights)
    (tmp_path / "empty").mkdir()
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "empty"), "--ema"]) == 0
    assert "average of weights after step 7" in capsys.readouterr().out
    back, biases = load_pretrained(tmp_path / "empty"), dict(weights.named_buffers())
    for name, value in back.state_dict().items():
        assert torch.equal(value, biases.get(name, average.state_dict()[name])), name
    assert same(generate.load(tmp_path / "w")[0], generate.load(run)[0])


def test_in_fp8_as_v3_was_released(run, weights, tmp_path) -> None:
    export.export(run, tmp_path / "c", fp8=True)
    save_pretrained(weights, tmp_path / "d", fp8=True)
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in "cd")
    assert one.keys() == other.keys() and any(name.endswith("_scale_inv") for name in one)
    assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one if one[n].dim())


def test_nothing_is_overwritten_and_nothing_half_written(run, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for there in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        assert export.main(["--checkpoint", str(run), "--out", str(there)]) == 2
        assert capsys.readouterr().err == f"error: {there} is there already, and not an empty folder: name a new one\n"

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(interop, "write_json", full_disk)  # after the weights
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_runs_that_cannot_go_out(run, tmp_path, capsys) -> None:
    words = lambda where, *more: ["--checkpoint", str(where), "--out", str(tmp_path / "out"), *more]
    assert export.main(words(tmp_path)) == 2
    assert "has no checkpoint yet: train at least to the first one" in capsys.readouterr().err
    plain = tmp_path / "plain"
    values = {f"model.{name}": value for name, value in made(1).state_dict().items()}
    state = {"config": {"model": json.loads(json.dumps(CFG.__dict__, default=vars))}}
    checkpoint.save(plain / "checkpoints", 1, values, state, DataParallel())
    assert export.main(words(plain, "--ema")) == 2
    assert "holds no average of the weights: leave out --ema" in capsys.readouterr().err
    assert export.main(words(plain)) == 2
    assert "tokenizer.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# In -------------------------------------------------------------------------------------------------------------------
def zeros(model: Transformer, begin: int, end: int) -> dict[str, Value]:
    """Places for what a rank holds: of `model`'s experts some, the rest whole."""
    return {
        name: rows(torch.zeros_like(t), begin, end) if ".experts." in name else torch.zeros_like(t)
        for name, t in model.state_dict().items()
    }


def filled(values: dict[str, Value], model: Transformer, begin: int, end: int) -> bool:
    expected = model.state_dict()
    return all(
        torch.equal(v.tensor, expected[n][begin:end]) if isinstance(v, Slab) else torch.equal(v, expected[n])
        for n, v in values.items()
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_a_released_folder_fills_any_layout(weights, tmp_path, shard_bytes) -> None:
    save_pretrained(weights, tmp_path, shard_bytes=shard_bytes)
    parts = [Part(range(3)), Part(range(1), head=False), Part(range(1, 2), embed=False, head=False)]
    for part in [*parts, Part(range(2, 3), embed=False)]:
        stage = Transformer(CFG, part=part)
        for begin, end in ((0, E), (0, 2), (2, 7), (E - 1, E)):
            values = zeros(stage, begin, end)
            fill(values, tmp_path)
            assert filled(values, weights, begin, end)


def test_a_run_goes_out_and_fills_another_range_of_experts(run, weights, tmp_path) -> None:
    export.export(run, tmp_path / "out")
    values = zeros(weights, 1, 6)
    fill(values, tmp_path / "out")
    assert filled(values, weights, 1, 6)


def test_from_fp8_and_bf16_come_the_values_that_loading_gives(weights, tmp_path) -> None:
    save_pretrained(weights, tmp_path / "8", fp8=True, shard_bytes=30_000)
    save_pretrained(weights, tmp_path / "16", dtype=torch.bfloat16)
    for folder in (tmp_path / "8", tmp_path / "16"):
        values = zeros(weights, 2, 5)
        fill(values, folder)
        assert filled(values, load_pretrained(folder, dtype=torch.float32), 2, 5)


def test_several_boxes_and_pieces_of_rows(weights, tmp_path) -> None:
    save_pretrained(weights, tmp_path)
    name, whole = "layers.1.mlp.experts.up_proj", weights.layers["1"].mlp.experts.up_proj.detach()
    corner = Slab(torch.zeros(2, 3, 4), tuple(whole.shape), (1, 2, 5))
    matrix = Slab(torch.zeros(7, 24), (300, 24), (20, 0))
    fill({name: [corner, rows(torch.zeros_like(whole), 5, 6)], "lm_head.weight": matrix}, tmp_path)
    assert torch.equal(corner.tensor, whole[1:3, 2:5, 5:9])
    assert torch.equal(matrix.tensor, weights.lm_head.weight[20:27])


def test_only_what_is_needed_is_read(weights, tmp_path, monkeypatch) -> None:
    save_pretrained(weights, tmp_path, shard_bytes=30_000)
    seen: list[str] = []
    original = filling.read
    monkeypatch.setattr(filling, "read", lambda file, name, path: seen.append(name) or original(file, name, path))
    fill({"layers.2.mlp.experts.down_proj": rows(torch.zeros(E, 24, CFG.moe_intermediate_size), 3, 5)}, tmp_path)
    assert sorted(seen) == [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in (3, 4)]


def test_what_does_not_fit_is_listed_in_one_error(weights, tmp_path) -> None:
    save_pretrained(weights, tmp_path)
    shape = weights.layers["1"].mlp.experts.up_proj.shape
    wrong = {
        "layers.9.input_layernorm.weight": torch.zeros(24),
        "norm.weight": torch.zeros(25),
        "layers.1.mlp.experts.up_proj": rows(torch.zeros(E - 1, *shape[1:]), 0, 2),
        "layers.1.mlp.experts.gate_proj": rows(torch.zeros(E + 1, *shape[1:]), E, E + 1),
    }
    with pytest.raises(ValueError) as caught:
        fill(wrong, tmp_path)
    for piece in (
        f"2 missing: model.layers.9.input_layernorm.weight, model.layers.1.mlp.experts.{E}.gate_proj.weight",
        "model.norm.weight is [24], not [25]",
        f"layers.1.mlp.experts.up_proj has more than {E - 1} experts",
        "Give the model the settings of its config.json",
    ):
        assert piece in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        fill(wrong, tmp_path / "nowhere")


def test_copies_that_differ_are_an_error(weights, tmp_path) -> None:
    save_pretrained(weights, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.shared_head.head.weight"].add_(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fill({"embed_tokens.weight": torch.zeros(300, 24)}, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.3\.shared_head\.head\.weight differs from lm_head\.weight"):
        fill({"lm_head.weight": torch.zeros(300, 24)}, tmp_path)
