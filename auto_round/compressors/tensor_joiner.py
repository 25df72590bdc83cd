"""Tensors that are not written as they come: experts stacked again, conversions undone, names of the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from auto_round.compressors.file_layout import FileLayout, FusedTarget
from auto_round.modeling.tensor_files import TensorFiles


def read_pieces(files: TensorFiles, names: Collection[str], layout: FileLayout) -> dict[str, torch.Tensor]:
    """Tensors by their names in the model, out of files where some are stacked or renamed."""
    found = {}
    for name in names:
        target = layout.targets.get(name)
        piece = None if target is None else target.piece
        (stored,) = layout.stored_names(name)
        if piece is not None and piece.rows:  # experts below each other in one matrix
            found[name] = piece.slot(files.read(stored))
        else:
            found[name] = files.read(stored, None if piece is None else piece.expert)
    return found


class TensorJoiner:
    """Collects tensors until what they are written as is whole.

    Args:
        layout: of the files.
        model: the model, whose configuration some conversions ask.
    """

    def __init__(self, layout: FileLayout, model: nn.Module) -> None:
        self.layout, self._model = layout, model
        self._open: dict[str, tuple[torch.Tensor, int]] = {}
        self._whole: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Name in the file and tensor of everything that can be written now that `tensor` is there."""
        target = self.layout.targets.get(name)
        if target is None:
            yield from self._finish(name, tensor)
        elif target.piece is None:
            yield from self._finish(target.name, tensor)
        else:
            whole = self._paste(target, tensor)
            if whole is not None:
                yield from self._finish(target.name, whole)

    def _paste(self, target: FusedTarget, tensor: torch.Tensor) -> torch.Tensor | None:
        whole, missing = self._open.pop(target.name, (None, target.parts))
        if whole is None:
            spec = self.layout.tensors.get(target.name)
            whole = torch.empty(target.shape, dtype=tensor.dtype if spec is None else spec[1])
        assert target.piece is not None
        target.piece.paste(target.piece.slot(whole), tensor)
        if missing == 1:
            return whole
        self._open[target.name] = (whole, missing - 1)
        return None

    def _finish(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        reversal = self.layout.reversals.get(name)
        if reversal is None:
            yield name, tensor
            return
        self._whole[name] = tensor
        if all(needed in self._whole for needed in reversal.needed):
            parts = {needed: self._whole.pop(needed) for needed in reversal.needed}
            for stored, made in reversal.run(parts, self._model).items():
                yield stored, made.contiguous()
