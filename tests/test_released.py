"""The released V3's names, shapes and counts, from the model built on the meta device (claim C1)."""

from dsv3_book.config import ModelConfig
from dsv3_book.model import Transformer
from dsv3_book.released import in_fp8, released_shapes, scale_shape


def pattern_of_the_released_index() -> dict[str, list[int]]:
    """Names and shapes of DeepSeek-V3's index (without its FP8 scales), written down from the file's own regularity."""
    names = {"model.embed_tokens.weight": [129280, 7168], "model.norm.weight": [7168], "lm_head.weight": [129280, 7168]}
    for layer in range(62):
        at = f"model.layers.{layer}."
        names |= {
            at + "input_layernorm.weight": [7168],
            at + "post_attention_layernorm.weight": [7168],
            at + "self_attn.q_a_proj.weight": [1536, 7168],
            at + "self_attn.q_a_layernorm.weight": [1536],
            at + "self_attn.q_b_proj.weight": [24576, 1536],
            at + "self_attn.kv_a_proj_with_mqa.weight": [576, 7168],
            at + "self_attn.kv_a_layernorm.weight": [512],
            at + "self_attn.kv_b_proj.weight": [32768, 512],
            at + "self_attn.o_proj.weight": [7168, 16384],
        }
        blocks = [("mlp.", 18432)] if layer < 3 else [("mlp.shared_experts.", 2048)]
        if layer >= 3:
            names |= {at + "mlp.gate.weight": [256, 7168], at + "mlp.gate.e_score_correction_bias": [256]}
            blocks += [(f"mlp.experts.{e}.", 2048) for e in range(256)]
        for stem, width in blocks:
            names[at + stem + "gate_proj.weight"] = names[at + stem + "up_proj.weight"] = [width, 7168]
            names[at + stem + "down_proj.weight"] = [7168, width]
    mtp = "model.layers.61."
    names |= {mtp + "enorm.weight": [7168], mtp + "hnorm.weight": [7168], mtp + "eh_proj.weight": [7168, 14336]}
    names |= {mtp + "shared_head.norm.weight": [7168], mtp + "shared_head.head.weight": [129280, 7168]}
    return names | {mtp + "embed_tokens.weight": [129280, 7168]}


def scales_of_the_released_index() -> dict[str, list[int]]:
    """Names and shapes of the index's `weight_scale_inv`: its weights in FP8, written down in the same way."""
    scales = {}
    for layer in range(62):
        at = f"model.layers.{layer}."
        scales |= {
            at + "self_attn.q_a_proj.weight_scale_inv": [12, 56],
            at + "self_attn.q_b_proj.weight_scale_inv": [192, 12],
            at + "self_attn.kv_a_proj_with_mqa.weight_scale_inv": [5, 56],  # 576 rows: four blocks and a half
            at + "self_attn.kv_b_proj.weight_scale_inv": [256, 4],
            at + "self_attn.o_proj.weight_scale_inv": [56, 128],
        }
        blocks = [("mlp.", 144)] if layer < 3 else [("mlp.shared_experts.", 16)]
        if layer >= 3:
            blocks += [(f"mlp.experts.{e}.", 16) for e in range(256)]
        for stem, width in blocks:
            scales[at + stem + "gate_proj.weight_scale_inv"] = [width, 56]
            scales[at + stem + "up_proj.weight_scale_inv"] = [width, 56]
            scales[at + stem + "down_proj.weight_scale_inv"] = [56, width]
    return scales


def test_v3_in_fp8_has_the_released_scales():
    model = Transformer(ModelConfig.preset("v3-671b"), device="meta")
    shapes = released_shapes(model)
    ours = {f"{name}_scale_inv": list(scale_shape(shape)) for name, shape in shapes.items() if in_fp8(name)}
    assert ours == scales_of_the_released_index()
    assert len(shapes) + len(ours) == 91_991  # tensors in the released index


def test_v3_on_the_meta_device_has_the_released_names_and_shapes():
    model = Transformer(ModelConfig.preset("v3-671b"), device="meta")
    ours = {name: list(shape) for name, shape in released_shapes(model).items()}
    assert ours == pattern_of_the_released_index()


def test_v3_on_the_meta_device_counts_what_was_released():
    model = Transformer(ModelConfig.preset("v3-671b"), device="meta")
    mtp = {n: p.numel() for n, p in model.named_parameters() if n.startswith("layers.61.")}
    weights = sum(p.numel() for p in model.parameters())
    biases = {n: b.numel() for n, b in model.named_buffers()}
    assert weights - sum(mtp.values()) == 671_026_404_352
    assert sum(mtp.values()) == 11_610_067_968
    assert sum(n for name, n in biases.items() if not name.startswith("layers.61.")) == 14_848
    assert sum(biases.values()) == 14_848 + 256
