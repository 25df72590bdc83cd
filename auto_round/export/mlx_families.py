"""What mlx-lm's model classes expect beyond the names of Transformers' modules, as data.

Read off mlx-lm 0.32.2 (`mlx_lm/models/<model type>.py`, mostly `sanitize`), and opened there by its referee.
"""

from __future__ import annotations

from auto_round.export.model_rules import ModelRules

_SWITCH = ModelRules(experts="switch_mlp")

# model type -> rules. Every family named here is opened by the referee of this format.
MLX_FAMILIES: dict[str, ModelRules] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ModelRules()),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _SWITCH),
    "mixtral": ModelRules(experts="switch_mlp", renames=((r"\.mlp\.", ".block_sparse_moe."),)),
    # It turns these weights around while it reads them, packed or not.
    "gpt2": ModelRules(refused="mlx-lm transposes GPT-2's weights while it reads them, which packed ones do not bear"),
}


def mlx_rules(model_type: str) -> ModelRules:
    """Rules for a model type; one that was never tried there is written as it is, with a note."""
    if model_type in MLX_FAMILIES:
        return MLX_FAMILIES[model_type]
    known = ", ".join(sorted(t for t, rules in MLX_FAMILIES.items() if rules.refused is None))
    return ModelRules(
        note=f"format mlx: models of type {model_type!r} were not tried in mlx-lm; names are written as Transformers "
        f"has them (tried: {known})"
    )
