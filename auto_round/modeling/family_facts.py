"""What names and shapes of a checkpoint cannot tell about a family of models, as data.

A checkpoint read without its model class is understood from its tensors' names and shapes. The rows here say what else
is needed: names that differ between files and modules, how experts are fused, what stays in float32. They repeat, for
the families that have them, Transformers' `conversion_mapping` and class attributes (as of 5.23); a test holds both
against each other. A family without a row has files whose names are those of its modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FamilyFacts:
    """One family.

    Attributes:
        renames: (regular expression, replacement), applied in order to the names in the files.
        prefix: of the base model, which files saved without a head lack.
        fused_experts: the modules hold the experts of a block as 3-D parameters, however the files hold them.
        transposed, interleaved: of such parameters, see `modeling.experts.ExpertPiece`.
        conv1d: last names of linear layers that store [in, out].
        float32: regular expression of tensors that stay in float32 in any model.
        float32_in_float16: the same, in float16 models only.
        unread: regular expression of tensors that old files hold and no module has.
        refused: why files of this family cannot be read by their names, or "".
    """

    renames: Renames = ()
    prefix: str = ""
    fused_experts: bool = False
    transposed: bool = False
    interleaved: bool = False
    conv1d: tuple[str, ...] = ()
    float32: str = ""
    float32_in_float16: str = ""
    unread: str = ""
    refused: str = ""

    def module_name(self, stored: str) -> str:
        """The name that the modules have for a tensor of the files."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored


_W123: Renames = (
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."), (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
)  # fmt: skip
_SPARSE: Renames = ((r"\.block_sparse_moe\.", ".mlp."), *_W123)
_BIAS = "e_score_correction_bias"
_GRANITE: Renames = (
    (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
    (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
    (r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
)
_LLAVA: Renames = (
    (r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.", "model.language_model."), (r"^vision_tower", "model.vision_tower"),
    (r"^multi_modal_projector", "model.multi_modal_projector"),
)  # fmt: skip
_MOE = FamilyFacts(fused_experts=True)
_MOE_BIAS = FamilyFacts(fused_experts=True, float32=_BIAS)
_SPLIT = FamilyFacts(refused="its files hold matrices joined or apart that its modules do not")
_NAMED = FamilyFacts(refused="its files have other names than its modules, which only the model's class knows")

FAMILIES: dict[str, FamilyFacts] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), FamilyFacts(_SPARSE, fused_experts=True)),
    "phimoe": FamilyFacts(
        (*_SPARSE, (r"(\.mlp)\.gate\.weight", r"\1.router.weight")), fused_experts=True
    ),
    "lfm2_moe": FamilyFacts(_W123, fused_experts=True),
    **dict.fromkeys(
        ("beam", "cohere2_moe", "flex_olmo", "hunyuan_v1_moe", "mellum", "olmoe", "qwen2_moe", "qwen3_moe",
         "qwen3_next", "deepseek_v2", "qwen3_5_moe_text"), _MOE,
    ),
    **dict.fromkeys(
        ("deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "solar_open", "axk1"), _MOE_BIAS
    ),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"),
        FamilyFacts(fused_experts=True, float32=_BIAS, float32_in_float16=r"indexer\.weights_proj"),
    ),
    "exaone_moe": FamilyFacts(
        ((r"mlp\.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),), fused_experts=True,
        float32=_BIAS,
    ),
    "ernie4_5_moe": FamilyFacts(
        ((r"mlp\.moe_statics\.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),),
        fused_experts=True, float32=r"gate\.weight|moe_statics",
    ),
    "mimo_v2_flash": FamilyFacts(
        ((r"self_attn\.attention_sink_bias", "self_attn.sinks"),), fused_experts=True, float32=_BIAS
    ),
    "gpt_oss": FamilyFacts(
        fused_experts=True, transposed=True, interleaved=True,
        float32_in_float16="post_attention_layernorm|input_layernorm|norm",
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid", "granitemoeshared"),
        FamilyFacts(_GRANITE, fused_experts=True),
    ),
    "gpt2": FamilyFacts(
        prefix="transformer", conv1d=("c_attn", "c_proj", "c_fc"), unread=r"\.attn\.(masked_)?bias$"
    ),
    "gpt_neox": FamilyFacts(
        ((r"^embed_out\.", "lm_head."),), prefix="gpt_neox",
        unread=r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$",
    ),
    "opt": FamilyFacts(((r"^decoder\.", "model.decoder."),), prefix="model"),
    "bloom": FamilyFacts(prefix="transformer"),
    "falcon": FamilyFacts(prefix="transformer"),
    "gemma3n_text": FamilyFacts(((r"^model\.language_model\.", "model."),)),
    "qwen3_5_text": FamilyFacts(((r"^model\.language_model\.", "model."),)),
    **dict.fromkeys(("gemma3", "got_ocr2", "mistral3"), FamilyFacts(_LLAVA)),
    **dict.fromkeys(
        ("hrm_text", "olmo_hybrid", "bailing_hybrid", "kimi_linear", "axk2", "aria_text", "aria", "flint",
         "inkling2_text", "inkling2", "inkling_mm_model", "qwen4_exp_text", "qwen4_exp", "qwen3_vl_moe", "kimi_k25"),
        _SPLIT,
    ),
    **dict.fromkeys(
        ("deepseek_v4", "hy_v3", "hy_v4", "kolibri1", "laguna", "lfm3", "nemotron_h", "jamba", "longcat_flash",
         "afmoe", "emu3", "fuyu", "mllama", "gemma4_unified"), _NAMED,
    ),
}  # fmt: skip

PLAIN_FAMILY = FamilyFacts()
# What no module of any family holds: tables that are computed, and were saved by old versions.
UNREAD_EVERYWHERE = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.masked_bias$")


def family_facts(model_type: str) -> FamilyFacts:
    """The row of a `model_type`."""
    return FAMILIES.get(model_type, PLAIN_FAMILY)
