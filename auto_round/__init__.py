"""AutoRound: post-training quantization of large language models to 2-8 bits.

Names are imported when they are first used, so that `import auto_round` costs nothing and touches no device. Importing
a class of a feature that this version does not have says what works instead.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from auto_round._version import __version__

if TYPE_CHECKING:
    from auto_round.algorithms.gptq import GPTQConfig
    from auto_round.algorithms.quantization.rtn.config import OptimizedRTNConfig, RTNConfig
    from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig, SignRoundV2Config
    from auto_round.autoround import AutoRound, AutoRoundAdam, AutoRoundDiffusion, AutoRoundLLM, AutoRoundMLLM
    from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

_MODULES = {
    "autoround": ("AutoRound", "AutoRoundLLM", "AutoRoundAdam", "AutoRoundMLLM", "AutoRoundDiffusion"),
    "schemes": ("QuantizationScheme", "PRESET_SCHEMES"),
    "algorithms.gptq": ("GPTQConfig",),
    "algorithms.quantization.rtn.config": ("RTNConfig", "OptimizedRTNConfig"),
    "algorithms.quantization.sign_round.config": ("SignRoundConfig", "AdamRoundConfig", "SignRoundV2Config"),
}
_EXPORTS = {name: f"auto_round.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdamRoundConfig", "AutoRound", "AutoRoundAdam", "AutoRoundDiffusion", "AutoRoundLLM", "AutoRoundMLLM",
    "GPTQConfig", "OptimizedRTNConfig", "PRESET_SCHEMES", "QuantizationScheme", "RTNConfig", "SignRoundConfig",
    "SignRoundV2Config", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    from auto_round.later import missing_classes

    return missing_classes(__name__)(name)


def __dir__() -> list[str]:
    return __all__
