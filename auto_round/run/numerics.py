"""Handle NaN and Inf: fail, round to nearest, or leave the layer unquantized (on_nan); deterministic mode.

Where NaN or Inf is first seen, and what each policy does:

| seen in | fail | rtn | keep |
|---|---|---|---|
| a layer's weight or bias | error | error: nothing to round | the layer and those fused with it stay |
| a block's full-precision output, inputs or loss | error | the block is rounded to nearest | it stays |
| the output of the blocks quantized so far | error | tuning continues on full-precision inputs | same |
| calibration data after such a block | | blocks are rounded to nearest | same: they are not the cause |
| the embedding, a norm | error | error | it stays, as it always does |

Scales that only calibration can fix (static activations, the key-value cache) allow no round-to-nearest fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from auto_round.algorithms.base import BlockResult, LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.calibration.observers import MinMaxObserver
from auto_round.errors import NumericsError
from auto_round.logger import logger
from auto_round.modeling.layer_rules import fused_groups
from auto_round.modeling.source import ModelSource, count_non_finite, direct_tensors
from auto_round.run.block_layers import activation_of, is_calibrated, share_global_scales
from auto_round.run.plan import Job
from auto_round.run.settings import Settings
from auto_round.run.writers import OutputWriter


@dataclass
class NumericsPolicy:
    """The policy, and what came of it.

    Attributes:
        policy: "fail", "rtn" or "keep".
        kept: layers that stay in full precision, and why.
        plain: layers that were rounded by their weights alone, and why.
        clamped: scales that were beyond the dtype they are stored in, by layer.
        incidents: what was seen, in order, in words.
        lost: the first block after which calibration data is not finite any more.
        diverged: the quantized blocks gave what is not finite: tuning goes on from full-precision inputs.
    """

    policy: str = "fail"
    kept: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    clamped: dict[str, int] = field(default_factory=dict)
    incidents: list[str] = field(default_factory=list)
    lost: str | None = None
    diverged: bool = False

    def state(self) -> dict[str, Any]:
        """All of it as plain values, for the journal."""
        return asdict(self)

    def restore_from(self, state: Mapping[str, Any], outputs: Sequence[OutputWriter]) -> None:
        """Back to a `state`; the sinks are told which layers have been kept since."""
        kept = {name: why for name, why in state["kept"].items() if name not in self.kept}
        if kept:
            for output in outputs:
                output.leave_unquantized(list(kept), next(iter(kept.values())))
        for name, value in state.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            "on_nan": self.policy, "incidents": list(self.incidents), "kept": dict(self.kept),
            "rounded_plainly": dict(self.plain), "clamped_scales": dict(self.clamped),
        }  # fmt: skip

    def note(self, incident: str) -> None:
        """Record something that was seen and went on from, and say so."""
        self.incidents.append(incident)
        logger.warning("%s", incident)

    def log_clamped_scales(self) -> None:
        """Warn of clamped scales, if there were any."""
        if self.clamped:
            worst = sorted(self.clamped, key=lambda name: -self.clamped[name])
            logger.warning(
                "%d scales were beyond the dtype that stores them and are its largest value: %s%s; their largest "
                "weights are cut. scale_dtype=bf16 or fp32 holds more, where the format takes it",
                sum(self.clamped.values()), ", ".join(worst[:5]), " and others" if len(worst) > 5 else "",
            )  # fmt: skip

    def count(self, task: LayerTask, clamped: int) -> None:
        """Record how many scales of a layer were clamped."""
        if clamped:
            self.clamped[task.name] = clamped

    def fall_back(
        self,
        block: str,
        tasks: Sequence[LayerTask],
        error: NumericsError,
        outputs: Sequence[OutputWriter],
        settings: RtnFallback,
    ) -> BlockResult:
        """The block's layers without calibration, or none of them, as the policy says.

        Raises:
            NumericsError: `error`, where the policy is to fail or leaves nothing else.
        """
        if self.policy == "fail":
            raise error
        if settings.needs_all_blocks is not None:
            raise NumericsError(f"{error}; on_nan={self.policy} does not help here: {settings.needs_all_blocks}")
        reason = str(error)
        if self.policy == "keep" and not self._explained(block):
            return self._leave_unquantized(block, tasks, reason, outputs)
        self.note(f"block {block} is rounded by its weights alone: {error}")
        return self.without_data(block, tasks, reason, outputs, settings)

    def without_data(
        self,
        block: str,
        tasks: Sequence[LayerTask],
        reason: str,
        outputs: Sequence[OutputWriter],
        settings: RtnFallback,
    ) -> BlockResult:
        """The block's layers rounded by their weights alone.

        Raises:
            NumericsError: scales of some are fixed by calibration, and the policy does not let the layers stay.
        """
        fixed = next((task.name for task in tasks if is_calibrated(task.scheme)), None)
        if fixed is not None:
            missing = f"the scales of the inputs of {fixed} come from calibration data, and there is no finite one"
            if self.policy == "keep":
                return self._leave_unquantized(block, tasks, f"{reason}; {missing}", outputs)
            raise NumericsError(
                f"block {block}: {missing} ({reason}); use dynamic activations, name the block's layers in "
                "ignore_layers, or use on_nan=keep"
            )
        for task in tasks:
            task.importance = None
            task.activation = activation_of(task.scheme, task.name, MinMaxObserver(), settings.model_dtype)
        share_global_scales(tasks)
        self.plain |= {task.name: reason for task in tasks}
        return BlockResult([quantize_layer(task, False, settings.scale_dtype) for task in tasks])

    def _leave_unquantized(
        self, block: str, tasks: Sequence[LayerTask], reason: str, outputs: Sequence[OutputWriter]
    ) -> BlockResult:
        names = [task.name for task in tasks]
        for output in outputs:
            output.leave_unquantized(names, reason)
        self.kept |= dict.fromkeys(names, reason)
        self.note(f"block {block} stays in full precision: {reason}")
        return BlockResult()

    def _explained(self, block: str) -> bool:
        """Whether a tensor of the block itself is known to be damaged: its other layers are not at fault."""
        return any(name.startswith(f"{block}.") for name in self.kept)


@dataclass(frozen=True)
class RtnFallback:
    """What plain rounding has to know of a run.

    Attributes:
        scale_dtype: dtype in which scales are stored.
        model_dtype: of the model.
        needs_all_blocks: why every block must have finite calibration data, or None.
    """

    scale_dtype: Any
    model_dtype: Any
    needs_all_blocks: str | None = None


def needs_all_blocks(settings: Settings) -> str | None:
    """Why a run cannot do with calibration data of some blocks only, or None."""
    if settings.cache is not None:
        return "scales of the key-value cache and of attention come from calibration data"
    if settings.save_imatrix is not None:
        return "the importance file would lack layers"
    return None


def damaged_tensors(source: ModelSource) -> dict[str, str]:
    """Every tensor of the model that holds NaN or Inf, and how many. Reads all weights once, a module at a time."""
    found: dict[str, str] = {}
    for owner in [*source.blocks, *source.non_block_module_names()]:
        root = source.load(owner)
        modules = root.named_modules() if owner in source.blocks else [("", root)]
        for inner, module in modules:
            prefix = ".".join(part for part in (owner, inner) if part)
            for leaf, tensor in direct_tensors(module):
                bad = count_non_finite(tensor)
                if bad is not None:
                    found[f"{prefix}.{leaf}" if prefix else leaf] = bad
        source.release(owner)
    return found


def damaged_layers(job: Job, damaged: Mapping[str, str], source: ModelSource) -> dict[str, str]:
    """The quantized layers that have to stay in full precision for these tensors, with the reason: their owners, and
    the layers that runtimes join with them."""
    planned = job.quantized()
    tied = source.tied()
    kept: dict[str, str] = {}
    for layer in planned:
        for leaf in ("weight", "bias"):
            name = f"{layer}.{leaf}"
            bad = damaged.get(tied.get(name, name))
            if bad is not None:
                kept.setdefault(layer, f"its {leaf} holds {bad}")
    for group in fused_groups(planned):
        first = next((name for name in group if name in kept), None)
        if first is not None:
            for name in group:
                kept.setdefault(name, f"{first}, with which runtimes join it, stays")
    return kept


def check_non_layer_tensors(job: Job, damaged: Mapping[str, str]) -> None:
    """Raise NumericsError when a damaged tensor that is no layer would be stored quantized (GGUF embeddings)."""
    if job.gguf is None:
        return
    for name, bad in damaged.items():
        kind = job.gguf.type_of(name)
        if kind not in (None, "F32", "F16", "BF16"):
            raise NumericsError(
                f"tensor {name!r} holds {bad}, and this GGUF file stores it as {kind}; repair the model, or use a file "
                "type that keeps it in F16"
            )


# PyTorch's deterministic algorithms for the time of a run.


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms for as long as this is open, and the caller's choice again afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
