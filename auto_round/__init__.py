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

_EXPORTS = {
    "AutoRound": "auto_round.autoround",
    "QuantizationScheme": "auto_round.schemes",
    "PRESET_SCHEMES": "auto_round.schemes",
    "GPTQConfig": "auto_round.algorithms.gptq",
    "RTNConfig": "auto_round.algorithms.quantization.rtn.config",
    "OptimizedRTNConfig": "auto_round.algorithms.quantization.rtn.config",
    "SignRoundConfig": "auto_round.algorithms.quantization.sign_round.config",
    "AdamRoundConfig": "auto_round.algorithms.quantization.sign_round.config",
    "SignRoundV2Config": "auto_round.algorithms.quantization.sign_round.config",
    "AutoRoundLLM": "auto_round.autoround",
    "AutoRoundAdam": "auto_round.autoround",
    "AutoRoundMLLM": "auto_round.autoround",
    "AutoRoundDiffusion": "auto_round.autoround",
}

__all__ = [
    "AdamRoundConfig",
    "AutoRound",
    "AutoRoundAdam",
    "AutoRoundDiffusion",
    "AutoRoundLLM",
    "AutoRoundMLLM",
    "GPTQConfig",
    "OptimizedRTNConfig",
    "PRESET_SCHEMES",
    "QuantizationScheme",
    "RTNConfig",
    "SignRoundConfig",
    "SignRoundV2Config",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    from auto_round.later import refuse_class

    refuse_class(name)
    raise AttributeError(f"module 'auto_round' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
