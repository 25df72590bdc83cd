"""Settings of SignRound: `SignRoundConfig`, `AdamRoundConfig`, and the default learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.later import SIGN_ROUND_V2, refuse_keyword
from auto_round.schemes import SchemeFields

_FULL_RUN = 200
_REFUSED = (
    "lr_scheduler", "nblocks", "enable_norm_bias_tuning", "enable_alg_ext", "dynamic_max_gap", "optimizer",
    "enable_lfq",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class SignRoundConfig(SchemeFields):
    """Rounding tuned by signed gradient descent, block by block. The scheme's fields (`bits`, `group_size`, `sym`, ...)
    may be given too; the last seven settings are not supported, and refused unless they have their defaults."""

    iters: int = 200  # steps for each block; with 0, `AutoRound` rounds to nearest instead
    # Initial step size of the rounding deltas, in units of one code, decaying linearly to zero; None: a usual one.
    lr: float | None = None
    minmax_lr: float | None = None  # step size of the scale factors; None takes `lr`
    momentum: float = 0.0  # of the signed steps; 0 is plain signSGD
    batch_size: int = 8  # samples in one forward pass
    gradient_accumulate_steps: int = 1  # forward passes in one step
    enable_minmax_tuning: bool = True  # tune the scale factors too; those of small floats only with a `minmax_lr`
    enable_quanted_input: bool = True  # tune on the outputs of the quantized preceding blocks, not on the model's own
    not_use_best_mse: bool = False  # keep the last state instead of the best one
    enable_adam: bool = False  # AdamW instead of the sign
    lr_scheduler: Any = None
    nblocks: int = 1
    enable_norm_bias_tuning: bool = False
    enable_alg_ext: bool = False
    dynamic_max_gap: int = -1
    optimizer: Any = None
    enable_lfq: bool = False

    def __post_init__(self) -> None:
        for name, low in (("iters", 0), ("batch_size", 1), ("gradient_accumulate_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least {low}")
        for name in _REFUSED:
            refuse_keyword(name, getattr(self, name))
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < float(value) < 10:
                allowed = "give a number between 0 and 10, or None for a rate that fits iters"
                raise ConfigError(f"{name}={value!r}: {allowed}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum!r}: give a number from 0 to below 1")

    def learning_rates(self, bits: int) -> tuple[float, float]:
        """(rounding, scale factors) for a layer of that many bits."""
        # A sign step moves every rounding delta by the whole rate. With 1/iters a short run moves as far as a long one
        # on fewer gradients, and ends worse: the exponents are fitted to runs of 20 and 60 steps (docs/tuning.md). With
        # too small steps a model of 2 bits may lose the outlier activations that its attention depends on.
        usual = (2.0 if self.iters >= 1000 and bits <= 3 else 1.0) / self.iters
        if self.iters < _FULL_RUN:
            usual = (_FULL_RUN / self.iters) ** (0.78 if bits <= 2 else 0.4) / _FULL_RUN
        lr = self.lr or usual
        return lr, self.minmax_lr or lr


@dataclass(frozen=True, kw_only=True, repr=False)
class AdamRoundConfig(SignRoundConfig):
    """SignRound's learnables tuned by AdamW."""

    enable_adam: bool = True


@dataclass(frozen=True, kw_only=True, repr=False)
class SignRoundV2Config(SignRoundConfig):
    """Raises UnsupportedError when constructed: this version has no SignRound v2. The name exists for imports."""

    def __post_init__(self) -> None:
        raise UnsupportedError(SIGN_ROUND_V2.sentence("SignRoundV2Config"))
