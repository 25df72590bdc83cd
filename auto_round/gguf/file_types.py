"""The type of each tensor in a GGUF file of a file type, by the rules of llama.cpp's `src/llama-quant.cpp`.

`tools/make_gguf_types.py` records the types that its `llama-quantize` chooses, which the tests compare with.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from auto_round.codecs.ggml.types import GGML_TYPES

# dtype of each GGUF type that is not quantized.
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a ggml type, F32, F16 or BF16."""
    if kind in FLOAT_TYPES:
        return math.prod(shape) * FLOAT_TYPES[kind].itemsize
    return math.prod(shape[:-1]) * GGML_TYPES[kind].row_bytes(shape[-1])


@dataclass(frozen=True)
class FileType:
    """A mixture of types.

    Attributes:
        name: `q4_k_m`.
        number: value of `general.file_type`.
        base: the type of every matrix without a rule.
    """

    name: str
    number: int
    base: str


_ROWS = (
    ("q4_0", 2, "Q4_0"), ("q4_1", 3, "Q4_1"), ("q5_0", 8, "Q5_0"), ("q5_1", 9, "Q5_1"), ("q8_0", 7, "Q8_0"),
    ("q2_k_s", 21, "Q2_K"), ("q2_k", 10, "Q2_K"), ("q3_k_s", 11, "Q3_K"), ("q3_k_m", 12, "Q3_K"),
    ("q3_k_l", 13, "Q3_K"), ("q4_k_s", 14, "Q4_K"), ("q4_k_m", 15, "Q4_K"), ("q5_k_s", 16, "Q5_K"),
    ("q5_k_m", 17, "Q5_K"), ("q6_k", 18, "Q6_K"),
    ("q2_k_mixed", 10, "Q4_K"),  # not in llama.cpp; the nearest is Q2_K
)  # fmt: skip
FILE_TYPES: Mapping[str, FileType] = MappingProxyType({row[0]: FileType(*row) for row in _ROWS})

# The replacement of a type whose blocks do not divide a row; float16 where that does not fit either.
_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# The types that a layer configuration means by bits alone.
TYPE_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}

# Matrices that stay float32, by a part of the name: routers, position tables, small convolutions and projections.
_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{part}.weight" for part in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2",
        "lerp_fused")),
)  # fmt: skip
_NEVER_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")

# Number of blocks by which llama.cpp recognizes the 70B model of an architecture, whose few value heads get more bits.
_DEPTH_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a model, from its metadata.

    Attributes:
        n_layer: blocks, including those for multi-token prediction.
        n_head, n_head_kv: query heads and key-value heads of the first block.
        n_expert: routed experts of a block, 0 in a dense model.
    """

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def grouped(self) -> int:
        """Query heads per key-value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0


class TensorTypes(dict[str, str]):
    """The type of every tensor by its name.

    Attributes:
        fallbacks: {tensor: type by the rules} where its rows do not divide into blocks of that type.
    """

    def __init__(self, types: Mapping[str, str], fallbacks: Mapping[str, str]) -> None:
        super().__init__(types)
        self.fallbacks = dict(fallbacks)

    def notes(self) -> list[str]:
        """One message for each kind of fallback."""
        counts: dict[tuple[str, str], list[str]] = {}
        for name, meant in self.fallbacks.items():
            counts.setdefault((meant, self[name]), []).append(name)
        lines = []
        for (meant, given), names in counts.items():
            one = len(names) == 1
            which = f"1 tensor ({names[0]}) is" if one else f"{len(names)} tensors ({names[0]}, ...) are"
            block, whose = GGML_TYPES[meant].block, "its" if one else "their"
            lines.append(f"{which} {given} instead of {meant}: {whose} rows are no multiple of {block}")
        return lines


@dataclass(frozen=True)
class _Tensor:
    """Input of a rule.

    Attributes:
        role: `v`, `k`, `o`, `down`, `output`, `embedding` or an empty string.
        index: number of preceding tensors of this role; the block, for `down` in a model with experts.
        count: tensors of the role; blocks, for `down`.
    """

    name: str
    role: str
    columns: int
    index: int
    count: int
    arch: str
    sizes: ModelDimensions
    importance: bool

    @property
    def spread(self) -> bool:
        """In the first or last eighth of the model, or every third in between."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2

    def first(self, part: int) -> bool:
        """In the first 1/part of the model."""
        return self.index < self.count // part


_Rule = Callable[[_Tensor], str | None]
_ROLES = (
    # Fused tensors that include the values count as values, which are the most sensitive to rounding.
    ("attn_qkv.weight", "v"), ("attn_kv_b.weight", "v"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
    ("attn_q.weight", ""), ("attn_output.weight", "o"), ("ffn_up", ""), ("ffn_gate", ""), ("ffn_down", "down"),
)  # fmt: skip

# None: the file's base type.
_VALUES: dict[str, _Rule] = {
    "q2_k": lambda t: "Q4_K" if t.sizes.grouped >= 4 else "Q3_K",
    "q2_k_s": lambda t: "Q4_K" if t.sizes.grouped >= 4 else None,
    "q3_k_m": lambda t: "Q5_K" if t.index < 2 else "Q4_K",
    "q3_k_l": lambda t: "Q5_K",
    "q4_k_s": lambda t: "Q5_K" if t.index < 4 else None,
    "q4_k_m": lambda t: "Q6_K" if t.spread else None,
    "q5_k_m": lambda t: "Q6_K" if t.spread else None,
}
_DOWN: dict[str, _Rule] = {
    # Q4_1 and Q5_1 protect the first blocks, but only together with an importance matrix.
    "q4_0": lambda t: "Q4_1" if t.importance and t.first(8) else None,
    "q5_0": lambda t: "Q5_1" if t.importance and t.first(8) else None,
    "q2_k": lambda t: "Q3_K",
    "q2_k_s": lambda t: "Q4_K" if t.first(8) else None,
    "q3_k_m": lambda t: "Q5_K" if t.first(16) else "Q4_K",
    "q3_k_l": lambda t: "Q5_K",
    "q4_k_s": lambda t: "Q5_K" if t.first(8) else None,
    "q4_k_m": lambda t: "Q6_K" if t.spread else None,
    "q5_k_m": lambda t: "Q6_K" if t.spread else None,
}
_DOWN_FALCON: dict[str, _Rule] = {
    **_DOWN,
    "q3_k_m": lambda t: "Q5_K" if t.first(16) else "Q4_K" if t.spread else None,
    "q3_k_l": lambda t: "Q4_K",
    "q4_k_s": lambda t: None,
    "q4_k_m": lambda t: "Q6_K" if t.first(16) else "Q5_K" if t.spread else None,
}
_OUT = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
_OUT_FALCON = {"q3_k_l": "Q4_K"}
_OUT_EIGHT_EXPERTS = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"), "Q5_K")


def tensor_types(
    name: str, arch: str, tensors: Sequence[tuple[str, Sequence[int]]], sizes: ModelDimensions,
    importance: bool = False,
) -> TensorTypes:  # fmt: skip
    """The type of each tensor in a file of type `name`.

    Args:
        name: one of `FILE_TYPES`.
        arch: llama.cpp's name of the architecture.
        tensors: (name in the file, shape in torch's order); [experts, out, in] for stacked experts. Without an
            `output.weight`, the token embedding is the head and gets the head's type.
        sizes: of the model.
        importance: whether an importance matrix is used.
    """
    tied = not any(tensor == "output.weight" for tensor, _ in tensors)
    values = sum(_role(tensor, tied) == "v" for tensor, _ in tensors)
    seen: Counter[str] = Counter()
    types = {tensor: "F32" for tensor, _ in tensors}
    fallbacks: dict[str, str] = {}
    for tensor, shape in sorted(tensors, key=lambda item: (_block(item[0], -1), item[0])):
        if not quantizable(tensor, shape):
            continue
        role = _role(tensor, tied)
        index = seen[role]
        seen[role] += 1
        if role == "down" and sizes.n_expert > 1:
            index = _block(tensor, index)
        count = values if role == "v" else sizes.n_layer
        view = _Tensor(tensor, role, int(shape[-1]), index, count, arch, sizes, importance)
        meant = _type_by_rule(FILE_TYPES[name], view)
        types[tensor] = fallback_type(meant, view.columns)
        if types[tensor] != meant:
            fallbacks[tensor] = meant
    return TensorTypes(types, fallbacks)


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp quantizes the tensor in some file type: a matrix other than norms, routers and tables."""
    if _rank(shape) < 2 or not name.endswith("weight") or name in _NEVER_QUANTIZED_NAMES:
        return False
    return not any(part in name for part in _NEVER_QUANTIZED)


def _rank(shape: Sequence[int]) -> int:
    """Number of dimensions without leading ones, as ggml counts them."""
    return next((len(shape) - i for i, size in enumerate(shape) if size != 1), 1)


def _block(name: str, otherwise: int) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else otherwise


def _role(name: str, tied: bool) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if tied else "embedding"
    return next((role for part, role in _ROLES if part in name), "")


def _type_by_rule(kind: FileType, tensor: _Tensor) -> str:
    falcon, eight = tensor.arch == "falcon", tensor.sizes.n_expert == 8
    found: str | None = None
    if kind.name == "q2_k_mixed":
        if tensor.role in ("output", "embedding"):
            found = "Q8_0"
        elif "_exps." in tensor.name:
            found = "Q2_K"
    elif tensor.role == "output":
        eight_bits = falcon or kind.base == "Q8_0" or tensor.columns % GGML_TYPES[kind.base].block
        found = "Q8_0" if eight_bits else "Q6_K"
    elif tensor.role in ("v", "k") and eight:
        found = "Q8_0"
    elif tensor.role == "v":
        found = _VALUES[kind.name](tensor) if kind.name in _VALUES else None
        if _is_70b(tensor) and (found or kind.base) in ("Q3_K", "Q4_K"):
            found = "Q5_K"
    elif tensor.role == "down":
        rules = _DOWN_FALCON if falcon else _DOWN
        found = rules[kind.name](tensor) if kind.name in rules else None
    elif tensor.role == "o":
        found = (_OUT_FALCON if falcon else _OUT_EIGHT_EXPERTS if eight else _OUT).get(kind.name)
    return found or kind.base


def _is_70b(tensor: _Tensor) -> bool:
    if _DEPTH_OF_70B.get(tensor.arch) != tensor.sizes.n_layer:
        return False
    return tensor.arch != "llama" or tensor.sizes.n_head != tensor.sizes.n_head_kv


def fallback_type(kind: str, columns: int) -> str:
    """`kind`, or llama.cpp's replacement when `columns` do not divide into its blocks."""
    if kind in FLOAT_TYPES or columns % GGML_TYPES[kind].block == 0:
        return kind
    smaller = _SMALLER_BLOCKS.get(kind, kind)
    return smaller if columns % GGML_TYPES[smaller].block == 0 else "F16"
