"""Rules on layers: which ones runtimes fuse, engines leave unquantized, or are routers, and why a weight is left out.

Names, classes and widths decide, so that a model and the module tree of its checkpoint agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.modeling.blocks import is_linear, overrides_forward, weight_2d
from auto_round.modeling.experts import LinearExperts, SharedExperts

# Serving engines merge q, k and v, then gate and up, into single tensors. The layers should share one scheme, or the
# runtime refuses the checkpoint.
FUSED_SUFFIXES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("gate_proj", "up_proj"),
    ("w1", "w3"), ("in_proj_qkv", "in_proj_z"), ("in_proj_a", "in_proj_b"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
_EXPERT_LAYER = re.compile(r"^(?P<parent>.*\bexperts)\.\d+\.(?P<leaf>[^.]+)$")


def fused_groups(names: Iterable[str], across_experts: bool = True) -> list[tuple[str, ...]]:
    """Groups of two or more of the linear layers `names` that runtimes fuse, each in the given order.

    Its layers have the same parent, such as `model.layers.0.self_attn.{q,k,v}_proj`. All gate and up projections of the
    experts of a block are one group, their down projections another, unless `across_experts` is False.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        expert = _EXPERT_LAYER.match(name) if across_experts else None
        parent, leaf = (expert["parent"] + ".*", expert["leaf"]) if expert else name.rpartition(".")[::2]
        suffixes = next((suffixes for suffixes in FUSED_SUFFIXES if leaf in suffixes), None)
        if suffixes or expert:
            groups[parent, min(suffixes) if suffixes else leaf].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def is_routed_expert(name: str) -> bool:
    """Whether the linear layer `name` belongs to a routed expert; shared experts run for every token and do not."""
    return _EXPERT_LAYER.match(name) is not None


class EngineUnquantizedRow(NamedTuple):
    """Layers of some families that an engine builds unquantized, so that it refuses a packed one or joins it wrongly.

    They are left unquantized by default in the formats that these engines read; an entry of `layer_config` wins.
    """

    families: str  # regular expression that matches the whole `model_type`
    layers: str  # regular expression that is searched in a layer's name
    reason: str  # for the user
    source: str  # engine, file and class that show it


_ONE_PER_HEAD = "it gates linear attention with one output per head, less than a tile of the engines' kernels"

ENGINE_UNQUANTIZED: tuple[EngineUnquantizedRow, ...] = (
    EngineUnquantizedRow(
        ".*", r"\bindexer\.(\w+\.)?weights_proj$", "it weights the heads of a sparse-attention indexer",
        "vLLM model_executor/models/deepseek_v2.py Indexer.wk_weights_proj (quant_config=None); SGLang "
        "srt/layers/attention/nsa/nsa_indexer.py Indexer.weights_proj and dsv4/indexer.py C4Indexer.weights_proj",
    ),
    EngineUnquantizedRow(
        ".*", r"\bindexer\.wk$", "engines join it with the unquantized weights_proj of its indexer",
        "vLLM model_executor/models/deepseek_v2.py Indexer.wk_weights_proj (quant_config=None)",
    ),
    EngineUnquantizedRow(
        "deepseek_v4", r"\bcompressor\.(indexer\.)?(kv_proj|gate_proj|wkv|wgate)$",
        "it compresses keys and values for sparse attention",
        "vLLM models/deepseek_v4/compressor.py DeepseekCompressor.fused_wkv_wgate (quant_config=None)",
    ),
    EngineUnquantizedRow(
        "deepseek_v4", r"\.(o_a_proj|wo_a)$", "it multiplies groups of heads by blocks of its weight",
        "SGLang srt/models/deepseek_v4.py MQALayer.wo_a (quant_config=None unless FP8)",
    ),
    EngineUnquantizedRow(
        ".*", r"\blinear_attn\.in_proj_(a|b|ba)$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py QwenGatedDeltaNetAttention.in_proj_ba (joined; "
        "no block-wise FP8) and layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineUnquantizedRow(
        "olmo_hybrid", r"\blinear_attn\.[ab]_proj$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/mamba/gdn OlmoHybridGatedDeltaNetAttention.a_proj, b_proj (kept apart for "
        "precision) and layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineUnquantizedRow(
        "kimi_linear|bailing_hybrid", r"\bself_attn\.b_proj$", _ONE_PER_HEAD,
        "vLLM model_executor/layers/kda.py KimiDeltaAttention.b_proj and "
        "layers/quantization/utils/marlin_utils.py GPTQ_MARLIN_MIN_THREAD_N = 64",
    ),
    EngineUnquantizedRow(
        ".*", r"\.shared_expert_gate$", "it weights the shared expert",
        "vLLM model_executor/models/qwen3_next.py Qwen3NextSparseMoeBlock.shared_expert_gate (quant_config=None)",
    ),
    EngineUnquantizedRow(
        "mamba|falcon_mamba|jamba", r"\.(mixer|mamba)\.(x_proj|dt_proj)$", "it selects the time steps of a state space",
        "vLLM model_executor/layers/mamba/mamba_mixer.py MambaMixer.x_proj, dt_proj (no quant_config)",
    ),
)  # fmt: skip


def engine_unquantized(model_type: str, layer: str) -> EngineUnquantizedRow | None:
    """The row that leaves a layer unquantized, by its name in the model or in the files; None if there is none."""
    rows = (row for row in ENGINE_UNQUANTIZED if re.fullmatch(row.families, model_type))
    return next((row for row in rows if re.search(row.layers, layer)), None)


# Routers choose experts or weight their outputs: an error in them sends tokens to other experts, and they are tiny.
_ROUTER_NAME = re.compile(r"(^|_)router(_|$)")  # a segment of a name: `router`, `modality_router`, `router_mlp`
_ROUTER_CLASS = re.compile(r"Router|TopKGat(e|ing)$|M[oO][eE]Gat(e|ing)$")
_GATE_CLASS = re.compile(r"Gat(e|ing)(V?\d+)?$")  # a router if a sibling of experts
_GATE_NAMES = frozenset({"gate", "router", "gating", "wg"})  # names of routers if siblings of experts
# As siblings of experts, these are projections of an MLP or an attention, whatever their width.
_MLP = re.compile(
    r"^(gate_proj|up_proj|down_proj|gate_up_proj|fc\d*|fc_in|fc_out|w\d|dense\w*|[qkvo]_proj|\w*output_linear|"
    r"\w*input_linear|c_fc|c_proj|per_layer_\w+|in_proj|out_proj)$"
)


def router_names(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts or weight shared ones, including those of a router's MLP."""
    routers, found = tuple(f"{name}." for name in router_modules(model)), set()
    for name, module in model.named_modules():
        if is_linear(module) and f"{name}.".startswith(routers):
            found.add(name)
        # Linear layers next to experts with one output per expert, or one output (gates of shared experts).
        widths = {1, *_expert_counts(module)}
        for leaf, layer in module.named_children() if widths != {1} else ():
            if is_linear(layer) and not _MLP.match(leaf) and weight_2d(layer).shape[0] in widths:
                found.add(f"{name}.{leaf}" if name else leaf)
    return found


def router_modules(model: nn.Module) -> set[str]:
    """Names of the modules that are routers as a whole."""
    modules, found = dict(model.named_modules()), set()
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if not name or isinstance(module, (LinearExperts, nn.ModuleList)) or next(module.parameters(), None) is None:
            continue
        kind = type(module).__name__
        gate = leaf in _GATE_NAMES or _GATE_CLASS.search(kind)
        if _ROUTER_NAME.search(leaf) or _ROUTER_CLASS.search(kind) or (gate and _expert_counts(modules[parent])):
            found.add(name)
    return found


def _expert_counts(module: nn.Module) -> list[int]:
    """Number of experts of each experts module directly under `module`."""
    found: list[int] = []
    for leaf, child in module.named_children():
        if isinstance(child, LinearExperts):
            found += [] if isinstance(child, SharedExperts) else [child.num_experts]
        elif "expert" in leaf.lower() and "shared" not in leaf.lower():
            listed = sum(name.isdigit() for name, _ in child.named_children())
            stacked = [int(p.shape[0]) for p in child.parameters(recurse=False) if p.dim() == 3]
            found += [listed] if listed else stacked[:1]
    return found


ROUTER = "it chooses experts"
_WARNING, _ERROR = 0.05, 0.5  # fractions of the weights that no rule recognises
_SMALL_PARAM = re.compile(r"(^|_)(bias|scale|norm|A_log|D|dt|sinks?|time_mix\w*|slope|decay)(_|$)|bias$")
_ROUTER_PARAM = re.compile(r"router|(^|_)gate(_weight)?$|routing")


class UnquantizedWeight(NamedTuple):
    """A weight of two or more dimensions that no rule quantizes, with the reason; `unknown`: no rule recognises it."""

    name: str
    numel: int
    reason: str
    unknown: bool


class BlockWeights(NamedTuple):
    """Number of weights of the decoder blocks in tensors of two or more dimensions, and those outside linear layers."""

    total: int
    dense: tuple[UnquantizedWeight, ...]

    @property
    def unknown_fraction(self) -> float:
        """Fraction of all weights that no rule recognises."""
        return sum(w.numel for w in self.dense if w.unknown) / self.total if self.total else 0.0

    def check(self, model: str, advice: str = "") -> str | None:
        """A warning when no rule recognises a large part of the weights, else None.

        Raises UnsupportedError when that is more than half. `advice`: what else the user can do then.
        """
        share = self.unknown_fraction
        if share <= _WARNING:
            return None
        kinds: dict[str, str] = {}
        for weight in sorted((w for w in self.dense if w.unknown), key=lambda w: -w.numel):
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", weight.name), weight.reason)
        shown = [f"{name} ({reason})" for name, reason in kinds.items()]
        names = ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
        if share > _ERROR:
            raise UnsupportedError(
                f"{share:.0%} of the weights in the blocks of {model} would be left unquantized because no rule "
                f"recognises them: {names}. Quantizing the rest would hardly make the model smaller; {advice}use a "
                "version of this package that supports the family, or request it with the model's name"
            )
        return f"{share:.0%} of the weights in the blocks are left unquantized because no rule recognises them: {names}"


def block_weights(model: nn.Module, blocks: Sequence[str]) -> BlockWeights:
    """The weights of two or more dimensions in `blocks`, and those outside linear layers."""
    routers, total = tuple(f"{name}." for name in router_modules(model)), 0
    dense: dict[str, UnquantizedWeight] = {}
    seen: set[int] = set()
    for block in blocks:
        for inner, module in model.get_submodule(block).named_modules():
            owner = f"{block}.{inner}" if inner else block
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += parameter.numel()
                if leaf != "weight" or not is_linear(module):
                    is_router, name = f"{owner}.".startswith(routers), f"{owner}.{leaf}"
                    reason, unknown = (ROUTER, False) if is_router else _reason(owner, module, leaf, parameter)
                    dense[name] = UnquantizedWeight(name, parameter.numel(), reason, unknown)
    return BlockWeights(total, tuple(dense.values()))


def _reason(owner: str, module: nn.Module, leaf: str, parameter: torch.Tensor) -> tuple[str, bool]:
    """(why the parameter is left unquantized, whether no rule recognises it)."""
    parts = owner.split(".")
    if sum(size > 1 for size in parameter.shape) < 2 or _SMALL_PARAM.search(leaf):
        return "a bias, scale or state of a recurrence, not a matrix that multiplies tokens", False
    if isinstance(module, nn.Embedding):
        return "an embedding table", False
    is_convolution = isinstance(module, nn.modules.conv._ConvNd) or "conv" in parts[-1]
    if leaf == "weight" and parameter.dim() > 2 and (is_convolution or parameter.shape[1] == 1):
        return "a convolution", False
    if parameter.dim() == 2 and _expert_counts(module) and _ROUTER_PARAM.search(leaf):
        return ROUTER, False
    if leaf == "weight" and overrides_forward(module):
        return "its class overrides forward and is not a plain linear layer", True
    if parameter.dim() == 3 and any("expert" in part for part in parts):
        return "experts in an unknown layout", True
    return "no rule says what it computes", True
