"""Tensors of a finished GGUF file, read by the `gguf` package, which shares no code with what wrote them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from auto_round.data_type.gguf.types import GGML_TYPES
from auto_round.errors import VerifyError
from auto_round.export.gguf.package import gguf_package


class GgufTensors:
    """The tensors of one file, mapped into memory: nothing is read before it is asked for.

    Raises VerifyError when the package cannot read the file, UnsupportedError when the package is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        gguf = gguf_package()
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
            raise VerifyError(f"{self.path} cannot be read back ({error})") from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> str:
        """The type of a tensor: `Q4_K`, `F32`."""
        return str(self._of(name).tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in weights, in torch's order."""
        return tuple(int(size) for size in reversed(self._of(name).shape))

    def stored(self, name: str) -> torch.Tensor:
        """uint8 [..., row bytes] for blocks and BF16 as bfloat16 [...]; float32 or float16 as they are. A copy."""
        tensor = self._of(name)
        data = torch.from_numpy(tensor.data.copy())
        return data.view(torch.bfloat16) if self.kind(name) == "BF16" else data

    def weight(self, name: str) -> torch.Tensor:
        """float32 in the tensor's shape, dequantized by the package."""
        if self.kind(name) not in GGML_TYPES:
            return self.stored(name).float()
        tensor = self._of(name)
        return torch.from_numpy(gguf_package().dequantize(tensor.data, tensor.tensor_type)).reshape(self.shape(name))

    def value(self, key: str) -> Any:
        """The value of a key, a list for an array, or None where there is no such key."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _of(self, name: str) -> Any:
        if name not in self._tensors:
            raise VerifyError(f"{self.path} does not hold tensor {name!r}")
        return self._tensors[name]
