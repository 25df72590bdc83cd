"""Write checkpoints for mlx-lm to open, with what it must compute. Run where auto_round is installed.

    python test/referees/mlx/make_cells.py FOLDER [NAME ...]

Each cell is a folder `FOLDER/NAME` with a checkpoint in format mlx (or auto_round:mlx), `ids.npy`, `logits.npy` and
`weights.npz`: logits of the model whose weights are dequantized in float32, by Transformers, and some of those weights.
`test_cells.py` beside this file judges them inside the environment of mlx-lm.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SMALL: dict[str, Any] = dict(
    vocab_size=288, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
_MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)

# name -> (Transformers' config class, its values)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL | _ROPE | dict(tie_word_embeddings=False)),
    "llama-tied": ("LlamaConfig", _SMALL | _ROPE | dict(tie_word_embeddings=True)),
    "llama-bias": ("LlamaConfig", _SMALL | dict(attention_bias=True, mlp_bias=True)),
    "llama3-rope": (
        "LlamaConfig",
        _SMALL
        | dict(
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        ),
    ),
    "mistral": ("MistralConfig", _SMALL | _ROPE | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", _SMALL | _ROPE),
    "qwen3": ("Qwen3Config", _SMALL | _ROPE | dict(head_dim=32)),
    "gemma": ("GemmaConfig", _SMALL | _ROPE | dict(head_dim=32)),
    "gemma2": ("Gemma2Config", _SMALL | _ROPE | dict(head_dim=32, query_pre_attn_scalar=32)),
    "gemma3_text": (
        "Gemma3TextConfig",
        _SMALL
        | dict(
            head_dim=32, query_pre_attn_scalar=32, sliding_window=8, num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"], sliding_window_pattern=2,
        ),
    ),
    "phi": ("PhiConfig", _SMALL | _ROPE | dict(num_key_value_heads=4)),
    "phi3": ("Phi3Config", _SMALL | _ROPE | dict(original_max_position_embeddings=64)),
    "olmo2": ("Olmo2Config", _SMALL | _ROPE),
    "smollm3": ("SmolLM3Config", _SMALL | _ROPE),
    "granite": ("GraniteConfig", _SMALL | _ROPE),
    "cohere": ("CohereConfig", _SMALL | _ROPE),
    "starcoder2": ("Starcoder2Config", _SMALL | _ROPE),
    "stablelm": ("StableLmConfig", _SMALL | _ROPE),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"} | dict(intermediate_size=512),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _SMALL | _ROPE | _MOE | dict(shared_expert_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _SMALL | _ROPE | _MOE | dict(head_dim=32, mlp_only_layers=[])),
    "qwen3_moe-not-all": ("Qwen3MoeConfig", _SMALL | _ROPE | _MOE | dict(head_dim=32, mlp_only_layers=[0])),
    "mixtral": ("MixtralConfig", _SMALL | _ROPE | dict(num_local_experts=4, sliding_window=None)),
    "olmoe": ("OlmoeConfig", _SMALL | _ROPE | dict(num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "GptOssConfig",
        _SMALL | dict(head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    ),
    "phimoe": ("PhimoeConfig", _SMALL | dict(num_local_experts=4, attention_bias=True, lm_head_bias=True)),
    "granitemoe": ("GraniteMoeConfig", _SMALL | _ROPE | dict(num_local_experts=4)),
    "deepseek_v3": (
        "DeepseekV3Config",
        _SMALL
        | dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
            qk_rope_head_dim=32, v_head_dim=32, num_key_value_heads=4,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        _SMALL
        | dict(
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
                "mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16,
            },
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
            qk_rope_head_dim=32, v_head_dim=32, num_key_value_heads=4, topk_method="greedy",
        ),
    ),
    "glm4": ("Glm4Config", _SMALL | dict(head_dim=32)),
    "seed_oss": ("SeedOssConfig", _SMALL | _ROPE | dict(head_dim=32)),
    "ernie4_5": ("Ernie4_5Config", _SMALL | _ROPE | dict(head_dim=32)),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _SMALL | _ROPE | dict(head_dim=32)),
}  # fmt: skip

MIXED: dict[str, Any] = dict(
    bits=4, group_size=32, ignore_layers="o_proj",
    layer_config={
        "k_proj": {"bits": 8, "group_size": 64}, "v_proj": {"sym": False}, "down_proj": {"bits": 3, "group_size": 128},
        "layers.1.mlp.up_proj": {"bits": 5}, "layers.0.mlp.up_proj": {"bits": 6, "sym": False}, "lm_head": {"bits": 2},
    },
)  # fmt: skip


def cells() -> dict[str, tuple[str, dict[str, Any], str]]:
    """name -> (family, AutoRound's arguments, format)."""
    found: dict[str, tuple[str, dict[str, Any], str]] = {}
    for bits in (2, 3, 4, 5, 6, 8):
        for size in (32, 64, 128):
            for sym in (True, False):
                name = f"llama-w{bits}g{size}{'' if sym else '-asym'}"
                found[name] = ("llama", dict(bits=bits, group_size=size, sym=sym), "mlx")
    for fmt in ("mlx", "auto_round:mlx"):
        found[f"llama-mixed-{fmt.replace(':', '-')}"] = ("llama", MIXED, fmt)
    found["llama-tied-head"] = ("llama-tied", dict(bits=4, group_size=32, quant_lm_head=True), "mlx")
    found["qwen3_moe-experts-dense"] = ("qwen3_moe", dict(bits=4, group_size=32, ignore_layers=r"experts\."), "mlx")
    found["qwen3_moe-mixed"] = ("qwen3_moe", dict(scheme="W4A16_MIXED", group_size=32), "mlx")
    found["mixtral-asym"] = ("mixtral", dict(bits=3, group_size=32, sym=False), "mlx")
    for family in FAMILIES:
        found[f"family-{family}"] = (family, dict(bits=4, group_size=32), "mlx")
    return found


def build(family: str, folder: Path) -> Path:
    """A random float32 model of the family, saved."""
    if (folder / "config.json").exists():
        return folder
    import transformers

    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**values)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale + (0.5 if parameter.dim() == 1 else 0))
    model.save_pretrained(folder)
    return folder


def write(name: str, root: Path) -> None:
    """One cell."""
    from transformers import AutoModelForCausalLM

    from auto_round import AutoRound

    family, options, fmt = cells()[name]
    source = build(family, root / "sources" / family)
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    ar = AutoRound(str(source), iters=0, disable_opt_rtn=True, **options)
    _, folders = ar.quantize_and_save(folder, format=[fmt, "fake"])
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    ids = np.random.default_rng(5).integers(3, 250, (2, 24))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    weights = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.startswith("model.layers.1.")}
    Path(folders[0]).rename(folder / "checkpoint")
    shutil.rmtree(folders[1])
    np.save(folder / "ids.npy", ids)
    np.save(folder / "logits.npy", logits)
    np.savez(folder / "weights.npz", **{n: w.detach().numpy() for n, w in weights.items() if w.dim() == 2})


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for cell in sys.argv[2:] or cells():
        write(cell, place)
        print(cell, flush=True)
