"""Settings of round-to-nearest, `RTNConfig` and `OptimizedRTNConfig`, and of a plugin's algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.algorithms.base import ALGORITHMS, BlockQuantizer
from auto_round.errors import ConfigError
from auto_round.schemes import SchemeFields


@dataclass(frozen=True, kw_only=True, repr=False)
class RTNConfig(SchemeFields):
    """Round to nearest. `disable_opt_rtn=True` computes scales from each group's minimum and maximum, without
    calibration data; else (`enable_opt_rtn=True`) an importance-weighted search does. The scheme's fields may be given
    too."""

    disable_opt_rtn: bool | None = None
    enable_opt_rtn: bool | None = None

    def __post_init__(self) -> None:
        if self.enable_opt_rtn and self.disable_opt_rtn:
            raise ConfigError("enable_opt_rtn and disable_opt_rtn contradict each other; give one")
        if self.enable_opt_rtn is not None:
            object.__setattr__(self, "disable_opt_rtn", not self.enable_opt_rtn)
            object.__setattr__(self, "enable_opt_rtn", None)

    @property
    def optimized(self) -> bool:
        """Whether it looks at calibration data."""
        return not self.disable_opt_rtn


@dataclass(frozen=True, kw_only=True, repr=False)
class OptimizedRTNConfig(RTNConfig):
    """Round to nearest with searched scales."""

    disable_opt_rtn: bool | None = False


@dataclass(frozen=True, kw_only=True, repr=False)
class RegisteredConfig(RTNConfig):
    """An algorithm of a plugin, which takes no settings. `quantizer`: its name given to `register_algorithm`."""

    quantizer: str

    def make(self, scale_dtype: torch.dtype) -> BlockQuantizer:
        """The quantizer for a run whose scales are stored in `scale_dtype`."""
        return ALGORITHMS[self.quantizer](scale_dtype)

    @property
    def optimized(self) -> bool:
        made = self.make(torch.float16)
        return made.needs_importance or made.needs_targets
