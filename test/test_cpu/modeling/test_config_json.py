"""config.json: the source's own values, in the words of Transformers 4 and 5."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from auto_round.modeling.config import source_config, untied, with_both_rope_spellings, with_dtype

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 5e5,
}  # fmt: skip
_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
_PHI3 = {"hidden_size": 64, "num_attention_heads": 4, "original_max_position_embeddings": 64}
_PARTLY = {
    "rope_type": "longrope", "rope_theta": 2e4, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}  # fmt: skip
_MOE = {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 64}
_MIXTURE = {"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS, **_MOE}

# Families as Transformers 5 saves them: class, its arguments, and what Transformers 4 looks for.
SAVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": (
        "LlamaConfig", {"rope_parameters": _LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in _LLAMA3.items() if k != "rope_theta"}},
    ),
    "qwen3": ("Qwen3Config", {"rope_theta": 1e6}, {"rope_theta": 1e6}),
    "gemma3_text": ("Gemma3TextConfig", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "gemma3": ("Gemma3Config", {}, {"text_config.rope_theta": 1e6, "text_config.rope_local_base_freq": 1e4}),
    "gemma3n": ("Gemma3nTextConfig", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "gpt_oss": ("GptOssConfig", {}, {"rope_theta": 150000.0, "rope_scaling.rope_type": "yarn"}),
    "phi3": (
        "Phi3Config", _PHI3 | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS}},
        # Transformers 4 refuses any other fields than these three.
        {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **_FACTORS}, "original_max_position_embeddings": 64},
    ),
    "phi3 in part": (
        "Phi3Config", _PHI3 | {"rope_parameters": _PARTLY},
        {
            "rope_theta": 2e4, "partial_rotary_factor": 0.75,
            "rope_scaling": {k: v for k, v in _PARTLY.items() if k.endswith("_factor") and k[0] != "p"}
            | {"type": "longrope"},
        },
    ),
    "phimoe": (
        "PhimoeConfig", {"hidden_size": 64, "num_attention_heads": 4, "rope_parameters": _MIXTURE},
        {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **_FACTORS, **_MOE}},
    ),
    "gpt_neox": (
        "GPTNeoXConfig", {"rotary_pct": 0.5, "rotary_emb_base": 20000},
        {"rotary_pct": 0.5, "rotary_emb_base": 20000, "rope_theta": None},
    ),
    "glm4": ("Glm4Config", {}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {}, {"partial_rotary_factor": 0.25}),
    "modernbert": ("ModernBertDecoderConfig", {}, {"global_rope_theta": 160000.0, "local_rope_theta": 1e4}),
    "olmo3": ("Olmo3Config", {}, {"rope_theta": 5e5}),
    "qwen3_next": ("Qwen3NextConfig", {}, {"rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    "deepseek_v3": ("DeepseekV3Config", {}, {"rope_theta": 1e4}),
    "mistral3": ("Mistral3Config", {}, {}),
    "llava": ("LlavaConfig", {}, {"text_config.rope_theta": 1e4}),
    "qwen3_5": ("Qwen3_5Config", {}, {}),
    "llama4": ("Llama4Config", {}, {}),
    "gemma4": ("Gemma4TextConfig", {}, {}),
    "gpt2": ("GPT2Config", {}, {"rope_theta": None, "rope_parameters": None}),
}  # fmt: skip

# Files of Transformers 4, and what Transformers 5 looks for.
OLDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16", "strange": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "strange": [1]},
    ),
    "linear": (
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 2.0, "rope_parameters.rope_theta": 5e5},
    ),
    "gemma3": (
        {
            "model_type": "gemma3", "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 32},
            "text_config": {
                "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 20000.0, "hidden_size": 64,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "torch_dtype": "bfloat16",
            },
        },
        {
            "text_config.rope_parameters.full_attention.factor": 8.0, "text_config.dtype": "float16",
            "text_config.rope_parameters.sliding_attention.rope_theta": 20000.0, "text_config.torch_dtype": "float16",
        },
    ),
    "phi3": (
        {"model_type": "phi3", "rope_theta": 1e4, "rope_scaling": {"type": "longrope", **_FACTORS}, **_PHI3},
        {"rope_parameters.rope_type": "longrope", "rope_parameters.long_factor": [2.0] * 8},
    ),
    "qwen2_vl": (
        {
            "model_type": "qwen2_vl", "rope_theta": 1e6, "hidden_size": 64, "vision_config": {"hidden_size": 64},
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        },
        {"rope_theta": 1e6, "rope_scaling.type": "mrope"},
    ),
    "no family": (
        {"model_type": "strange", "rope_theta": 3.0, "auto_map": {"AutoConfig": "a.B"}}, {"rope_parameters": None}
    ),
}  # fmt: skip


def found_at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def opened(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    found = AutoConfig.from_pretrained(folder).to_dict()
    rope = found.get("rope_parameters") or {}
    # Phi keeps the older words beside the same values.
    if rope.get("type") == rope.get("rope_type"):
        rope.pop("type", None)
    if found["model_type"].startswith("phi") and found.get("partial_rotary_factor") == rope.get(
        "partial_rotary_factor"
    ):
        found.pop("partial_rotary_factor", None)
    return {k: v for k, v in found.items() if k not in ("_name_or_path", "dtype")}


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_transformers_5(name: str, tmp_path: Path) -> None:
    import transformers

    kind, options, wanted = SAVED[name]
    values = json.loads(getattr(transformers, kind)(**copy.deepcopy(options)).to_json_string())
    made = with_both_rope_spellings(with_dtype(values, "float16"))
    assert made["dtype"] == made["torch_dtype"] == "float16"
    assert {path: found_at(made, path) for path in wanted} == wanted
    assert list(values) == [key for key in made if key in values], "in the order of the source"
    assert opened(made, tmp_path / "made") == opened(values, tmp_path / "source")


@pytest.mark.parametrize("name", OLDER)
def test_saved_by_transformers_4(name: str, tmp_path: Path) -> None:
    values, wanted = OLDER[name]
    made = with_both_rope_spellings(with_dtype(values, "float16"))
    assert {path: found_at(made, path) for path in wanted} == wanted
    without = {k: v for k, v in values.items() if k not in ("torch_dtype", "text_config")}
    assert {k: made[k] for k in without} == without, "nothing of the source is lost"
    if values["model_type"] != "strange":
        one, other = opened(made, tmp_path / "made"), opened(values, tmp_path / "source")
        for part in (one.get("text_config") or {}, other.get("text_config") or {}):
            part.pop("dtype", None)
        assert one == other


def test_what_is_taken_from_a_folder(tmp_path: Path) -> None:
    stored = {
        "_name_or_path": "/home/me/model", "zeta": 1, "model_type": "llama", "quantization_config": {"bits": 4},
        "auto_map": {"AutoConfig": "conf.Conf", "AutoModel": "me/repo--mod.Model"},
        "text_config": {"_name_or_path": "/data", "compression_config": {}, "alpha": 2},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found = source_config(None, tmp_path, trusted=False)
    assert list(found.items()) == [
        ("zeta", 1), ("model_type", "llama"), ("auto_map", {"AutoModel": "me/repo--mod.Model"}),
        ("text_config", {"alpha": 2}),
    ]  # fmt: skip
    assert source_config(None, tmp_path, trusted=True)["auto_map"] == stored["auto_map"]


def test_parts_keep_their_own_dtype() -> None:
    values = {
        "torch_dtype": "bfloat16",
        "vision_config": {"torch_dtype": "float32"},
        "text_config": {"dtype": "bfloat16"},
    }
    made = with_dtype(values, "bfloat16")
    assert made["vision_config"] == {"torch_dtype": "float32", "dtype": "float32"}
    assert made["text_config"] == {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert with_dtype(values, "float16")["vision_config"]["dtype"] == "float16"


def test_untied() -> None:
    values = {"text_config": {"tie_word_embeddings": True}, "vision_config": {"tie_word_embeddings": True}}
    assert untied(values) == {
        "text_config": {"tie_word_embeddings": False}, "vision_config": {"tie_word_embeddings": True},
        "tie_word_embeddings": False,
    }  # fmt: skip
