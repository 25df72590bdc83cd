"""Tensors of a finished GGUF file, for the check after saving.

The `gguf` package wrote the header and the strict reader beside this file reads it, so that neither vouches for itself;
blocks are dequantized by the package. Its own `GGUFReader` would do, but takes a minute for a vocabulary of 262,144.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from auto_round.data_type.gguf.types import GGML_TYPES
from auto_round.errors import DataError, VerifyError
from auto_round.export.gguf.header import TensorInfo, read_header
from auto_round.export.gguf.package import gguf_package

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufTensors:
    """The tensors of one file, mapped into memory: nothing is read before it is asked for.

    Raises VerifyError when the file is not sound.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._header = read_header(self.path)
        except DataError as error:
            raise VerifyError(f"{self.path} cannot be read back ({error})") from error
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def kind(self, name: str) -> str:
        """The type of a tensor: `Q4_K`, `F32`."""
        return self._of(name).kind

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in weights, in torch's order."""
        return self._of(name).shape

    def stored(self, name: str, slot: int | None = None) -> torch.Tensor:
        """A copy of what is in the file: uint8 [..., row bytes] for blocks, else the tensor in its own dtype. `slot`:
        only this part of its first dimension."""
        info = self._of(name)
        start, nbytes, shape = info.start, info.nbytes, info.shape
        if slot is not None:
            nbytes //= shape[0]
            start, shape = start + slot * nbytes, shape[1:]
        raw = torch.from_numpy(np.array(self._bytes[start : start + nbytes]))
        if info.kind in _FLOATS:
            return raw.view(_FLOATS[info.kind]).reshape(shape)
        return raw.reshape(*shape[:-1], GGML_TYPES[info.kind].row_bytes(shape[-1]))

    def weight(self, name: str) -> torch.Tensor:
        """float32 in the tensor's shape. Raises UnsupportedError without the `gguf` package, if it holds blocks."""
        stored = self.stored(name)
        if stored.dtype != torch.uint8:
            return stored.float()
        gguf = gguf_package()
        values = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[self.kind(name)])
        return torch.from_numpy(values).reshape(self.shape(name))

    def value(self, key: str) -> Any:
        """The value of a key, a list for an array, or None where there is no such key."""
        return self._header.values.get(key)

    def _of(self, name: str) -> TensorInfo:
        if name not in self._header.tensors:
            raise VerifyError(f"{self.path} does not hold tensor {name!r}")
        return self._header.tensors[name]
