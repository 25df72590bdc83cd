"""The models whose checkpoints the referees open: small random ones, and a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_COMMON = dict(
    vocab_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    tie_word_embeddings=False, bos_token_id=256, eos_token_id=257,
)  # fmt: skip


def _save(folder: Path, model: Any) -> Path:
    """In bfloat16, with every 37th input column of the layers four times as large and a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or ".experts." in name:
                parameter[..., ::37] *= 4
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<bos>": 256, "<eos>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def _llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    return _save(folder, LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, **_COMMON)))


def _mixtral(folder: Path) -> Path:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(12)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, **_COMMON
    )
    return _save(folder, MixtralForCausalLM(config))


def _qwen3_moe(folder: Path) -> Path:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(13)
    config = Qwen3MoeConfig(
        hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2,
        head_dim=64, norm_topk_prob=True, **_COMMON,
    )  # fmt: skip
    return _save(folder, Qwen3MoeForCausalLM(config))


def _smollm2(_folder: Path) -> Path:
    """What `make demo` fetches."""
    folder = ROOT / ".demo" / "smollm2"
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} is not there; `make referees` fetches it, as does tools/fetch_demo_model.py")
    return folder


def _gguf(folder: Path) -> Path:
    """One of `referee_gguf_models.MODELS`, by the folder's name."""
    from referee_gguf_models import save_wide

    return save_wide(folder.name, folder.parent)


# Families that llama.cpp opens, as referee_gguf_models.py calls them.
GGUF_FAMILIES = (
    "llama2", "llama3", "smollm2", "mixtral", "qwen2-moe", "qwen3", "gemma3", "phi3", "gpt2", "falcon-7b",
    "granite-moe-shared", "deepseek-v2",
)  # fmt: skip
# The first is what schemes without a model of their own are tried on.
MODELS: dict[str, Callable[[Path], Path]] = {
    "tiny-llama": _llama, "tiny-mixtral": _mixtral, "tiny-qwen3-moe": _qwen3_moe, "smollm2": _smollm2,
    **{f"gguf/{name}": _gguf for name in GGUF_FAMILIES},
}  # fmt: skip


def get_model(name: str, root: Path) -> Path:
    """The model's folder, made below `root` when it is not there."""
    folder = root / name
    return folder if (folder / "config.json").exists() else MODELS[name](folder)
