"""How compressed-tensors checkpoints name the experts of a mixture, as data.

Readers put single experts together by the names that a family's own checkpoints have, and fill what they do not find
with random numbers. Read off Transformers 5.23 (`conversion_mapping`); vLLM uses the same names.
"""

from __future__ import annotations

from auto_round.export.expert_names import EXPERT_NAMES
from auto_round.export.model_rules import PLAIN, ModelRules

# `experts.0.gate_proj` and so on, as the modules here are called.
_BY_MODULE = (
    "afmoe", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba",
    "longcat_flash", "mellum", "mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe_text", "solar_open",
)  # fmt: skip
_NO_NAMES = "its family's checkpoints hold all experts of a block in one tensor, and readers know no other names"

FAMILIES: dict[str, ModelRules] = {
    **dict.fromkeys(_BY_MODULE, PLAIN),
    **{model_type: ModelRules(renames=renames) for model_type, renames in EXPERT_NAMES.items()},
}
# Experts of any other family stay dense, and are written as that family's own checkpoints have them.
_OTHERS = ModelRules(dense=((r"\.experts\.\d+\.", _NO_NAMES),))


def compressed_tensors_rules(model_type: str) -> ModelRules:
    """The rules of a model type."""
    return FAMILIES.get(model_type, _OTHERS)
