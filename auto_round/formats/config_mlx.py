"""The formats `mlx`, for mlx-lm, and `auto_round:mlx`, the same tensors for Transformers with this package.

| tensor | dtype | holds |
|---|---|---|
| weight | uint32 [out, in*bits/32] | codes, see `layouts.mlx` |
| scales | float16 [out, groups] | the tuned scales |
| biases | float16 or float32 [out, groups] | -scales * zero point, exact: float32 for asymmetric layers |

mlx-lm's model classes need other names for some model types: the rules per model type were read off mlx-lm 0.32.2
(`mlx_lm/models/<model type>.py`, mostly `sanitize`) and its referee opens every type that is not refused. mlx-lm
also reads only the rotary keys that configs had before Transformers 5, which `with_legacy_rope` adds:

| Transformers 5 | before |
|---|---|
| rope_parameters.rope_theta | rope_theta |
| rope_parameters.rope_type and its numbers, unless "default" | rope_scaling |
| rope_parameters.partial_rotary_factor | partial_rotary_factor |
| rope_parameters.full_attention, .sliding_attention (Gemma 3) | the above, and rope_local_base_freq |
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from auto_round.formats.base import DEFAULT_RULES, ExportPlan, ModelRules, OutputFormat, register_format
from auto_round.formats.config_auto_round import AutoRoundFormat
from auto_round.formats.table import MLX_SIZES
from auto_round.layouts.base import Layout, stored_group_size
from auto_round.layouts.mlx import MLX, MLX_BITS
from auto_round.schemes import QuantizationScheme

_STACKED = "switch_mlp"
_SPARSE = (r"\.mlp\.", ".block_sparse_moe.")
_EXPERT_COUNT = (("num_experts", "num_local_experts"),)
_KV_B = "mlx-lm splits it and rounds it again while it reads it"

# model type -> rules. The referee of this format opens every type that is not refused.
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


def mlx_rules(model_type: str) -> ModelRules:
    """Rules for a model type; an untested type is written under Transformers' names, with a note."""
    if model_type in MLX_FAMILIES:
        return MLX_FAMILIES[model_type]
    known = ", ".join(sorted(t for t, rules in MLX_FAMILIES.items() if rules.refused is None))
    return ModelRules(
        note=f"format mlx: models of type {model_type!r} were not tried in mlx-lm; names are written as Transformers "
        f"has them (tried: {known})"
    )


def with_legacy_rope(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's values with the pre-Transformers-5 keys beside `rope_parameters`, unless present."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return values
    added: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and local.get("rope_theta") is not None:
            added["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is not None:
            added[key] = parameters[key]
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        added["rope_scaling"] = rest | {"type": kind}
    made = {**values, **{key: value for key, value in added.items() if values.get(key) is None}}
    scaling = made.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling:
        made["rope_scaling"] = {**scaling, "type": scaling.get("type", scaling["rope_type"])}
    return made


_SCHEMES = ("W2A16", "W2A16G64", "W2A16G32", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16", "W4A16_MIXED", "BF16")


class _MlxTensors(OutputFormat):
    """Layout and size rules that both formats share."""

    stores_cache_scales: ClassVar[bool] = False
    support_schemes: ClassVar[tuple[str, ...]] = _SCHEMES
    fusing_runtimes: ClassVar[tuple[str, ...]] = ()

    def check_scheme(self, scheme: QuantizationScheme) -> str | None:
        if not scheme.quantizes_weights:
            return None
        if scheme.data_type != "int":
            return f"data type {scheme.data_type!r} is not written by this version, only int"
        if scheme.quantizes_activations:
            return "activations are quantized, and MLX layers hold weights only"
        if scheme.super_bits is not None:
            return "doubly quantized scales need a gguf format"
        if scheme.bits not in MLX_BITS:
            return f"MLX has no {scheme.bits}-bit weights, only {', '.join(map(str, MLX_BITS))} bits"
        if scheme.group_size not in MLX_SIZES.groups:
            allowed = ", ".join(map(str, MLX_SIZES.groups))
            return f"MLX has no group size {scheme.group_size}, only {allowed}; set group_size"
        return None

    def check_layer(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        if not scheme.quantizes_weights:
            return None
        return MLX_SIZES.problem(in_features, out_features, stored_group_size(scheme))

    def layout(self, scheme: QuantizationScheme) -> Layout:
        return MLX


_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")


def mlx_quantization(plan: ExportPlan, rules: ModelRules) -> dict[str, Any] | None:
    """The `quantization` object of an MLX config.json, None without a quantized layer: the default bits and group size,
    then those of every linear layer and embedding by module name, or false where it is unquantized."""
    names = plan.quantized_layers()
    if not names:
        return None
    values = Counter((plan.layers[n].group_size, plan.layers[n].bits) for n in names)
    default = (plan.scheme.group_size, plan.scheme.bits)
    size, bits = default if default in values else values.most_common(1)[0][0]
    result: dict[str, Any] = {"group_size": size, "bits": bits}
    result |= {rules.module_name(name): False for name in plan.embeddings}
    for name, scheme in plan.layers.items():
        entry = {"group_size": scheme.group_size, "bits": scheme.bits} if scheme.quantizes_weights else False
        result[rules.module_name(name)] = entry
    return result


def drop_prediction_layers(values: dict[str, Any]) -> dict[str, Any]:
    """config.json's values without multi-token prediction layers, whose tensors mlx-lm would reject as unknown."""
    cut = {key: 0 for key in _PREDICTION_LAYERS if values.get(key)}
    parts = {k: drop_prediction_layers(v) for k, v in values.items() if k == "text_config" and isinstance(v, dict)}
    return {**values, **parts, **cut}


@register_format("mlx")
class MlxFormat(_MlxTensors):
    """A folder that mlx-lm opens: its tensor names, stacked experts and rotary keys."""

    loadable_here: ClassVar[bool] = False
    opens_in_transformers: ClassVar[bool] = False
    checkpoint_names: ClassVar[bool] = False
    config_files: ClassVar[tuple[str, ...]] = ()

    def rules(self, model_type: str) -> ModelRules:
        return mlx_rules(model_type)

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return mlx_quantization(plan, self.rules(plan.model_type))

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        quantization = self.config(plan)
        values = self.rules(plan.model_type).with_config(with_legacy_rope(values))
        if plan.spare:
            values = drop_prediction_layers(values)
        if quantization is None:
            return values
        return values | {"quantization": quantization, "quantization_config": quantization}


@register_format("auto_round:mlx")
class AutoRoundMlxFormat(_MlxTensors, AutoRoundFormat):
    """MLX tensors under Transformers' names, with AutoRound's `quantization_config`, which this package's loader reads.

    The `quantization` object is included, so mlx-lm opens the files of model types whose names it shares.
    """

    rejects_fused_layers: ClassVar[bool] = False  # experts' packed tensors have the modules' names

    def packing(self, scheme: QuantizationScheme) -> str:
        return "mlx"

    def config(self, plan: ExportPlan) -> dict[str, Any] | None:
        return AutoRoundFormat.config(self, plan)

    def model_config(self, values: dict[str, Any], plan: ExportPlan) -> dict[str, Any]:
        values = with_legacy_rope(super().model_config(values, plan))
        quantization = mlx_quantization(plan, DEFAULT_RULES)
        return values if quantization is None else values | {"quantization": quantization}
