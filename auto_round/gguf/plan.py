"""Plan one GGUF file before writing: name, shape and type of every tensor, and placements of source tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, ModelError
from auto_round.gguf.conversion import Conversion
from auto_round.gguf.family import Placement
from auto_round.gguf.file_types import FILE_TYPES, ModelDimensions, tensor_bytes, tensor_types
from auto_round.gguf.metadata import KeyValue, general_metadata, size_label
from auto_round.gguf.vocab import vocabulary_for


@dataclass(frozen=True)
class GgufPlan:
    """Tensors and metadata of one file.

    Attributes:
        file_type: `q4_k_m`.
        conversion: of the model.
        places: placements of every source tensor, by its name in the run; none for a skipped one.
        shapes, types: of every tensor of the file, by its name there, in the file's order.
        metadata: key values of the model and its tokenizer.
        notes: differences from the file type's rules and from Transformers, for the user.
    """

    file_type: str
    conversion: Conversion
    places: Mapping[str, tuple[Placement, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    metadata: tuple[KeyValue, ...]
    notes: tuple[str, ...]

    def type_of(self, source: str) -> str | None:
        """The type of the file's tensor that holds the source tensor, None for a skipped or unknown one."""
        places = self.places.get(source)
        return self.types[places[0].tensor] if places else None

    def with_types(self, wanted: Mapping[str, str]) -> GgufPlan:
        """The plan with other types for some source tensors.

        Raises ConfigError when parts of one tensor (stacked experts) are given different types.
        """
        found: dict[str, tuple[str, str]] = {}
        for source, kind in wanted.items():
            for place in self.places[source]:
                first = found.setdefault(place.tensor, (kind, source))
                if first[0] != kind:
                    raise ConfigError(
                        f"layers {first[1]} and {source} are parts of one GGUF tensor, {place.tensor}, and cannot be "
                        f"{first[0]} and {kind}; give both one type in layer_config"
                    )
        return replace(self, types={**self.types, **{name: kind for name, (kind, _) in found.items()}})

    def nbytes(self) -> int:
        """Bytes of the file: the header, and tensors aligned to 32 bytes."""
        tensors = sum(-(-tensor_bytes(self.types[n], shape) // 32) * 32 for n, shape in self.shapes.items())
        infos = sum(8 + len(n.encode()) + 4 + 8 * len(shape) + 4 + 8 for n, shape in self.shapes.items())
        arch = 8 + len("general.architecture") + 4 + 8 + len(self.conversion.arch)
        header = 24 + arch + sum(pair.nbytes() for pair in self.metadata) + infos
        return tensors + -(-header // 32) * 32

    @property
    def size_label(self) -> str:
        """The model's size, such as 135M."""
        return size_label(self.shapes)

    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, type) of every tensor in the file's order."""
        return [(name, shape, self.types[name]) for name, shape in self.shapes.items()]


def plan_file(
    file_type: str, conversion: Conversion, with_importance: bool, tied: Iterable[str], tokenizer: Any, config: Any,
    folder: str | Path | None = None, name: str = "",
) -> GgufPlan:  # fmt: skip
    """Place every tensor of the model, choose its type, and make the file's metadata.

    Args:
        file_type: a key of `file_types.FILE_TYPES`.
        conversion: of the model, made with the shapes of its tensors.
        with_importance: whether an importance matrix is used, on which a few of llama.cpp's choices depend.
        tied: names that share another tensor's storage and are not stored.
        tokenizer, config: of Transformers.
        folder: of the model, or None.
        name: of the model, as given by the user.

    Raises:
        UnsupportedError: the architecture has no tensor for a source, or llama.cpp has no such tokenizer.
        ModelError: there is no tokenizer, or it does not fit the embedding.
    """
    shapes, keys = conversion.tensors, conversion.metadata()
    sizes = {pair.key.partition(".")[2]: pair.value for pair in keys}
    heads = sizes["attention.head_count"]
    dimensions = ModelDimensions(
        sizes["block_count"], heads, sizes.get("attention.head_count_kv", heads), sizes.get("expert_count", 0)
    )
    types = tensor_types(file_type, conversion.arch, list(shapes.items()), dimensions, with_importance)
    if tokenizer is None:
        raise ModelError(
            "a GGUF file holds the tokenizer, and this model has none; give tokenizer=..., or add its files"
        )
    vocabulary = vocabulary_for(tokenizer, shapes["token_embd.weight"][0], config, folder)
    number = FILE_TYPES[file_type].number
    general = general_metadata(conversion.arch, shapes, number, folder=folder, name=name)
    return GgufPlan(
        file_type, conversion,
        {**{source: tuple(conversion.place(source)) for source in conversion.sources}, **dict.fromkeys(tied, ())},
        shapes, types, (*general, *keys, *vocabulary.metadata),
        (*conversion.notes, *types.notes(), *vocabulary.notes),
    )  # fmt: skip
