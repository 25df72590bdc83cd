"""What a format must know of the whole run to write its `quantization_config`: decided once, before any tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from auto_round._version import __version__
from auto_round.schemes import QuantizationScheme

# Settings of a run that are written into the checkpoint when they differ from these values.
DEFAULT_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "iters": 200, "batch_size": 8, "nsamples": 128, "seqlen": 2048, "lr": None, "minmax_lr": None,
        "gradient_accumulate_steps": 1, "enable_quanted_input": True, "enable_minmax_tuning": True,
        "enable_norm_bias_tuning": False, "amp": True, "scale_dtype": "float16",
        "dataset": None, "static_kv_dtype": None, "static_kv_granularity": "tensor", "static_attention_dtype": None,
        "static_attention_granularity": "tensor",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ExportPlan:
    """One run's result, without its tensors.

    Attributes:
        scheme: the default scheme.
        layers: the scheme of every linear layer by its full module name, layers left in 16 bits included.
        block_names: module names of the decoder blocks, such as `model.layers.0`.
        settings: how the run was made (`iters`, `nsamples`, ...); values that are not defaults are recorded.
        version: of this package.
        model_type: of the model's config, such as `llama`.
        embeddings: module names of the embeddings, which stay in full precision.
        other_matrices: names of the model's other modules with a matrix for weight (routers, projections outside the
            blocks), which no format may take for quantized.
        spare: modules that the files have and this model does not.
        patterns: regular expressions of the layer configuration, in order.
    """

    scheme: QuantizationScheme
    layers: Mapping[str, QuantizationScheme]
    block_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    model_type: str = ""
    embeddings: tuple[str, ...] = ()
    other_matrices: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def quantized_layers(self) -> list[str]:
        return [name for name, scheme in self.layers.items() if scheme.quantizes_weights]

    def dense_in_blocks(self) -> list[str]:
        """What a reader might take for quantized and is not: dense layers and routers inside the blocks, and modules
        that this model does not have but the files do."""
        dense = [name for name, scheme in self.layers.items() if not scheme.quantizes_weights]
        inside = [name for name in dict.fromkeys((*dense, *self.other_matrices)) if self.in_block(name)]
        return [*inside, *self.spare]

    def in_block(self, name: str) -> bool:
        """Whether the module `name` lies in one of the blocks."""
        return any(name.startswith(f"{block}.") for block in self.block_names)

    def block_prefix(self) -> str:
        """The lists that hold the blocks, such as `model.layers`; several are joined by commas."""
        return ",".join(dict.fromkeys(re.sub(r"\.\d+$", "", name) for name in self.block_names))

    def recorded_settings(self) -> dict[str, Any]:
        """Known settings that are set, plain JSON values and not the default."""
        return {
            key: self.settings[key]
            for key, default in DEFAULT_SETTINGS.items()
            if key in self.settings
            and self.settings[key] is not None
            and self.settings[key] != default
            and isinstance(self.settings[key], (bool, int, float, str))
        }
