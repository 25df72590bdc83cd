"""Tiny models of every family that is written as GGUF, with weights that depend on nothing but their names.

Made for comparing: this repository's conversion, llama.cpp's own converter and llama.cpp itself are all given these.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS = 320
_DECODER: dict[str, Any] = dict(
    vocab_size=ROWS, hidden_size=256, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
_LATENT: dict[str, Any] = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=1,
    kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=24, num_key_value_heads=4,
)  # fmt: skip
_LOCAL_3 = ["sliding_attention", "sliding_attention", "full_attention"]
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 50 for i in range(24)], "long_factor": [1.0 + i / 4 for i in range(24)],
}  # fmt: skip

# name -> (model type, values of its configuration, tokenizer: see `tokenizer`)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama2": ("llama", _DECODER | dict(num_key_value_heads=4), "pieces"),
    "llama3": ("llama", _DECODER | dict(rope_parameters=_LLAMA3, head_dim=48), "bytes"),
    "llama-biases": ("llama", _DECODER | dict(attention_bias=True, mlp_bias=True), "pieces"),
    "llama-linear": (
        "llama",
        _DECODER | dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        "pieces",
    ),
    "smollm2": ("llama", _DECODER | dict(tie_word_embeddings=True, num_attention_heads=8), "bytes"),
    "smollm3": ("smollm3", _DECODER | dict(num_hidden_layers=4, tie_word_embeddings=True), "bytes"),
    "mistral": ("mistral", _DECODER | dict(sliding_window=None), "pieces"),
    "mixtral": ("mixtral", _DECODER | dict(num_local_experts=4, sliding_window=None), "pieces"),
    "qwen2": ("qwen2", _DECODER | dict(tie_word_embeddings=True), "bytes"),
    "qwen2-yarn": ("qwen2", _DECODER | dict(rope_parameters=_YARN), "bytes"),
    "qwen2-moe": ("qwen2_moe", _DECODER | _EXPERTS | dict(shared_expert_intermediate_size=96), "bytes"),
    "qwen3": ("qwen3", _DECODER | dict(head_dim=80), "bytes"),
    "qwen3-moe": ("qwen3_moe", _DECODER | _EXPERTS | dict(head_dim=64, norm_topk_prob=True), "bytes"),
    "gemma2": (
        "gemma2",
        _DECODER | dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=8, tie_word_embeddings=True),
        "bare pieces",
    ),
    "gemma3": (
        "gemma3_text",
        _DECODER
        | dict(
            num_hidden_layers=6, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, tie_word_embeddings=True,
            layer_types=["sliding_attention"] * 5 + ["full_attention"],
        ),
        "bare pieces",
    ),
    "phi3": ("phi3", _DECODER | dict(original_max_position_embeddings=512, sliding_window=None), "phi pieces"),
    # llama.cpp takes the long factors for contexts beyond the original one, and its contexts have at least 256 tokens.
    "phi3-long": (
        "phi3",
        _DECODER | dict(max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=_LONG),
        "phi pieces",
    ),
    "olmo2": ("olmo2", _DECODER, "bytes"),
    "olmo3": ("olmo3", _DECODER | dict(num_hidden_layers=3, layer_types=_LOCAL_3, sliding_window=8), "bytes"),
    "gpt2": (
        "gpt2",
        dict(vocab_size=ROWS, n_embd=256, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2),
        "bytes",
    ),
    "falcon-7b": (
        "falcon",
        dict(
            vocab_size=ROWS, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=1,
            multi_query=True, alibi=False, new_decoder_architecture=False, parallel_attn=True, bias=False,
            bos_token_id=1, eos_token_id=2,
        ),
        "bytes",
    ),
    "falcon-40b": (
        "falcon",
        dict(
            vocab_size=ROWS, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_kv_heads=2, alibi=False,
            new_decoder_architecture=True, parallel_attn=True, bias=False, bos_token_id=1, eos_token_id=2,
        ),
        "bytes",
    ),
    "stablelm": ("stablelm", _DECODER | dict(use_qkv_bias=True), "bytes"),
    "stablelm-12b": ("stablelm", _DECODER | dict(qk_layernorm=True, use_parallel_residual=True), "bytes"),
    "granite": (
        "granite",
        _DECODER
        | dict(
            embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.3, logits_scaling=2.0,
            tie_word_embeddings=True,
        ),
        "bytes",
    ),
    "granite-moe": ("granitemoe", _DECODER | dict(num_local_experts=4, attention_multiplier=0.125), "bytes"),
    "granite-moe-shared": (
        "granitemoeshared",
        _DECODER | dict(num_local_experts=4, shared_intermediate_size=96, attention_multiplier=0.125),
        "bytes",
    ),
    "deepseek-v2": (
        "deepseek_v2",
        _DECODER | _LATENT | dict(scoring_func="softmax", rope_parameters=_YARN | _MSCALE),
        "bytes",
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        _DECODER | _LATENT | dict(scoring_func="softmax", q_lora_rank=None, num_hidden_layers=27),
        "bytes",
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _DECODER
        | _LATENT
        | dict(
            n_routed_experts=8, n_group=2, topk_group=1, scoring_func="sigmoid",
            rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        "bytes",
    ),
}  # fmt: skip

# The embedding of the tiny models has values near one, as the residual stream of trained models is larger than what one
# block adds; otherwise two random blocks make everything, and every error twice as large.
_EMBEDDING = 10.0
# Widths that 256 divides, so that K types are used where the family allows it.
_WIDE = {"intermediate_size": 512}
_EXPERTS = {"moe_intermediate_size": 256}
_LATENT = _WIDE | _EXPERTS | dict(kv_lora_rank=256, q_lora_rank=256, qk_nope_head_dim=64, v_head_dim=64)
_CHANGES: dict[str, dict[str, Any]] = {
    "llama3": _WIDE | {"head_dim": 64},
    "qwen2-moe": _WIDE | _EXPERTS | {"shared_expert_intermediate_size": 256},
    "qwen3": _WIDE | {"head_dim": 64},
    "qwen3-moe": _WIDE | _EXPERTS,
    "gemma3": _WIDE | {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gpt2": {}, "falcon-7b": {}, "falcon-40b": {},
    "granite-moe-shared": _WIDE | {"shared_intermediate_size": 256},
    "deepseek-v2": _LATENT, "deepseek-v2-lite": _LATENT | {"q_lora_rank": None}, "deepseek-v3": _LATENT,
}  # fmt: skip

_TEXT = ("the quick brown fox jumps over the lazy dog and then there were 42 others, weren't there? " * 3).split()


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 values for the tensor `name`: of a size that keeps activations near one, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return torch.from_numpy(values * np.float32(1.5 / np.sqrt(shape[-1])))
    return torch.from_numpy(values * np.float32(0.2) + np.float32(0.5))


def build(name: str, changes: dict[str, Any] | None = None) -> torch.nn.Module:
    """The model `name` in float32, in eval mode; `changes` to the values of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, values, _ = MODELS[name]
    config = AutoConfig.for_model(kind, **values | (changes or {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(weights(key, tuple(tensor.shape)))
    return model.eval()


def tokenizer(kind: str) -> Any:
    """A tokenizer with a few merges: "bytes" is byte-level BPE, "pieces" SentencePiece BPE with bytes.

    "bare pieces" puts no space in front of a text; "phi pieces" has what llama.cpp looks for in Phi-3's.
    Ids 0, 1 and 2 are special; tokens were added by hand, and some rows of the embedding have no token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    if kind == "bytes":
        vocab = special + sorted(pre_tokenizers.ByteLevel.alphabet())
        words, space = _TEXT, "Ġ"
    else:
        letters = sorted(set("".join(_TEXT)))
        vocab = special + ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + letters
        words, space = _TEXT, "▁"
    merges: list[tuple[str, str]] = []
    for word in words:
        left = space + word[0] if len(word) > 1 else space
        steps = [(space, word[0])] if len(word) > 1 else []
        steps += [(left, word[1])] if len(word) > 2 else []
        for pair in steps:
            if pair not in merges and len(vocab) < ROWS - 12:
                merges.append(pair)
                vocab.append("".join(pair))
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)}, merges, byte_fallback=kind != "bytes", fuse_unk=kind != "bytes"
        )
    )
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁")] * (kind != "bare pieces") + [normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, "<|endoftext|>"]])
    looks = [] if kind == "phi pieces" else [AddedToken("<|im_end|>", normalized=False)]
    backend.add_tokens([*looks, AddedToken("custom word", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<|endoftext|>"
    )
    made.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    return made


def save(name: str, root: Path, changes: dict[str, Any] | None = None, embedding: float = 1.0) -> Path:
    """The model with its tokenizer in a folder under `root`, made once. `embedding`: a factor for its embedding."""
    folder = root / name
    if not (folder / "model.safetensors").is_file():
        model = build(name, changes)
        model.get_input_embeddings().weight.data.mul_(embedding)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        # Keys that checkpoints on the hub have and Transformers 5 does not write.
        config |= {"n_ctx": 512} if name == "gpt2" else {}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_tokenizer(MODELS[name][2], folder)
    return folder


def save_wide(name: str, root: Path) -> Path:
    """The model with widths that suit K types, in a folder under `root`, made once."""
    return save(name, root, _CHANGES.get(name, _WIDE), _EMBEDDING)


def save_tokenizer(kind: str, folder: Path) -> None:
    """The tokenizer as checkpoints on the hub have it: with its added tokens in tokenizer_config.json, and
    SentencePiece with its model file."""
    made = tokenizer(kind)
    made.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = made.backend_tokenizer.get_added_tokens_decoder()
    config["added_tokens_decoder"] = {str(i): {"content": t.content, "special": t.special} for i, t in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    if kind != "bytes":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(made))


def sentencepiece_model(made: Any) -> bytes:
    """A SentencePiece model file with the pieces of such a tokenizer, scored by their order."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.pad_id = 3, 0
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 1, 2
    kinds = proto.ModelProto.SentencePiece
    special = {"<pad>": kinds.CONTROL, "<s>": kinds.CONTROL, "</s>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}
    added = made.backend_tokenizer.get_added_tokens_decoder()
    for text, index in sorted(made.get_vocab().items(), key=lambda entry: entry[1]):
        if index in added and text not in special:
            continue
        is_byte = text.startswith("<0x") and len(text) == 6
        kind = special.get(text, kinds.BYTE if is_byte else kinds.NORMAL)
        model.pieces.add(piece=text, score=0.0 if kind != kinds.NORMAL else -float(index), type=kind)
    data: bytes = model.SerializeToString()
    return data
