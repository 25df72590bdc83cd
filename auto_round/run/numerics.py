"""Handle NaN and Inf: fail, round to nearest, or leave the layer unquantized (on_nan); deterministic mode.

Where NaN or Inf is first seen, and what each policy does:

| seen in | fail | rtn | keep |
|---|---|---|---|
| a layer's weight or bias | error | error: nothing to round | the layer and those fused with it stay unquantized |
| a block's full-precision output, inputs or loss | error | the block is rounded to nearest | it stays unquantized |
| the output of the blocks quantized so far | error | tuning continues on full-precision inputs | same |
| calibration data after such a block | | blocks are rounded to nearest | same: they are not the cause |
| the embedding, a norm | error | error | it is written unchanged |

Scales that need calibration data (static activations, the key-value cache) allow no round-to-nearest fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from auto_round.algorithms.base import BlockResult, LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.calibration.observers import MinMaxObserver
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import NumericsError
from auto_round.logger import logger
from auto_round.modeling.source import ModelSource, count_non_finite, direct_tensors
from auto_round.run.block_layers import activation_of, share_global_scales
from auto_round.run.settings import Settings
from auto_round.run.writers import OutputWriter

_STATE = ("unquantized", "rounded", "clamped", "incidents", "lost", "diverged")


@dataclass
class NumericsPolicy:
    """The policy for NaN and Inf, `settings.on_nan`, and what it did in this run.

    Attributes:
        unquantized, rounded: layers left in full precision, or rounded without calibration data, with the reason.
        clamped: number of scales that were clamped to the range of their dtype, by layer.
        lost: the first block after which calibration data is not finite.
        diverged: the output of the quantized blocks is not finite; tuning continues on full-precision inputs.
    """

    settings: Settings
    model_dtype: torch.dtype
    outputs: Sequence[OutputWriter] = ()
    unquantized: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    clamped: dict[str, int] = field(default_factory=dict)
    incidents: list[str] = field(default_factory=list)
    lost: str | None = None
    diverged: bool = False

    def state(self) -> dict[str, Any]:
        """What it did, as plain values for the journal."""
        return {name: copy(getattr(self, name)) for name in _STATE}

    def restore_from(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`; the layers that became unquantized since are reported to the writers."""
        added = {name: why for name, why in state["unquantized"].items() if name not in self.unquantized}
        for output in self.outputs if added else ():
            output.leave_unquantized(list(added), next(iter(added.values())))
        for name in _STATE:
            setattr(self, name, state[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            "on_nan": self.settings.on_nan, "incidents": list(self.incidents), "kept": dict(self.unquantized),
            "rounded_plainly": dict(self.rounded), "clamped_scales": dict(self.clamped),
        }  # fmt: skip

    def log_incident(self, incident: str) -> None:
        """Record an incident that the run survived, and log a warning."""
        self.incidents.append(incident)
        logger.warning("%s", incident)

    def count(self, task: LayerTask, layer: QuantizedLayer) -> None:
        """Record how many scales of a layer were clamped."""
        if clamped := layer.codes.clamped_scales(task.weight):
            self.clamped[task.name] = clamped

    def log_clamped_scales(self) -> None:
        """Log a warning if scales were clamped."""
        if self.clamped:
            worst = sorted(self.clamped, key=lambda name: -self.clamped[name])
            logger.warning(
                "%d scales were beyond the range of their dtype and are clamped to its largest value: %s%s; the "
                "largest weights of their groups are clipped. scale_dtype=bf16 or fp32 has a larger range, if the "
                "format supports it",
                sum(self.clamped.values()), ", ".join(worst[:5]), " and others" if len(worst) > 5 else "",
            )  # fmt: skip

    def fall_back(self, block: str, tasks: Sequence[LayerTask], error: NumericsError) -> BlockResult:
        """Round a block without calibration data, or leave it unquantized; raise `error` if neither is allowed."""
        settings, policy = self.settings, self.settings.on_nan
        if policy == "fail":
            raise error
        if settings.cache is not None or settings.save_imatrix is not None:
            needed = "scales of the key-value cache and of attention come from calibration data"
            needed = needed if settings.cache is not None else "the importance file would lack layers"
            raise NumericsError(f"{error}; on_nan={policy} does not help here: {needed}")
        # A known damaged tensor in the block explains the error: the other layers are not at fault, and are rounded.
        explained = any(name.startswith(f"{block}.") for name in self.unquantized)
        if policy == "keep" and not explained:
            return self._leave_unquantized(block, tasks, str(error))
        self.log_incident(f"block {block} is rounded by its weights alone: {error}")
        return self.without_data(block, tasks, str(error))

    def without_data(self, block: str, tasks: Sequence[LayerTask], reason: str) -> BlockResult:
        """Round a block to nearest. Raises NumericsError when a static input scale needs data, unless on_nan=keep."""
        fixed = next((task.name for task in tasks if task.scheme.calibrated), None)
        if fixed is not None:
            missing = f"the scales of the inputs of {fixed} come from calibration data, and there is no finite one"
            if self.settings.on_nan == "keep":
                return self._leave_unquantized(block, tasks, f"{reason}; {missing}")
            raise NumericsError(
                f"block {block}: {missing} ({reason}); use dynamic activations, name the block's layers in "
                "ignore_layers, or use on_nan=keep"
            )
        for task in tasks:
            task.importance = None
            task.activation = activation_of(task.scheme, task.name, MinMaxObserver(), self.model_dtype)
        share_global_scales(tasks)
        self.rounded |= {task.name: reason for task in tasks}
        return BlockResult([quantize_layer(task, False, self.settings.scale_dtype) for task in tasks])

    def diverges(self, block: str, sample: int | None) -> bool:
        """Whether the blocks quantized up to `block` give NaN or Inf, on `sample`; an error with on_nan=fail."""
        if sample is None:
            return False
        incident = f"the blocks quantized up to {block} give NaN or Inf on calibration sample {sample}"
        if self.settings.on_nan == "fail":
            raise NumericsError(
                f"{incident}, though not in full precision; use --disable_amp, more bits, or on_nan=rtn"
            )
        self.log_incident(f"{incident}: the blocks after it are tuned on full-precision inputs")
        self.diverged = True
        return True

    def _leave_unquantized(self, block: str, tasks: Sequence[LayerTask], reason: str) -> BlockResult:
        names = [task.name for task in tasks]
        for output in self.outputs:
            output.leave_unquantized(names, reason)
        self.unquantized |= dict.fromkeys(names, reason)
        self.log_incident(f"block {block} stays in full precision: {reason}")
        return BlockResult()


def damaged_tensors(source: ModelSource) -> dict[str, str]:
    """Tensors of the model with NaN or Inf, and their count as text. Reads all weights once, a module at a time."""
    found: dict[str, str] = {}
    for owner in [*source.blocks, *source.non_block_module_names()]:
        root = source.load(owner)
        for inner, module in root.named_modules() if owner in source.blocks else [("", root)]:
            for leaf, tensor in direct_tensors(module):
                bad = count_non_finite(tensor)
                if bad is not None:
                    found[".".join(part for part in (owner, inner, leaf) if part)] = bad
        source.release(owner)
    return found


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Enable PyTorch's deterministic algorithms if `wanted`, and restore the caller's setting on exit."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
