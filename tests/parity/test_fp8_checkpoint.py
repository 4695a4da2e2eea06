"""An FP8 checkpoint that we wrote, read by transformers: the same weights, bit for bit, and the same logits.

transformers' reader finds the blocks by dividing the weight's sides by those of its scales, and so refuses sides that
are no multiple of their number of blocks (V3's own 576 rows are not, in the version tested here): widths in this file
are whole blocks or less than one. Ragged ones are tested in `tests/test_interop_fp8.py`.
"""

import pytest
import torch

from dsv3_book.config import ModelConfig
from dsv3_book.interop import load_pretrained, save_pretrained
from dsv3_book.model import Transformer

transformers = pytest.importorskip("transformers")
finegrained = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")

CFG = ModelConfig.preset("tiny").replace(
    hidden_size=256,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    vocab_size=40,
    q_lora_rank=128,
    kv_lora_rank=120,
    moe_intermediate_size=128,
    intermediate_size=384,
)


def test_transformers_reads_our_fp8_checkpoint(tmp_path, monkeypatch) -> None:
    save_pretrained(Transformer(CFG, seed=1), tmp_path, fp8=True)
    ours = load_pretrained(tmp_path, dtype=torch.bfloat16)

    monkeypatch.setattr(finegrained, "is_accelerate_available", lambda: True)  # asked for, and not needed on one device
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    found = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        if name.endswith(("experts.gate_proj", "experts.up_proj")):  # theirs are stacked: gate above up
            fused = found[f"model.{name.rpartition('.')[0]}.gate_up_proj"]
            expected = fused.chunk(2, dim=1)["up_proj" in name]
        else:
            expected = found[name if name.startswith("lm_head") else f"model.{name}"]
        assert torch.equal(parameter, expected.to(torch.bfloat16)), name

    ours, theirs = load_pretrained(tmp_path, dtype=torch.float32), theirs.float()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())
        tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
