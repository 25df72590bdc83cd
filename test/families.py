"""Tiny models of every family in Transformers' causal-LM mapping, made by shrinking its default configuration.

    for family in known_families().values():
        if family.reason is None:
            folder = family.save(tmp_path / family.name)

A configuration is shrunk by the names of its values (`hidden_size`, `n_embd`, `num_local_experts`, ...); lists with one
entry a layer are cut to the layers that differ from each other. OVERRIDES holds the few families that need more.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EXPERT, VOCAB, POSITIONS = 64, 4, 2, 16, 128, 64, 288, 128
EXPERTS, TOP = 4, 2
LAYERS = 2  # at least; one for each kind of layer, and at most MOST
MOST = 5

_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (
        HIDDEN,
        (
            "hidden_size", "n_embd", "d_model", "dim_model_base", "emb_dim", "embedding_dim", "embedding_size",
            "word_embed_proj_dim", "lru_width", "attention_hidden_size", "input_embedding_size",
            "output_embedding_size", "pronunciation_embed_dim", "shape_embed_dim",
        ),
    ),
    (
        HEADS,
        (
            "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "decoder_attention_heads",
            "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
            "linear_num_value_heads", "linear_num_heads", "index_n_heads", "swa_num_attention_heads",
        ),
    ),
    (
        HEAD_DIM,
        (
            "head_dim", "dim_head", "d_head", "kv_channels", "global_head_dim", "swa_head_dim", "v_head_dim",
            "swa_v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim",
            "qk_nope_head_dim", "ssm_state_size", "mamba_d_state", "state_size", "query_pre_attn_scalar",
            "attention_head_size", "rope_head_dim",
        ),
    ),
    (8, ("qk_rope_head_dim", "rotary_dim", "sliding_window", "sliding_window_size", "window_size",
         "attention_window_size", "local_attention", "attention_chunk_size", "local_attention_window_len",
         "time_step_rank", "mamba_dt_rank", "gated_norm_rank", "laurel_rank", "adapter_rank", "index_topk",
         "mamba_chunk_size", "chunk_size", "block_size", "keep_window_size", "index_block_size")),
    (32, ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "hidden_size_per_layer_input",
          "router_hidden_size", "original_max_position_embeddings", "lsh_attn_chunk_length",
          "local_attn_chunk_length", "ple_embed_dim", "loop_gate_rank")),
    (
        INTERMEDIATE,
        (
            "intermediate_size", "ffn_dim", "dim_ff", "dff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner",
            "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner", "feed_forward_size",
        ),
    ),
    (
        EXPERT,
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
            "expert_ffn_hidden_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
            "moe_ffn_hidden_size",
        ),
    ),
    (VOCAB, ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size")),
    (
        POSITIONS,
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "model_max_length",
            "context_length", "max_target_positions", "max_source_positions", "mem_len",
        ),
    ),
    (
        EXPERTS,
        (
            "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_codebooks",
        ),
    ),
    (TOP, ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "zero_expert_num")),
    (
        2,
        (
            "linear_num_key_heads", "n_group", "num_expert_group", "swa_num_key_value_heads",
            "num_global_key_value_heads",
            "altup_num_inputs", "hc_mult", "hc_count", "o_groups", "num_query_groups", "mamba_n_groups", "n_groups",
            "mamba_ngroups", "local_num_chunks_before",
        ),
    ),
    (1, ("topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts",
         "moe_num_shared_experts", "num_nextn_predict_layers", "moe_layer_start_index", "n_mamba_heads_per_group")),
)  # fmt: skip
SIZES: dict[str, int] = {name: size for size, names in _SIZES for name in names}
_AT_MOST = {"n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers",
            "n_shared_experts", "num_shared_experts", "zero_expert_num", "n_groups", "mamba_n_groups", "mamba_ngroups",
            "num_codebooks", "num_experts_per_tok"}  # fmt: skip
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers", "num_blocks",
    "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# Mamba: inner width = expand * hidden = 128 = heads * head size.
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_headdim": 16,
    "n_mamba_heads": 8, "mamba_d_ssm": 128,
}  # fmt: skip

# Families for which names are not enough; `...` takes a value away.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BLT_PART: dict[str, Any] = dict(
    hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=INTERMEDIATE, num_key_value_heads=..., head_dim=...
)  # fmt: skip
_QWEN4_EXP: dict[str, Any] = dict(
    eos_token_id=2,
    indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2,
    ple_layer_ids=[1], ple_embed_dim=64, heads_per_ngram=2, ngram_vocab_size_base=50, split_ngram_parts=2,
    make_ngram_vocab_size_divisible_by=8, number_of_conv_states=...,
)  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(
        encoder_hash_byte_group_vocab=64, max_position_embeddings=POSITIONS,
        encoder_config=_BLT_PART | dict(hidden_size_global=2 * HIDDEN, num_hidden_layers=1),
        decoder_config=_BLT_PART | dict(hidden_size_global=2 * HIDDEN, num_hidden_layers=2),
        global_config=_BLT_PART | dict(hidden_size=2 * HIDDEN, num_hidden_layers=2),
        patcher_config=_BLT_PART | dict(num_hidden_layers=1),
    ),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": _ROPE, "full_attention": _ROPE},
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=EXPERT, moe_num_experts=EXPERTS, moe_top_k=TOP),
    ),
    "deepseek_v2": dict(num_experts_per_tok=TOP, first_k_dense_replace=1),
    "dots1": dict(
        n_routed_experts=EXPERTS, num_experts_per_tok=TOP, n_shared_experts=1, first_k_dense_replace=1,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "dots3_note": dict(
        vision_config=dict(adapter_in_dim=HIDDEN, adapter_out_dim=HIDDEN),
        audio_config=dict(adapter_input_size=HIDDEN, adapter_out_dim=HIDDEN, downsample_hidden_size=8),
    ),
    "gemma3n_text": dict(
        num_hidden_layers=5, num_kv_shared_layers=2, intermediate_size=[INTERMEDIATE] * 5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": dict(vocab_size_per_layer_input=VOCAB),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(num_hidden_layers=2, num_layers_per_stack=...),
    "hunyuan_v1_dense": dict(head_dim=HEAD_DIM),
    "hunyuan_v1_moe": dict(head_dim=HEAD_DIM),
    "jamba": dict(
        num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=0,
    ),
    "lfm2": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"], full_attn_idxs=...),
    "lfm2_moe": dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "mamba2": dict(num_heads=8, head_dim=16),
    "ministral": dict(head_dim=HEAD_DIM, layer_types=["sliding_attention", "full_attention"]),
    "mllama": dict(text_config=dict(cross_attention_layers=[1], num_hidden_layers=3)),
    "nemotron": dict(num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM),
    "qwen2": dict(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]),
    "qwen4_exp": dict(text_config=_QWEN4_EXP),
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        is_decoder=True, attn_layers=["local", "lsh"], num_hidden_layers=2, axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[32, 32], feed_forward_size=INTERMEDIATE, num_buckets=2,
        local_attn_chunk_length=8, lsh_attn_chunk_length=8,
    ),
    "smollm3": dict(num_hidden_layers=2, no_rope_layers=[1, 0], layer_types=["full_attention"] * 2),
    "zamba": dict(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        attention_hidden_size=2 * HIDDEN, attention_head_dim=2 * HIDDEN // HEADS, n_mamba_heads=2,
        num_key_value_heads=HEADS,
    ),
    "zamba2": dict(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        hybrid_layer_ids=[1, 3], num_mem_blocks=1, attention_hidden_size=..., attention_head_dim=...,
        num_key_value_heads=HEADS, mamba_headdim=...,
    ),
}  # fmt: skip

# Other shapes of a family that checkpoints have: {name: (model type, changes)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text:shared-kv": (
        "gemma4_text",
        dict(
            num_hidden_layers=4, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            per_layer_config=...,
        ),
    ),
    "gemma4_text:moe": (
        "gemma4_text",
        dict(enable_moe_block=True, num_experts=EXPERTS, top_k_experts=TOP, moe_intermediate_size=EXPERT,
             hidden_size_per_layer_input=0),
    ),
    "falcon:new-decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False)),
    "opt:projected": ("opt", dict(word_embed_proj_dim=32)),
    "qwen3:untied": ("qwen3", dict(tie_word_embeddings=False)),
    "llama:tied": ("llama", dict(tie_word_embeddings=True)),
}  # fmt: skip

# Text-only classes whose checkpoints on the hub hold more: their tensors are named as in the whole model.
HUB_PREFIXES: dict[str, tuple[str, str]] = {
    "qwen3_5_text": ("model.", "model.language_model."),
    "qwen3_5_moe_text": ("model.", "model.language_model."),
    "gemma3_text": ("model.", "language_model.model."),
    "gemma3n_text": ("model.", "model.language_model."),
    "gemma4_text": ("model.", "model.language_model."),
    "gemma4_unified_text": ("model.", "model.language_model."),
    "llama4_text": ("model.", "language_model.model."),
    "minimax_m3_vl_text": ("model.", "language_model.model."),
}


# Models that read images beside text, of classes outside the causal-LM mapping: {name: (model type, class, changes)}.
WITH_IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("llava", "LlavaForConditionalGeneration", {}),
    "mistral3": ("mistral3", "Mistral3ForConditionalGeneration", {}),
    "qwen3_5:images": (
        "qwen3_5", "Qwen3_5ForConditionalGeneration",
        dict(vision_config=dict(depth=2, num_position_embeddings=64, out_hidden_size=HIDDEN)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One entry of the causal-LM mapping, or of WITH_IMAGES. `reason`: why no model of it is made, or None."""

    name: str
    cls: str
    reason: str | None = None

    def config(self, **changes: Any) -> Any:
        """A fresh tiny configuration."""
        return tiny_config(self.name, **changes)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
        """The model with random weights, norms and biases included; the same for the same seed."""
        import transformers

        config = self.config(**changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.name in WITH_IMAGES:
                model = getattr(transformers, self.cls)(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            perturb(model)
        model.config.dtype = dtype
        return model.to(dtype).eval()

    def save(self, folder: str | os.PathLike[str], hub: bool = False, **options: Any) -> Path:
        """Save with Transformers, which writes the original checkpoint's names.

        Args:
            folder: where to.
            hub: name tensors as the hub's checkpoint of the whole (multimodal) model does, see HUB_PREFIXES.
            **options: of `build`.
        """
        self.build(**options).save_pretrained(folder)
        if hub:
            rename_tensors(Path(folder), *HUB_PREFIXES[self.name])
        return Path(folder)


def known_families() -> dict[str, Family]:
    """Every model type of the installed Transformers' causal-LM mapping, whether it can be built or not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as mapping

    found = {name: Family(name, cls, _reason(name)) for name, cls in mapping.items()}
    for name, (kind, _) in VARIANTS.items():
        if kind in mapping:
            found[name] = Family(name, mapping[kind], _reason(kind))
    return found | {name: Family(name, cls) for name, (_, cls, _) in WITH_IMAGES.items()}


def buildable() -> list[str]:
    """The names of the families that can be built."""
    return [name for name, family in known_families().items() if family.reason is None]


_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_NOT_MADE = {
    "musicgen": "an encoder-decoder model (text encoder, audio decoder)",
    "musicgen_melody": "an encoder-decoder model (text encoder, audio decoder)",
    "trocr": "the decoder of an encoder-decoder model",
    "moshi": "an encoder-decoder model (audio)",
    "xlm": "an encoder (masked language model)",
    "emu3": "its text-only class is saved under a model type that AutoModelForCausalLM does not know",
    "mllama": "its text-only class is saved under a model type that AutoModelForCausalLM does not know",
    "gemma4_assistant": "a draft model: it is fed the hidden states and keys of another model",
    "gemma4_unified_assistant": "a draft model: it is fed the hidden states and keys of another model",
}


_NEEDS = {"gemma3n": ("timm", "PIL")}  # packages of the vision tower
# Families that Transformers itself does not run with older libraries: name, library, the first that is known to do.
_NEWER = {
    "cohere_compass_text": ("transformers", "5.24"),  # 5.20 takes another size for its rotary embedding
    "qwen4_exp": ("torch", "2.13"),  # 2.6 scatters by 64-bit indices only
    "qwen4_exp_text": ("torch", "2.13"),
}


def older_than(library: str, version: str) -> bool:
    """Whether an older version of a library is installed."""
    return Version(importlib.metadata.version(library)).release < Version(version).release


def _reason(name: str) -> str | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in _NOT_MADE:
        return _NOT_MADE[name]
    if absent := [p for p in _NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]:
        return f"needs {' and '.join(absent)}"
    if name in _NEWER and older_than(*_NEWER[name]):
        return "needs {} {}".format(*_NEWER[name])
    if name in _ENCODERS:
        return "an encoder (masked language model)"
    try:
        if CONFIG_MAPPING[name]().is_encoder_decoder:
            return "an encoder-decoder model"
    except Exception:  # a configuration without defaults: OVERRIDES gives the values
        pass
    return None


def tiny_config(name: str, **changes: Any) -> Any:
    """The shrunk configuration of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, variant = VARIANTS.get(name, (name, {}))
    if name in WITH_IMAGES:
        kind, _, variant = WITH_IMAGES[name]
    cls = CONFIG_MAPPING[kind]
    override = OVERRIDES.get(kind, {})
    values = tiny_values(cls())
    _merge(values, override)
    _merge(values, variant)
    _merge(values, changes)
    return cls(**_without_holes(values))


def _without_holes(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_holes(v) if isinstance(v, dict) else v for k, v in values.items() if v is not ...}


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and key.endswith("_config"):
            _merge(values[key], value)
        else:
            values[key] = value


def tiny_values(config: Any) -> dict[str, Any]:
    """What to make the same configuration with, so that its model is tiny."""
    from transformers import PreTrainedConfig

    given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    known = set(inspect.signature(type(config).__init__).parameters) | set(given)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_values(value) if name in type(config).sub_configs else value
        elif isinstance(value, int) and not isinstance(value, bool):
            size = SIZES.get(name, SIZES.get(name.removeprefix("swa_")))
            if size is not None:
                values[name] = min(value, size) if name in _AT_MOST else size
            elif name in _MAMBA:
                values[name] = _MAMBA[name]
            elif name.endswith("token_id"):
                values[name] = _token(name)
        elif name.endswith("token_id") and isinstance(value, list):
            values[name] = _token(name)
        elif name in SIZES and isinstance(value, list) and all(isinstance(v, int) for v in value):
            values[name] = [SIZES[name]] * len(value)
    _heads(config, given, values)
    _layers(config, given, values)
    if "rope_parameters" in known:
        _rope(given.get("rope_parameters"), values)
    if "qk_rope_head_dim" in values and given.get("head_dim") == given["qk_rope_head_dim"]:
        values["head_dim"] = values["qk_rope_head_dim"]
    if "qk_head_dim" in given and "qk_nope_head_dim" in values:
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    return values


def _token(name: str) -> int:
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3}
    return usual[name] if name in usual else VOCAB - 1 - sum(map(ord, name)) % 20


def _heads(config: Any, given: dict[str, Any], values: dict[str, Any]) -> None:
    """Grouped heads, unless the default has as many key-value heads as others."""
    for name in _KV_HEADS:
        if isinstance(given.get(name), int):
            heads = given.get("num_attention_heads")
            whole = given[name] == heads or "kv_lora_rank" in given
            values[name] = 1 if given[name] == 1 else HEADS if whole else KV_HEADS


def _layers(config: Any, given: dict[str, Any], values: dict[str, Any]) -> None:
    """As many layers as there are kinds of them, and the lists that say which is which cut to those."""
    counts = [name for name in _LAYER_COUNTS if isinstance(given.get(name), int)]
    if not counts:
        return
    total = given[counts[0]]
    lists = {k: v for k, v in given.items() if isinstance(v, (list, tuple)) and len(v) == total and total > 0}
    kinds: dict[str, int] = {}
    for index in range(total):
        kinds.setdefault(repr([v[index] for v in lists.values()]), index)
    chosen = sorted(kinds.values())[:MOST] if lists else []
    dense = values.get("first_k_dense_replace", values.get("num_dense_layers", 0))
    least = max(LAYERS, dense + 1)
    chosen += [i for i in range(total) if i not in chosen][: max(0, least - len(chosen))]
    chosen.sort()
    for name in counts:
        values[name] = min(len(chosen), given[name]) if given[name] else 0
    for name, value in lists.items():
        known = values.get(name, value)
        values[name] = [known[i] for i in chosen]


def _rope(rope: Any, values: dict[str, Any]) -> None:
    """The default rope, with positions that fit a tiny model."""
    if not isinstance(rope, dict):
        return
    made: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            made[key] = dict(value)
            if "original_max_position_embeddings" in value:
                made[key]["original_max_position_embeddings"] = 32
        else:
            made[key] = 32 if key == "original_max_position_embeddings" else value
    values["rope_parameters"] = made


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Random weights everywhere: matrices of one spread, and vectors (norms, biases) moved away from their defaults."""
    seen: set[int] = set()
    for _, parameter in model.named_parameters():
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        if parameter.dim() > 1 and min(parameter.shape[-2:]) > 1:
            parameter.copy_(torch.randn_like(parameter) * 0.08)
        else:
            parameter.nan_to_num_().clamp_(-8, 8).add_(torch.randn_like(parameter) * 0.1)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point() and re.search(r"bias|scale", name):
            buffer.add_(torch.randn_like(buffer) * 0.05)


def rename_tensors(folder: Path, old: str, new: str) -> None:
    """Put another prefix before the names of a saved model's tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}, file, {"format": "pt"}
    )


def sample_ids(count: int = 2, length: int = 16, seed: int = 7, top: int = 250) -> list[torch.Tensor]:
    """Samples of token ids [length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, top, (length,), generator=generator) for _ in range(count)]
