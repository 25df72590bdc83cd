"""What mlx-lm's model classes expect beyond the names of Transformers' modules, as data.

Read off mlx-lm 0.32.2 (`mlx_lm/models/<model type>.py`, mostly `sanitize`), and opened there by its referee.
"""

from __future__ import annotations

from auto_round.export.model_rules import ModelRules

_STACKED = "switch_mlp"
_SPARSE = (r"\.mlp\.", ".block_sparse_moe.")
_EXPERT_COUNT = (("num_experts", "num_local_experts"),)
_KV_B = "mlx-lm takes it apart and rounds it again while it reads it"

# model type -> rules. Those that are not refused are opened by the referee of this format.
MLX_FAMILIES: dict[str, ModelRules] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "smollm3",
            "granite", "cohere", "starcoder2", "stablelm", "glm4", "seed_oss", "ernie4_5", "hunyuan_v1_dense",
        ),
        ModelRules(),
    ),
    "gpt_neox": ModelRules(
        renames=((r"^gpt_neox\.layers\.", "model.h."), (r"^gpt_neox\.", "model."), (r"^lm_head\.", "model.embed_out.")),
        config=(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")),
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ModelRules(experts=_STACKED, config=_EXPERT_COUNT)),
    "deepseek_v2": ModelRules(experts=_STACKED),
    "deepseek_v3": ModelRules(experts=_STACKED, dense=((r"\.kv_b_proj$", _KV_B),)),
    "mixtral": ModelRules(experts=_STACKED, renames=(_SPARSE,)),
    "phimoe": ModelRules(experts=_STACKED, renames=(_SPARSE, (r"_moe\.router\.", "_moe.gate."))),
    "granitemoe": ModelRules(experts=_STACKED, renames=((r"_moe\.router\.", "_moe.router.layer."),)),
    "gpt_oss": ModelRules(experts="experts"),
    # Here names alone would not do: what is read would be another model.
    "gpt2": ModelRules(refused="mlx-lm transposes GPT-2's weights while it reads them, which packed ones do not bear"),
    "qwen3_next": ModelRules(
        refused="mlx-lm shifts the norms of Qwen3-Next only in checkpoints that were never quantized"
    ),
}  # fmt: skip


def mlx_rules(model_type: str) -> ModelRules:
    """Rules for a model type; one that was never tried there is written as it is, with a note."""
    if model_type in MLX_FAMILIES:
        return MLX_FAMILIES[model_type]
    known = ", ".join(sorted(t for t, rules in MLX_FAMILIES.items() if rules.refused is None))
    return ModelRules(
        note=f"format mlx: models of type {model_type!r} were not tried in mlx-lm; names are written as Transformers "
        f"has them (tried: {known})"
    )
