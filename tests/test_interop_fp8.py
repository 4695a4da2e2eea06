"""Checkpoints in FP8 as V3 was released: which tensors, which bits, what is said about scales that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv3_book.interop as interop
from dsv3_book.config import ModelConfig
from dsv3_book.interop import load_pretrained, save_pretrained
from dsv3_book.model import Transformer

# Several blocks along some axes, and a short last one along all of them.
CFG = ModelConfig.preset("tiny").replace(
    hidden_size=200, num_hidden_layers=2, vocab_size=40, q_lora_rank=130, kv_lora_rank=140, intermediate_size=260
)
DOWN = "model.layers.0.mlp.down_proj.weight"
QUANTISED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CFG, seed=3)
    with torch.no_grad():
        model.layers["0"].mlp.down_proj.weight[0, 0] = 30.0  # an outlier, felt by its own block alone
    for i, (_, router) in enumerate(model.routers()):
        router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8) * 0.0007 + i)
    return model


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "c", fp8=True)
    return tmp_path / "c"


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """code · scale, block by block."""
    out = torch.zeros(codes.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            out[block] = codes.float()[block] * scale[i, j].item()
    return out


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


# What is written -----------------------------------------------------------------------------------------------------
def test_which_tensors_are_in_fp8_and_in_what_the_others(model, folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")]
            assert weight.dtype == torch.float8_e4m3fn and tensor.dtype == torch.float32
            assert tensor.shape == tuple(-(-n // 128) for n in weight.shape), name
        elif name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.float32
        else:
            matrix = name.split(".")[-2]
            assert tensor.dtype == (torch.float8_e4m3fn if matrix in QUANTISED else torch.bfloat16), name
    assert sum(name.endswith("_scale_inv") for name in tensors) == 3 * 5 + 3 + 2 * 3 * 9
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_every_block_has_a_scale_of_its_own_that_brings_its_largest_to_448(model, folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight, codes, scale = model.layers["0"].mlp.down_proj.weight, tensors[DOWN], tensors[DOWN + "_scale_inv"]
    assert codes.shape == (200, 260) and scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scale[i, j] == weight[block].abs().max() / 448
            assert codes[block].float().abs().max() == 448
    assert scale[0, 0] > 100 * scale[1, 1]
    error = (dequantised(codes, scale) - weight).abs()
    assert (error <= weight.abs() / 16 + 2.0**-10 * scale.max()).all()  # half of E4M3's last place
    assert (error[128:] <= weight[128:].abs() / 16 + 2.0**-10 * scale[1].max()).all()


def test_the_files_are_half_as_large(model, tmp_path) -> None:
    for name, fp8 in (("fp8", True), ("bf16", False)):
        save_pretrained(model, tmp_path / name, fp8=fp8, dtype=None if fp8 else torch.bfloat16)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("fp8", "bf16")}
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    codes = sum(t.numel() for t in tensors.values() if t.dtype == torch.float8_e4m3fn)
    scales = sum(t.nbytes for name, t in tensors.items() if name.endswith("_scale_inv"))
    assert sizes["bf16"] - sizes["fp8"] == pytest.approx(codes - scales, rel=0.02)
    assert scales < 0.003 * codes


# What is read --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_loaded_weight_is_code_times_scale(folder, dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    loaded = load_pretrained(folder, dtype=dtype)
    dtype = dtype or torch.bfloat16
    assert loaded.compute_dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}
    for name, parameter in loaded.named_parameters():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        if ".experts." in name:
            stem, _, matrix = theirs.rpartition(".")
            names = [f"{stem}.{e}.{matrix}.weight" for e in range(8)]
        else:
            names = [theirs]
        for row, n in zip(parameter if len(names) > 1 else parameter[None], names, strict=True):
            t = tensors[n]
            expected = dequantised(t, tensors[n + "_scale_inv"]) if n + "_scale_inv" in tensors else t
            assert torch.equal(row, expected.to(dtype)), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_what_was_loaded_keeps_every_code_and_settles(folder, tmp_path, dtype) -> None:
    """The codes are the same. A scale, which is computed again from the block's largest value after that value was
    rounded, moves by that rounding at most, once: from then on the files are the same byte for byte."""
    saves = [load_file(folder / "model.safetensors")]
    for name in ("second", "third"):
        before = folder if name == "second" else tmp_path / "second"
        save_pretrained(load_pretrained(before, dtype=dtype), tmp_path / name, fp8=True)
        saves.append(load_file(tmp_path / name / "model.safetensors"))
    first, second, third = saves
    most = 2.0**-23 if dtype == torch.float32 else 2.0**-8
    for name, tensor in first.items():
        if name.endswith("_scale_inv"):
            torch.testing.assert_close(second[name], tensor, rtol=most, atol=0)
        else:
            assert torch.equal(bits(second[name]), bits(tensor)), name
        assert torch.equal(bits(third[name]), bits(second[name])), name
    assert (tmp_path / "third/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_a_bf16_model_comes_back_with_the_same_bytes_at_once(model, tmp_path) -> None:
    """Its blocks' largest values are bf16 numbers, so reading loses nothing that the scales are computed from."""
    save_pretrained(model, tmp_path / "plain", dtype=torch.bfloat16)
    save_pretrained(load_pretrained(tmp_path / "plain"), tmp_path / "a", fp8=True)
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b", fp8=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_loaded_model_computes_what_the_dequantised_one_does(model, folder) -> None:
    loaded = load_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, original = loaded(tokens), model(tokens)
    assert 1e-4 < (logits - original).norm() / original.norm() < 0.1
    losses = loaded.losses(tokens)
    (losses.main + losses.mtp + losses.balance).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_shards_keep_a_weight_and_its_scales_together_and_other_cuts_are_read(model, folder, tmp_path) -> None:
    save_pretrained(model, tmp_path / "s", fp8=True, shard_bytes=60_000)
    index = json.loads((tmp_path / "s/model.safetensors.index.json").read_text())
    where, tensors = index["weight_map"], load_file(folder / "model.safetensors")
    assert where.keys() == tensors.keys() and len(set(where.values())) > 3
    assert all(where[n] == where[n.removesuffix("_scale_inv")] for n in where)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in where.items():
        with safe_open(tmp_path / "s" / file, "pt") as f:
            assert torch.equal(bits(f.get_tensor(name)), bits(tensors[name]))

    # Somebody else's cut: all scales in a file of their own.
    scales = {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
    rest = {name: t for name, t in tensors.items() if name not in scales}
    save_file(rest, folder / "model-00001-of-00002.safetensors")
    save_file(scales, folder / "model-00002-of-00002.safetensors")
    split = {name: f"model-0000{1 + (name in scales)}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    expected = load_pretrained(tmp_path / "s").state_dict()
    assert all(torch.equal(expected[name], t) for name, t in load_pretrained(folder).state_dict().items())


def test_some_weights_may_stay_in_bf16(folder) -> None:
    def without(tensors) -> None:
        tensors[DOWN] = dequantised(tensors[DOWN], tensors.pop(DOWN + "_scale_inv")).bfloat16()

    before = load_pretrained(folder).state_dict()
    rewrite(folder, without)
    assert all(torch.equal(before[name], t) for name, t in load_pretrained(folder).state_dict().items())


def test_mtp_may_be_left_out(model, folder) -> None:
    assert not load_pretrained(folder, mtp=False).mtp_modules()


# What does not fit ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(DOWN + "_scale_inv"), rf"1 FP8 weights lack their scales: {DOWN}_scale_inv"),
        (lambda t: t.pop(DOWN), rf"1 scales without an FP8 weight: {DOWN}_scale_inv"),
        (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), rf"1 scales without an FP8 weight: {DOWN}_scale_inv"),
        (
            lambda t: t.update({DOWN + "_scale_inv": torch.ones(3, 2)}),
            rf"{DOWN}_scale_inv is F32 \[3, 2\], not F32 \[2, 3\], for a weight \[200, 260\]",
        ),
        (lambda t: t.update({DOWN + "_scale_inv": torch.ones(1)}), r"is F32 \[1\], not F32 \[2, 3\]"),
        (lambda t: t.update({DOWN + "_scale_inv": torch.ones(2, 3).bfloat16()}), r"is BF16 \[2, 3\], not F32 \[2, 3\]"),
        (lambda t: t.update({DOWN: t[DOWN].float().to(torch.float8_e5m2)}), rf"{DOWN} is of type F8_E5M2; weights may"),
        (
            lambda t: t.update(
                {"model.layers.9.x.weight": t[DOWN].clone(), "model.layers.9.x.weight_scale_inv": torch.ones(2, 3)}
            ),
            r"1 unknown: model\.layers\.9\.x\.weight",
        ),
        (lambda t: t.update({DOWN: t[DOWN][:, :257].contiguous()}), r"of the wrong shape: .* is \[200, 257\], not"),
    ],
)
def test_scales_that_do_not_fit(folder, change, said) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=said):
        load_pretrained(folder)


def test_all_scales_missing_is_one_error(folder) -> None:
    rewrite(folder, lambda t: [t.pop(n) for n in [*t] if n.endswith("_scale_inv")])
    with pytest.raises(ValueError, match=r"72 FP8 weights lack their scales: .* and 60 more"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "other",
    [{"weight_block_size": [64, 64]}, {"quant_method": "bitsandbytes"}, {"fmt": "e5m2"}, {"quant_method": "gptq"}],
)
def test_other_quantisations_are_refused(folder, other) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= other
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"quantization_config {{'{next(iter(other))}': .*only .* can be read"):
        load_pretrained(folder)


def test_a_save_that_fails_leaves_what_was_there(model, folder, monkeypatch) -> None:
    before = (folder / "model.safetensors").read_bytes()
    calls = []

    def broken(w):
        calls.append(w)
        if len(calls) > 5:
            raise RuntimeError("out of memory")
        return quantise(w)

    quantise = interop.quantize_weight
    monkeypatch.setattr(interop, "quantize_weight", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        save_pretrained(model, folder, fp8=True, shard_bytes=10_000)
    assert [p.name for p in folder.parent.iterdir()] == ["c"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_rest_may_be_fp32(model, tmp_path) -> None:
    save_pretrained(model, tmp_path / "c", fp8=True, dtype=torch.float32)
    tensors = load_file(tmp_path / "c/model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], model.norm.weight)
    assert tensors[DOWN].dtype == torch.float8_e4m3fn
    assert load_pretrained(tmp_path / "c").compute_dtype == torch.float32
