"""The shape of a model: `ModelConfig`, with the field names of the released `config.json`.

Every field below is called what DeepSeek's `config.json` calls it, so a released configuration loads as it is
(`from_hf`) and ours can be read by any serving engine (`to_hf`). This module needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the released file says of every V3 model and our code does in exactly one way. `from_hf` refuses other values,
# because a model built with the wrong rule would load without a murmur and compute something else.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "seq_aux": True,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "rope_interleave": True,
}
# Written for other readers of the file; we neither need nor interpret them.
# fmt: off
_IGNORED = frozenset((
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "model_type",
    "num_key_value_heads", "pretraining_tp", "quantization_config", "rope_parameters", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "head_dim", "qk_head_dim", "output_router_logits", "_name_or_path",
    "num_mtp_layers", "num_local_experts", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
))
# fmt: on
_MAY_BE_ZERO = frozenset(("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace", "aux_loss_alpha"))


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's settings (released `rope_scaling`; report §4.3). `factor` is s, the `beta`s are α and β in rotations."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    type: str = "yarn"

    def __post_init__(self) -> None:
        if self.type != "yarn":
            raise ValueError(f"rope_scaling type {self.type!r} is not supported: V3 uses 'yarn' (or null for none)")
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise ValueError("rope_scaling original_max_position_embeddings must be positive")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and rules of one model. Fields are the released `config.json`'s; defaults are those of V3-671B.

    Two defaults differ from the released file on purpose and follow the report instead: `aux_loss_alpha` is 1e-4
    when a file names none (some copies carry 0.001; report §4.2 says 1e-4), and presets we train from scratch use
    `initializer_range` 0.006 (the file says 0.02; report §4.2 says 0.006).

    Raises:
        ValueError: a size that is not positive or does not divide, naming the field, its value and the remedy.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    aux_loss_alpha: float = 1e-4
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, str(field.type))
            if field.name in _MAY_BE_ZERO and value < 0:
                raise ValueError(f"{field.name} must not be negative, got {value}")
            if field.type == "int" and field.name not in _MAY_BE_ZERO and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank must be at least 1, or null for no query compression, got {self.q_lora_rank}"
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0 or self.initializer_range <= 0:
            raise ValueError(
                f"rms_norm_eps ({self.rms_norm_eps}), rope_theta ({self.rope_theta}) and initializer_range "
                f"({self.initializer_range}) must be above 0"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (RoPE turns pairs), got {self.qk_rope_head_dim}")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) exceeds num_hidden_layers "
                f"({self.num_hidden_layers}): lower it, or equal it for a dense model"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) is not divisible by n_group ({self.n_group}): "
                "every group (node) holds the same number of experts"
            )
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2:
            raise ValueError(
                f"n_group {self.n_group} leaves {per_group} expert per group, but a group is scored by its best two: "
                "use fewer groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group})")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {self.topk_group * per_group} experts "
                f"of the {self.topk_group} groups a token may use: raise topk_group or lower num_experts_per_tok"
            )

    # Sizes derived from the fields -------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: content part plus RoPE part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with experts (the MTP modules have a router of their own each, not counted here)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` has experts. MTP modules carry the indices from `num_hidden_layers` on, all MoE
        unless the whole model is dense."""
        return index >= self.first_k_dense_replace and self.num_moe_layers > 0

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores: 1/√(Dh+R), times YaRN's m² when `rope_scaling` is set (0.1352 for V3)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    # Making and reading configurations ---------------------------------------------------------------------------
    @staticmethod
    def preset(name: str) -> ModelConfig:
        """The configuration called `name`: "tiny" (tests), "laptop", "v3-16b" (DeepSeek-V2-Lite's shape with V3's
        router and MTP) or "v3-671b"."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed. Unknown names raise a ValueError that lists them."""
        _refuse_unknown(changes, "field")
        return dataclasses.replace(self, **changes)

    @staticmethod
    def from_hf(source: Mapping[str, Any] | str | os.PathLike[str]) -> ModelConfig:
        """Reads a released `config.json`: its dictionary, its path, or the folder that holds it.

        Fields the file lacks take this class's defaults (so an absent `aux_loss_alpha` is 1e-4), except
        `initializer_range`, where an absent value means the released 0.02. `rope_scaling` may also stand in the
        newer `rope_parameters` form.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, unknown keys, or a rule (`scoring_func` …) that is not V3's.
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        if raw.get("model_type", "deepseek_v3") != "deepseek_v3":
            raise ValueError(f"model_type is {raw['model_type']!r}: only 'deepseek_v3' configurations can be read")
        for key, only in _FIXED.items():
            if raw.pop(key, only) not in (only, None):
                raise ValueError(f"{key} must be {only!r}: the V3 model has no other form here")
        heads = raw.get("num_attention_heads", ModelConfig.num_attention_heads)
        if (raw.get("num_key_value_heads") or heads) != heads:
            raise ValueError(f"num_key_value_heads must equal num_attention_heads ({heads}): MLA has no grouped heads")
        rope = raw.pop("rope_parameters", None) or {}
        if "rope_theta" in rope:
            raw.setdefault("rope_theta", rope["rope_theta"])
        scaling = raw.pop("rope_scaling", None) or rope
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        raw["rope_scaling"] = None if kind == "default" else _rope_scaling(scaling, kind, raw)
        raw.setdefault("initializer_range", 0.02)
        fields = {k: v for k, v in raw.items() if k not in _IGNORED}
        _refuse_unknown(fields, "config.json key")
        return ModelConfig(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The released `config.json` as a dictionary; `from_hf(cfg.to_hf()) == cfg`."""
        out: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **dataclasses.asdict(self),
            **_FIXED,
            "num_key_value_heads": self.num_attention_heads,
        }
        return out

    def __str__(self) -> str:
        return json.dumps(self.to_hf(), indent=2)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's √(1/t) = 0.1·mscale·ln(s) + 1 for a context stretched s times (1 when it is not stretched)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_scaling(raw: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> RopeScaling:
    names = {f.name for f in dataclasses.fields(RopeScaling)}
    kept = {k: v for k, v in raw.items() if k in names and v is not None}
    unknown = sorted(k for k, v in raw.items() if k not in {*names, "rope_type", "rope_theta"} and v is not None)
    if unknown:
        raise ValueError(f"rope_scaling has keys V3 does not know: {', '.join(unknown)}; remove them")
    kept["type"] = kind
    if "factor" not in kept:
        raise ValueError("rope_scaling has no 'factor': it says how many times the context is stretched")
    kept.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 4096))
    # transformers and the released code treat an absent mscale_all_dim as 0: the softmax scale then stays as it is.
    kept.setdefault("mscale", 1.0)
    kept.setdefault("mscale_all_dim", 0.0)
    return RopeScaling(**kept)


def _check_type(name: str, value: Any, annotation: str) -> None:
    kinds: dict[str, Any] = {
        "int": int,
        "float": (int, float),
        "bool": bool,
        "RopeScaling": RopeScaling,
        "None": type(None),
    }
    allowed = annotation.split(" | ")
    # bool is an int to Python, but "hidden_size": true is a mistake
    if isinstance(value, bool) is not (annotation == "bool") or not any(isinstance(value, kinds[a]) for a in allowed):
        raise ValueError(f"{name} must be of type {annotation.replace('None', 'null')}, got {value!r}")


def _refuse_unknown(given: Mapping[str, Any], what: str) -> None:
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}, not an object with the model's fields")
    return raw


# fmt: off
PRESETS = {
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, n_routed_experts=8, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=8, v_head_dim=16,
        qk_nope_head_dim=16, n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1,
        max_position_embeddings=256, initializer_range=0.02,
    ),
    "laptop": ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=8, n_routed_experts=16, kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=16,
        v_head_dim=32, qk_nope_head_dim=32, n_group=4, topk_group=2, num_experts_per_tok=4, first_k_dense_replace=1,
        max_position_embeddings=1024, initializer_range=0.02,
    ),
    "v3-16b": ModelConfig(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, n_shared_experts=2, n_routed_experts=64, q_lora_rank=None, n_group=1, topk_group=1,
        num_experts_per_tok=6, first_k_dense_replace=1,
    ),
    # As released, with YaRN's phase two in place; from scratch one trains it with `rope_scaling=None` at length 4096.
    "v3-671b": ModelConfig(
        max_position_embeddings=163840,
        rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096),
    ),
}
# fmt: on
