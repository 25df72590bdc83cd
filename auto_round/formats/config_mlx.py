"""The formats `mlx`, for mlx-lm, and `auto_round:mlx`, the same tensors for Transformers with this package.

mlx-lm's model classes need other names for some model types: the rules per model type were read off mlx-lm 0.32.2
(`mlx_lm/models/<model type>.py`, mostly `sanitize`), and its referee opens every type that is not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from auto_round.formats.base import ExportPlan, ModelRules, OutputFormat, SizeRule, register_format
from auto_round.formats.config_auto_round import LayoutFormat
from auto_round.layouts.base import Layout
from auto_round.layouts.integers import MLX
from auto_round.schemes import QuantizationScheme

_STACKED = "switch_mlp"
_SPARSE = (r"\.mlp\.", ".block_sparse_moe.")
_EXPERT_COUNT = (("num_experts", "num_local_experts"),)
_KV_B = "mlx-lm splits it and rounds it again while it reads it"

# By model type.
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
    # mlx-lm would read a different model, whatever the names.
    "gpt2": ModelRules(refused="mlx-lm transposes GPT-2's weights while it reads them, which breaks packed ones"),
    "qwen3_next": ModelRules(
        refused="mlx-lm shifts the norms of Qwen3-Next only in checkpoints that were never quantized"
    ),
}  # fmt: skip
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")


def with_legacy_rope(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's values with the rotary keys before Transformers 5, the only ones that mlx-lm reads."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return dict(values)
    added: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):  # Gemma 3
        added["rope_local_base_freq"] = (parameters.get("sliding_attention") or {}).get("rope_theta")
        parameters = parameters["full_attention"]
    plain = ("rope_theta", "partial_rotary_factor")
    added |= {key: parameters.get(key) for key in plain}
    if (kind := parameters.get("rope_type", "default")) != "default":
        added["rope_scaling"] = {k: v for k, v in parameters.items() if k not in plain} | {"type": kind}
    made = {**values, **{k: v for k, v in added.items() if v is not None and values.get(k) is None}}
    scaling = made.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling:
        made["rope_scaling"] = {**scaling, "type": scaling.get("type", scaling["rope_type"])}
    return made


def mlx_quantization(plan: ExportPlan, rules: ModelRules) -> dict[str, Any]:
    """The `quantization` object of an MLX config.json: the default, then each module's own or false."""
    values = lambda scheme: scheme.quantizes_weights and {"group_size": scheme.group_size, "bits": scheme.bits}
    result: dict[str, Any] = {**values(plan.default_scheme()), **{rules.module_name(n): False for n in plan.embeddings}}
    return result | {rules.module_name(name): values(scheme) for name, scheme in plan.layers.items()}


def _without_prediction_layers(values: dict[str, Any]) -> dict[str, Any]:
    """config.json's values without multi-token prediction layers, whose tensors mlx-lm would reject as unknown."""
    text = values.get("text_config")
    parts = {"text_config": _without_prediction_layers(text)} if isinstance(text, dict) else {}
    return {**values, **parts, **{key: 0 for key in _PREDICTION_LAYERS if values.get(key)}}


@register_format("mlx")
class MlxFormat(OutputFormat):
    """A folder that mlx-lm opens: its tensor names, stacked experts and rotary keys."""

    loadable_here: ClassVar[bool] = False
    opens_in_transformers: ClassVar[bool] = False
    checkpoint_names: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()
    fusing_runtimes: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[Mapping[str, SizeRule]] = {"int": SizeRule(groups=(32, 64, 128))}

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return MLX

    def rules(self, model_type: str) -> ModelRules:
        """An untested type is written under Transformers' names, with a note."""
        known = ", ".join(sorted(t for t, rules in MLX_FAMILIES.items() if rules.refused is None))
        untested = ModelRules(
            note=f"format mlx: models of type {model_type!r} were not tried in mlx-lm; names are written as "
            f"Transformers has them (tried: {known})"
        )
        return MLX_FAMILIES.get(model_type, untested)

    def quantization_config(self, plan: ExportPlan, default: QuantizationScheme) -> dict[str, Any] | None:
        return mlx_quantization(plan, self.rules(plan.model_type))

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        values = with_legacy_rope(values)
        keys = self.rules(plan.model_type).config
        values |= {key: values[other] for key, other in keys if key not in values and other in values}
        quantization = self.config(plan)
        own = {} if quantization is None else {"quantization": quantization, "quantization_config": quantization}
        return (_without_prediction_layers(values) if plan.spare else values) | own


@register_format("auto_round:mlx")
class AutoRoundMlxFormat(LayoutFormat):
    """MLX tensors under Transformers' names, with AutoRound's `quantization_config`, which this package's loader reads.
    The `quantization` object is included, so mlx-lm opens the files of model types whose names it shares."""

    stored_layout: ClassVar[Layout] = MLX
    packing_format: ClassVar[str] = "mlx"
    cache_scale_tail: ClassVar[tuple[int, ...] | None] = None
    rejects_fused_layers: ClassVar[bool] = False  # experts' packed tensors have the modules' names
    fusing_runtimes: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[Mapping[str, SizeRule]] = MlxFormat.sizes

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        values = with_legacy_rope(super().model_config(values, plan))
        return values | {"quantization": mlx_quantization(plan, ModelRules())} if plan.quantized_layers() else values
