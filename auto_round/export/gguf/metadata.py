"""What a GGUF file says about itself and the model's origin: the keys general.*.

Name, authors, licence and the like are found by the `gguf` package, from the model card, the configuration and the name
of the folder or repository, so that they read as in files made by llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.export.gguf.key_values import KeyValue
from auto_round.export.gguf.package import gguf_package

_EXPERTS = "_exps."


def size_label(tensors: Mapping[str, tuple[int, ...]]) -> str:
    """How large the model is, in words such as "135M" or "8x7B", from the shapes of the file's tensors.

    Experts count once: 8x7B has eight experts, and 7B parameters with one of them.
    """
    shared = sum(math.prod(shape) for name, shape in tensors.items() if _EXPERTS not in name)
    routed = [shape for name, shape in tensors.items() if _EXPERTS in name]
    once = sum(math.prod(shape[1:]) for shape in routed)
    count = sum(shape[0] for shape in routed) // len(routed) if routed else 0
    total = shared + sum(math.prod(shape) for shape in routed)
    label: str = gguf_package().size_label(total, shared, once, count)
    return label


def general_metadata(
    arch: str, tensors: Mapping[str, tuple[int, ...]], file_type: int, *, folder: str | Path | None = None,
    name: str = "",
) -> list[KeyValue]:  # fmt: skip
    """The keys general.*.

    Args:
        arch: llama.cpp's name of the architecture.
        tensors: shapes of all tensors of the file.
        file_type: a `gguf.LlamaFileType`.
        folder: of the model, with its README.md, config.json and generation_config.json, if there is one.
        name: what the user called the model: a folder, or an id such as "org/Model-7B".
    """
    gguf = gguf_package()
    total = sum(math.prod(shape) for shape in tensors.values())
    path = Path(folder) if folder is not None else None
    # A downloaded snapshot's folder is called by its hash: then the id is what tells the name.
    is_id = bool(name) and not Path(name).exists()
    found = gguf.Metadata.load(None, path, None, total)
    if is_id:
        card, values = gguf.Metadata.load_model_card(path), gguf.Metadata.load_hf_parameters(path)
        sampling = {key: value for key, value in vars(found).items() if key.startswith("sampling_")}
        named: dict[str, Any] = {**values, "_name_or_path": name}
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, named, path, total)
        for key, value in sampling.items():
            setattr(found, key, value)
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
