"""Released checkpoints in and out: names, bits, shards, and what is said about a checkpoint that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_book.interop as interop
from dsv3_book import fill
from dsv3_book.config import ModelConfig
from dsv3_book.interop import load_pretrained, save_pretrained
from dsv3_book.model import Transformer
from dsv3_book.model.transformer import Part

TINY = ModelConfig.preset("tiny").replace(
    hidden_size=24, num_hidden_layers=2, vocab_size=40, num_nextn_predict_layers=1
)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY, seed=3)
    for i, (_, router) in enumerate(model.routers()):
        router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8) * 0.0007 + i)  # bf16 would not hold these
    return model


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of a one-file checkpoint with `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


# Round trips ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000, 1])
def test_round_trip_is_bit_for_bit(model, tmp_path, shard_bytes):
    save_pretrained(model, tmp_path / "c", shard_bytes=shard_bytes)
    assert same(load_pretrained(tmp_path / "c"), model)
    shards = list(tmp_path.glob("c/*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 10**9)
    if shard_bytes == 30_000:
        largest = max(sum(t.numel() * 4 for t in load_file(s).values()) for s in shards)
        assert largest <= shard_bytes
        index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
        held = {name: s.name for s in shards for name in load_file(s)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for s in shards for t in load_file(s).values())


def test_bf16_and_fp32_are_kept_or_changed_on_request(model, tmp_path):
    save_pretrained(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load_pretrained(tmp_path / "half")
    assert half.compute_dtype == half.norm.weight.dtype == torch.bfloat16
    full = load_pretrained(tmp_path / "half", dtype=torch.float32)
    assert full.norm.weight.dtype == full.compute_dtype == torch.float32
    for (name, router), (_, original) in zip(half.routers(), model.routers(), strict=True):
        assert router.e_score_correction_bias.dtype == torch.float32, name
        assert torch.equal(router.e_score_correction_bias, original.e_score_correction_bias)
    save_pretrained(half, tmp_path / "again")
    save_pretrained(full, tmp_path / "from_full", dtype=torch.bfloat16)
    assert same(load_pretrained(tmp_path / "again"), half) and same(load_pretrained(tmp_path / "from_full"), half)


def test_a_loaded_model_computes_and_trains(model, folder):
    tokens = torch.randint(0, 40, (2, 9))
    loaded = load_pretrained(folder)
    assert torch.equal(loaded(tokens), model(tokens))
    losses = loaded.losses(tokens)
    (losses.main + losses.mtp + losses.balance).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert not [n for n, t in loaded.state_dict().items() if t.is_meta]


def test_mtp_layers_get_the_copies_that_readers_expect(model, folder):
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], model.lm_head.weight)


def test_a_checkpoint_without_copies_or_without_mtp_loads(model, folder):
    def drop(tensors, stem):
        for name in [n for n in tensors if n.startswith(stem)]:
            del tensors[name]

    rewrite(folder, lambda t: (drop(t, "model.layers.2.embed"), drop(t, "model.layers.2.shared_head.head")))
    assert same(load_pretrained(folder), model)
    main_only = load_pretrained(folder, mtp=False)
    assert not main_only.mtp_modules() and main_only.cfg.num_nextn_predict_layers == 0
    rewrite(folder, lambda t: drop(t, "model.layers.2."))
    assert same(load_pretrained(folder, mtp=False), main_only)
    with pytest.raises(ValueError, match=r"Only MTP's are missing .* load with mtp=False"):
        load_pretrained(folder)


# What does not fit ----------------------------------------------------------------------------------------------------
def test_all_misfits_are_listed_in_one_error(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.9.stray.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(40, 23)

    rewrite(folder, spoil)
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    text = str(caught.value)
    for piece in (
        "2 missing: model.layers.1.mlp.experts.5.up_proj.weight, model.norm.weight",
        "1 unknown: model.layers.9.stray.weight",
        "1 of the wrong shape: lm_head.weight is [40, 23], not [40, 24]",
        "config.json",
    ):
        assert piece in text


def test_a_long_list_is_cut_with_a_count(folder):
    rewrite(folder, lambda t: t.update({f"stray.{i}": torch.zeros(1) for i in range(40)}))
    with pytest.raises(ValueError, match=r"40 unknown: .* and 28 more"):
        load_pretrained(folder)


def test_another_models_config_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"of the wrong shape: .* not \[40, 32\]"):
        load_pretrained(folder)


def test_copies_that_differ_are_not_dropped_in_silence(folder):
    rewrite(folder, lambda t: t["model.layers.2.embed_tokens.weight"].add_(1))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight differs from model"):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_named_with_the_remedy(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or cut short .* again"):
        load_pretrained(folder)


def test_a_scrambled_header_is_named(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        load_pretrained(folder)


def test_other_dtypes_are_named(folder):
    rewrite(folder, lambda t: t.update(x=torch.zeros(2).half()))
    with pytest.raises(ValueError, match="x is of type F16; weights may be F32, BF16 or, with scales, F8_E4M3"):
        load_pretrained(folder)


def test_missing_pieces_of_a_folder(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickle files can run any code"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(folder)


def test_damaged_indices(model, tmp_path):
    save_pretrained(model, tmp_path / "c", shard_bytes=30_000)
    index = tmp_path / "c/model.safetensors.index.json"
    content = index.read_text()
    for bad in ("{", "[]", '{"weight_map": {"x": 3}}'):
        index.write_text(bad)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            load_pretrained(tmp_path / "c")
    index.write_text('{"weight_map": {"x": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="outside its folder"):
        load_pretrained(tmp_path / "c")
    index.write_text(content)
    next(tmp_path.glob("c/model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-.* fetch the rest"):
        load_pretrained(tmp_path / "c")


# Saving ---------------------------------------------------------------------------------------------------------------
def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match=r"cannot save as torch\.float16"):
        save_pretrained(model, tmp_path / "c", dtype=torch.float16)
    with pytest.raises(ValueError, match="one stage of a pipeline"):
        save_pretrained(Transformer(TINY, part=Part(range(1), head=False)), tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_pretrained(model, tmp_path / "c", tokenizer=tmp_path / "none.json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        save_pretrained(model, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_saving_again_leaves_no_old_weights_and_keeps_other_files(model, tmp_path):
    save_pretrained(model, tmp_path / "c", shard_bytes=30_000)
    (tmp_path / "c/tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    (tmp_path / "t.json").write_text("[1]")
    save_pretrained(model, tmp_path / "c", tokenizer=tmp_path / "t.json")
    assert (tmp_path / "c/tokenizer.json").read_text() == "[1]"
    assert {p.name for p in tmp_path.iterdir()} == {"c", "t.json"}


def test_a_save_that_fails_harms_nothing(model, folder, monkeypatch):
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(interop, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(Transformer(TINY, seed=9), folder, shard_bytes=30_000)
    assert same(load_pretrained(folder), model)
    assert [p.name for p in folder.parent.iterdir()] == ["ckpt"]


def test_a_save_cut_between_its_two_renames_is_mended_by_the_next(model, folder):
    folder.rename(folder.parent / ".ckpt.old")
    (folder.parent / ".ckpt.old" / "notes.txt").write_text("kept")
    save_pretrained(model, folder)
    assert (folder / "notes.txt").read_text() == "kept" and same(load_pretrained(folder), model)
    assert [p.name for p in folder.parent.iterdir()] == ["ckpt"]


def test_loading_holds_no_more_than_the_model_and_one_tensor(tmp_path, monkeypatch):
    """Counted where tensors are read: no read may happen while an earlier one's tensor is still alive."""
    import weakref

    save_pretrained(Transformer(TINY), tmp_path / "c", shard_bytes=30_000)
    alive: list[weakref.ref] = []
    original = fill.read

    def counted(file, name, path):
        assert not any(ref() is not None for ref in alive), "a tensor read earlier is still held"
        tensor = original(file, name, path)
        alive[:] = [weakref.ref(tensor)]
        return tensor

    monkeypatch.setattr(fill, "read", counted)
    load_pretrained(tmp_path / "c")
    assert alive
