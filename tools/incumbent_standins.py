#!/usr/bin/env python3
"""Small models with random weights under the names of the hub models that the incumbent's tests load.

Each has the architecture of the model it stands for and a tokenizer trained on the spot. Their widths are multiples of
256, so that every scheme and file type of the tests takes them. OPT is there twice, for the tests that name its width.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import torch

VOCAB = 1024
_TEXT = Path(__file__).resolve().parents[1] / "auto_round" / "calibration" / "data" / "builtin.txt.xz"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDS: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LLAMA: dict[str, Any] = _IDS | dict(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048
)
_DEEPSEEK: dict[str, Any] = _LLAMA | dict(
    num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2,
    n_shared_experts=1, kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
_VISION: dict[str, Any] = dict(
    depth=3, embed_dim=256, hidden_size=256, num_heads=4, mlp_ratio=2, patch_size=14, in_channels=3
)

OPT, WIDE_OPT, WIDTH = "facebook/opt-125m-small", "facebook/opt-125m-wide", "768"
_OPT: dict[str, Any] = _IDS | dict(num_hidden_layers=6, max_position_embeddings=2048, dropout=0.0)

STANDINS: dict[str, tuple[str, dict[str, Any]]] = {
    OPT: ("OPTConfig", _OPT | dict(hidden_size=256, ffn_dim=1024, num_attention_heads=4, word_embed_proj_dim=256)),
    WIDE_OPT: (
        "OPTConfig", _OPT | dict(hidden_size=768, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768)
    ),
    "Qwen/Qwen3-0.6B": ("Qwen3Config", _LLAMA | dict(num_hidden_layers=4, head_dim=64, tie_word_embeddings=True)),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2Config", _LLAMA | dict(num_hidden_layers=24, tie_word_embeddings=True)),
    "MBZUAI/LaMini-GPT-124M": (
        "GPT2Config",
        _IDS | dict(n_embd=256, n_layer=4, n_head=4, n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ),
    "hf-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJConfig",
        _IDS | dict(n_embd=256, n_layer=3, n_head=4, n_positions=512, rotary_dim=16, resid_pdrop=0.0, embd_pdrop=0.0),
    ),
    "microsoft/phi-2": (
        "PhiConfig", _LLAMA | dict(num_hidden_layers=4, num_key_value_heads=4, resid_pdrop=0.0, embd_pdrop=0.0)
    ),
    "microsoft/phi-4": ("Phi3Config", _LLAMA | dict(num_hidden_layers=3)),
    "stas/tiny-random-llama-2": ("LlamaConfig", _LLAMA | dict(num_hidden_layers=2)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("LlamaConfig", _LLAMA | dict(num_hidden_layers=4)),
    "benzart/gemma-2b-it-fine-tuning-for-code-test": (
        "GemmaConfig", _LLAMA | dict(num_hidden_layers=3, head_dim=64, num_key_value_heads=1)
    ),
    "deepseek-ai/DeepSeek-V2-Lite": ("DeepseekV2Config", _DEEPSEEK),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("DeepseekV2Config", _DEEPSEEK),
    "tflsxyy/DeepSeek-V3-bf16-4layers": ("DeepseekV3Config", _DEEPSEEK | dict(q_lora_rank=128)),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeConfig",
        _LLAMA | dict(
            num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256,
            shared_expert_intermediate_size=256, decoder_sparse_step=1,
        ),
    ),
    "unsloth/gpt-oss-20b": (
        "GptOssConfig",
        _LLAMA | dict(num_hidden_layers=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2),
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        "Qwen2VLConfig",
        dict(
            text_config=_LLAMA | dict(
                num_hidden_layers=3, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
            ),
            vision_config=_VISION, image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        ),
    ),
}  # fmt: skip


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer that splits words as GPT-2's does, which llama.cpp knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = lzma.decompress(_TEXT.read_bytes()).decode()[:400_000]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<vision>", "</vision>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    fast.chat_template = _TEMPLATE
    return fast


def make_standins(folder: Path) -> dict[str, Path]:
    """Write every stand-in below `folder`, under its hub name, unless it is there. Returns their folders."""
    import transformers

    made: dict[str, Path] = {}
    tokenizer: Any = None
    for name, (config_class, fields) in STANDINS.items():
        target = folder / name
        made[name] = target
        if (target / "standin.json").is_file():
            continue
        tokenizer = tokenizer or make_tokenizer()
        config = getattr(transformers, config_class)(**fields)
        torch.manual_seed(0)
        kind = "AutoModelForImageTextToText" if "VL" in name else "AutoModelForCausalLM"
        model = getattr(transformers, kind).from_config(config).eval().to(torch.bfloat16)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "standin.json").write_text(json.dumps({"name": name, "config": config_class}))
    return made


def choose_opt(folder: Path, wide: bool) -> None:
    """Let OPT's hub name mean the small stand-in, or the one of its real width."""
    link = folder / "facebook" / "opt-125m"
    link.unlink(missing_ok=True)
    link.symlink_to((WIDE_OPT if wide else OPT).rpartition("/")[2])
