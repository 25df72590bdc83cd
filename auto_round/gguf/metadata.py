"""Key values of a GGUF file with their types, and the `general.*` keys (name, size label, file type)."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from auto_round.errors import UnsupportedError


def gguf_package() -> Any:
    """The `gguf` module. Raises UnsupportedError when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedError('GGUF files need their own package: pip install "auto-round[gguf]"') from error


class KeyValue(NamedTuple):
    """The arguments of `gguf.GGUFWriter.add_key_value`; both kinds are `gguf.GGUFValueType`."""

    key: str
    value: Any
    kind: Any
    item_kind: Any = None

    def nbytes(self) -> int:
        """Bytes in a file's header, with 8-byte lengths and 4-byte types."""
        items, kind = ([self.value], self.kind) if self.item_kind is None else (self.value, self.item_kind)
        if kind.name == "STRING":
            size = sum(8 + len(str(item).encode()) for item in items)
        else:
            size = len(items) * (1 if kind.name == "BOOL" else int(re.sub(r"\D", "", kind.name)) // 8)
        return 8 + len(self.key.encode()) + 4 + (0 if self.item_kind is None else 4 + 8) + size


def key_value(key: str, value: Any, kind: str) -> KeyValue:
    """A key value of type `kind`, such as "uint32"; for a list, the type of its items."""
    types = gguf_package().GGUFValueType
    own = types[kind.upper()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return KeyValue(key, list(value), types.ARRAY, own)
    return KeyValue(key, value, own)


def size_label(tensors: Mapping[str, tuple[int, ...]]) -> str:
    """The model's size from the shapes of its tensors: "135M", or "8x7B" for eight experts and 7B with one of them."""
    total = sum(map(math.prod, tensors.values()))
    routed = [shape for name, shape in tensors.items() if "_exps." in name]
    once = sum(math.prod(shape[1:]) for shape in routed)
    count = sum(shape[0] for shape in routed) // len(routed) if routed else 0
    label: str = gguf_package().size_label(total, total - sum(map(math.prod, routed)), once, count)
    return label


def general_metadata(
    arch: str, tensors: Mapping[str, tuple[int, ...]], file_type: int, *, folder: str | Path | None = None,
    name: str = "",
) -> list[KeyValue]:  # fmt: skip
    """The keys general.*, as the `gguf` package finds them for llama.cpp from the files in the model's `folder` and its
    `name`, given by the user: a folder, or an id such as "org/Model-7B". `tensors`: shapes; `file_type`: a
    `gguf.LlamaFileType`."""
    gguf = gguf_package()
    total = sum(map(math.prod, tensors.values()))
    path = Path(folder) if folder is not None else None
    found = gguf.Metadata.load(None, path, None, total)
    if name and not Path(name).exists():  # an id: a downloaded snapshot's folder is named by its hash
        card, values = gguf.Metadata.load_model_card(path), gguf.Metadata.load_hf_parameters(path)
        sampling = {key: value for key, value in vars(found).items() if key.startswith("sampling_")}
        named = {**values, "_name_or_path": name}
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(**sampling), card, named, path, total)
    if found.name is None:
        found.name = path.resolve().name if path is not None else (name or arch)
    if found.size_label is None and total > 0:
        found.size_label = size_label(tensors)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (recorded,) = writer.kv_data
    return [KeyValue(key, entry.value, entry.type, entry.sub_type) for key, entry in recorded.items()]
