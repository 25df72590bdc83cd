"""Linear layers that serving engines build without quantization, by family, with the engine's source.

An engine that builds a layer unquantized finds no tensor of its name in a packed checkpoint and refuses it, or joins
it with a layer of another scheme. Such layers stay dense by default in the formats that these engines read; an entry of
`layer_config` for the layer wins. Rows go by names alone, so that flows with and without a model's class agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineDenseRow:
    """Layers of some families that an engine keeps dense.

    Attributes:
        families: regular expression that a whole `model_type` has to match.
        layers: regular expression that is searched in a layer's name.
        reason: why, for the user.
        source: engine, file and class that show it.
    """

    families: str
    layers: str
    reason: str
    source: str


_ONE_PER_HEAD = "it gates linear attention with one output per head, fewer than the tiles of engines' kernels"

ENGINE_DENSE: tuple[EngineDenseRow, ...] = (
    EngineDenseRow(
        ".*", r"\bindexer\.(\w+\.)?weights_proj$", "it weighs the heads of a sparse-attention indexer",
        "vLLM model_executor/models/deepseek_v2.py Indexer.wk_weights_proj (quant_config=None); SGLang "
        "srt/layers/attention/nsa/nsa_indexer.py Indexer.weights_proj and dsv4/indexer.py C4Indexer.weights_proj",
    ),
    EngineDenseRow(
        ".*", r"\bindexer\.wk$", "engines join it with the dense weights_proj of its indexer",
        "vLLM model_executor/models/deepseek_v2.py Indexer.wk_weights_proj (quant_config=None)",
    ),
    EngineDenseRow(
        "deepseek_v4", r"\bcompressor\.(indexer\.)?(kv_proj|gate_proj|wkv|wgate)$",
        "it compresses keys and values for sparse attention",
        "vLLM models/deepseek_v4/compressor.py DeepseekCompressor.fused_wkv_wgate (quant_config=None)",
    ),
    EngineDenseRow(
        "deepseek_v4", r"\.(o_a_proj|wo_a)$", "it multiplies groups of heads by blocks of its weight",
        "SGLang srt/models/deepseek_v4.py MQALayer.wo_a (quant_config=None unless FP8)",
    ),
    EngineDenseRow(
        ".*", r"\blinear_attn\.in_proj_(a|b|ba)$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py QwenGatedDeltaNetAttention.in_proj_ba (joined; "
        "no block-wise FP8) and layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineDenseRow(
        "olmo_hybrid", r"\blinear_attn\.[ab]_proj$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/mamba/gdn OlmoHybridGatedDeltaNetAttention.a_proj, b_proj (kept apart for "
        "precision) and layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineDenseRow(
        "kimi_linear|bailing_hybrid", r"\bself_attn\.b_proj$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/kda.py KimiDeltaAttention.b_proj and "
        "layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineDenseRow(
        ".*", r"\.shared_expert_gate$", "it weighs the shared expert",
        "vLLM model_executor/models/qwen3_next.py Qwen3NextSparseMoeBlock.shared_expert_gate (quant_config=None)",
    ),
    EngineDenseRow(
        "mamba|falcon_mamba|jamba", r"\.(mixer|mamba)\.(x_proj|dt_proj)$", "it selects the time steps of a state space",
        "vLLM model_executor/layers/mamba/mamba_mixer.py MambaMixer.x_proj, dt_proj (no quant_config)",
    ),
)  # fmt: skip


def engine_dense(model_type: str, layer: str) -> EngineDenseRow | None:
    """The row that keeps a layer dense, by the name that the modules of a family or its files have for it."""
    for row in ENGINE_DENSE:
        if re.fullmatch(row.families, model_type) and re.search(row.layers, layer):
            return row
    return None
