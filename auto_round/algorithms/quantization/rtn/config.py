"""Settings of round-to-nearest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RTNConfig:
    """Round to nearest. `disable_opt_rtn=True` takes each group's plain minimum and maximum, without calibration data;
    otherwise scales come from the importance-weighted search of `search.py`."""

    disable_opt_rtn: bool | None = None

    @property
    def optimized(self) -> bool:
        return not self.disable_opt_rtn


@dataclass(frozen=True, kw_only=True)
class OptimizedRTNConfig(RTNConfig):
    """Round to nearest with searched scales, said explicitly."""

    disable_opt_rtn: bool | None = False
