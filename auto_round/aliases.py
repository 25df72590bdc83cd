"""Older names of `AutoRound`. Each says so once when it is used; `AutoRound` takes every model that they take."""

from __future__ import annotations

from typing import Any

from auto_round.autoround import AutoRound
from auto_round.logger import warn_once


class AutoRoundLLM(AutoRound):
    """`AutoRound` under an older name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _deprecated(type(self).__name__, "AutoRound")
        super().__init__(*args, **kwargs)


class AutoRoundAdam(AutoRound):
    """`AutoRound` with `enable_adam=True`, under an older name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _deprecated(type(self).__name__, "AutoRound with enable_adam=True")
        super().__init__(*args, **{"enable_adam": True, **kwargs})


class AutoRoundMLLM(AutoRoundLLM):
    """`AutoRound` under an older name. Multimodal models are refused, as they are by `AutoRound`."""


class AutoRoundDiffusion(AutoRoundLLM):
    """`AutoRound` under an older name. Diffusion models are refused, as they are by `AutoRound`."""


def _deprecated(old: str, new: str) -> None:
    warn_once("%s is an older name; use %s", old, new)
