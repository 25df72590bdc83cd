"""The type of each tensor in a GGUF file of a file type, by the rules of llama.cpp's `src/llama-quant.cpp`.

`tools/make_gguf_types.py` records the types that its `llama-quantize` chooses, which the tests compare with.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from auto_round.codecs.ggml.types import GGML_TYPES

# dtype of each GGUF type that is not quantized.
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a ggml type, F32, F16 or BF16."""
    if kind in FLOAT_TYPES:
        return math.prod(shape) * FLOAT_TYPES[kind].itemsize
    return math.prod(shape[:-1]) * GGML_TYPES[kind].row_bytes(shape[-1])


class FileType(NamedTuple):
    """A mixture of types: value of `general.file_type`, and the type of every matrix without a rule."""

    number: int
    base: str


FILE_TYPES: Mapping[str, FileType] = MappingProxyType({
    "q4_0": FileType(2, "Q4_0"), "q4_1": FileType(3, "Q4_1"), "q5_0": FileType(8, "Q5_0"),
    "q5_1": FileType(9, "Q5_1"), "q8_0": FileType(7, "Q8_0"), "q2_k_s": FileType(21, "Q2_K"),
    "q2_k": FileType(10, "Q2_K"), "q3_k_s": FileType(11, "Q3_K"), "q3_k_m": FileType(12, "Q3_K"),
    "q3_k_l": FileType(13, "Q3_K"), "q4_k_s": FileType(14, "Q4_K"), "q4_k_m": FileType(15, "Q4_K"),
    "q5_k_s": FileType(16, "Q5_K"), "q5_k_m": FileType(17, "Q5_K"), "q6_k": FileType(18, "Q6_K"),
    "q2_k_mixed": FileType(10, "Q4_K"),  # not in llama.cpp; the nearest is Q2_K
})  # fmt: skip

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


class ModelDimensions(NamedTuple):
    """Blocks of a model (with those for multi-token prediction), query and key-value heads, and experts of a block."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def grouped(self) -> int:
        """Query heads per key-value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0


class _Tensor(NamedTuple):
    """Input of a rule: one of `total` tensors of a role (of blocks, for `down`), and the number of those before it."""

    name: str
    role: str
    columns: int
    place: int
    total: int
    arch: str
    sizes: ModelDimensions
    importance: bool

    def first(self, part: int) -> bool:
        """In the first 1/part of the model."""
        return self.place < self.total // part


_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_Rule = Callable[[_Tensor], str | None]
_ROLES = (
    # Fused tensors that include the values count as values, which are the most sensitive to rounding.
    ("attn_qkv.weight", "v"), ("attn_kv_b.weight", "v"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
    ("attn_q.weight", ""), ("attn_output.weight", "o"), ("ffn_up", ""), ("ffn_gate", ""), ("ffn_down", "down"),
)  # fmt: skip


def _spread(t: _Tensor) -> str | None:
    """More bits in the first and last eighth of the model, and every third tensor in between."""
    eighth = t.total // 8
    return "Q6_K" if t.first(8) or t.place >= 7 * t.total // 8 or (t.place - eighth) % 3 == 2 else None


# Rules by file type; None: the file's base type.
_VALUES: dict[str, _Rule] = {
    "q2_k": lambda t: "Q4_K" if t.sizes.grouped >= 4 else "Q3_K",
    "q2_k_s": lambda t: "Q4_K" if t.sizes.grouped >= 4 else None,
    "q3_k_m": lambda t: "Q5_K" if t.place < 2 else "Q4_K",
    "q3_k_l": lambda t: "Q5_K",
    "q4_k_s": lambda t: "Q5_K" if t.place < 4 else None,
    "q4_k_m": _spread,
    "q5_k_m": _spread,
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
    "q4_k_m": _spread,
    "q5_k_m": _spread,
}
_DOWN_FALCON: dict[str, _Rule] = {
    **_DOWN,
    "q3_k_m": lambda t: "Q5_K" if t.first(16) else _spread(t) and "Q4_K",
    "q3_k_l": lambda t: "Q4_K",
    "q4_k_s": lambda t: None,
    "q4_k_m": lambda t: "Q6_K" if t.first(16) else _spread(t) and "Q5_K",
}
_OUT = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
_OUT_FALCON = {"q3_k_l": "Q4_K"}
_OUT_EIGHT_EXPERTS = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"), "Q5_K")


def tensor_types(
    name: str, arch: str, tensors: Sequence[tuple[str, Sequence[int]]], sizes: ModelDimensions,
    importance: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:  # fmt: skip
    """The type of each tensor (name in the file, shape in torch's order) in a file of type `name`; and that by the
    rules where rows do not fill its blocks. Without an `output.weight`, the token embedding is the head and gets its
    type."""
    roles = {tensor: next((role for part, role in _ROLES if part in tensor), "") for tensor, _ in tensors}
    tied = "output.weight" not in roles
    roles |= {"output.weight": "output", **dict.fromkeys(_EMBEDDINGS, "output" if tied else "embedding")}
    values = sum(role == "v" for role in roles.values())
    seen: Counter[str] = Counter()
    types = {tensor: "F32" for tensor, _ in tensors}
    fallbacks: dict[str, str] = {}
    blocks = {tensor: int(found[1]) for tensor in types if (found := re.match(r"blk\.(\d+)\.", tensor))}
    for tensor, shape in sorted(tensors, key=lambda item: (blocks.get(item[0], -1), item[0])):
        if not quantizable(tensor, shape):
            continue
        role = roles[tensor]
        place = blocks.get(tensor, seen[role]) if role == "down" and sizes.n_expert > 1 else seen[role]
        seen[role] += 1
        total = values if role == "v" else sizes.n_layer
        meant = _type_by_rule(name, _Tensor(tensor, role, int(shape[-1]), place, total, arch, sizes, importance))
        types[tensor] = fallback_type(meant, int(shape[-1]))
        if types[tensor] != meant:
            fallbacks[tensor] = meant
    return types, fallbacks


def fallback_notes(types: Mapping[str, str], fallbacks: Mapping[str, str]) -> list[str]:
    """One message for each kind of fallback that `tensor_types` found."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, meant in fallbacks.items():
        names.setdefault((meant, types[name]), []).append(name)
    lines = []
    for (meant, given), (first, *others) in names.items():
        which = f"{len(others) + 1} tensors ({first}, ...) are" if others else f"1 tensor ({first}) is"
        rows = f"{'their' if others else 'its'} rows are no multiple of {GGML_TYPES[meant].block}"
        lines.append(f"{which} {given} instead of {meant}: {rows}")
    return lines


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp quantizes the tensor in some file type: a matrix other than norms, routers and tables."""
    is_matrix = any(size != 1 for size in shape[:-1])  # ggml does not count leading dimensions of 1
    if not is_matrix or not name.endswith("weight") or name in _NEVER_QUANTIZED_NAMES:
        return False
    return not any(part in name for part in _NEVER_QUANTIZED)


def _type_by_rule(name: str, tensor: _Tensor) -> str:
    base, sizes, role = FILE_TYPES[name].base, tensor.sizes, tensor.role
    falcon, eight = tensor.arch == "falcon", sizes.n_expert == 8
    if name == "q2_k_mixed":
        return "Q8_0" if role in ("output", "embedding") else "Q2_K" if "_exps." in tensor.name else base
    if role == "output":
        return "Q8_0" if falcon or base == "Q8_0" or tensor.columns % GGML_TYPES[base].block else "Q6_K"
    if role in ("v", "k") and eight:
        return "Q8_0"
    found: str | None = None
    if role == "v":
        found = _VALUES[name](tensor) if name in _VALUES else None
        is_70b = _DEPTH_OF_70B.get(tensor.arch) == sizes.n_layer and (
            tensor.arch != "llama" or sizes.n_head != sizes.n_head_kv
        )
        if is_70b and (found or base) in ("Q3_K", "Q4_K"):
            found = "Q5_K"
    elif role == "down":
        rules = _DOWN_FALCON if falcon else _DOWN
        found = rules[name](tensor) if name in rules else None
    elif role == "o":
        found = (_OUT_FALCON if falcon else _OUT_EIGHT_EXPERTS if eight else _OUT).get(name)
    return found or base


def fallback_type(kind: str, columns: int) -> str:
    """`kind`, or llama.cpp's replacement when `columns` do not divide into its blocks."""
    if kind in FLOAT_TYPES or columns % GGML_TYPES[kind].block == 0:
        return kind
    smaller = _SMALLER_BLOCKS.get(kind, kind)
    return smaller if columns % GGML_TYPES[smaller].block == 0 else "F16"
