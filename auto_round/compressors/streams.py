"""The hidden states that travel through the blocks: full precision, quantized, and a short probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from auto_round.calibration.inputs import CapturedInputs
from auto_round.errors import NumericsError
from auto_round.modeling.finite import is_finite


class Observer(Protocol):
    """Watches inputs of layers while a block runs. `mask` tells it which positions count: those with a loss, or with
    `every_token` all that are not padding."""

    mask: torch.Tensor | None
    every_token: bool


@dataclass
class Stream:
    """Hidden states [N, T, H] of all samples before some block, and how blocks are called on them."""

    captured: CapturedInputs
    hidden: torch.Tensor
    batch: int

    @torch.no_grad()
    def after(
        self, index: int, block: torch.nn.Module, device: torch.device, dtype: torch.dtype,
        observers: Sequence[Observer] = (),
    ) -> torch.Tensor:  # fmt: skip
        """What the block makes of the hidden states, kept where they are kept and in `dtype`.

        `observers`, open on this block, are told which positions count in the loss.
        """
        masks = {kind: None if bool(m.all()) else m for kind, m in self._masks(observers).items()}
        result = torch.empty(self.hidden.shape, dtype=dtype, device=self.hidden.device)
        for start in range(0, self.hidden.shape[0], self.batch):
            samples = list(range(start, min(start + self.batch, self.hidden.shape[0])))
            for observer in observers:
                mask = masks[observer.every_token]
                observer.mask = None if mask is None else mask[start : start + self.batch]
            part = self.hidden[start : start + self.batch].to(device, dtype)
            result[start : start + self.batch] = self.captured.run(index, block, part, samples)
        return result

    def _masks(self, observers: Sequence[Observer]) -> dict[bool, torch.Tensor]:
        """The positions that count, by `every_token`, for the kinds of observers that are there."""
        captured = self.captured
        return {o.every_token: captured.present if o.every_token else captured.loss_mask for o in observers}

    def runner(self, index: int, block: torch.nn.Module) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
        """A function that calls the block on some samples; gradients flow."""
        return lambda hidden, samples: self.captured.run(index, block, hidden, samples)


def first_non_finite(hidden: torch.Tensor) -> int | None:
    """The first sample of hidden states [N, T, H] that holds NaN or Inf, or None."""
    for sample in range(hidden.shape[0]):
        if not is_finite(hidden[sample]):
            return sample
    return None


def check_activations(name: str, hidden: torch.Tensor) -> None:
    """Raise NumericsError when a block's full-precision output holds NaN or Inf."""
    sample = first_non_finite(hidden)
    if sample is not None:
        raise NumericsError(
            f"block {name} gives NaN or Inf in full precision on calibration sample {sample}; "
            "check the model and the data, set model_dtype to float32, or go on with on_nan=rtn or keep"
        )
