"""Quantization schemes: bits, group size and data type of a layer's weights and activations; the named presets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from auto_round.errors import ConfigError, nearest
from auto_round.later import SCHEMES, refuse

GroupSize = int | tuple[int, int]
ACTIVATION_KEYS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")

# Other spellings of a data type: the normalized name, and the bits that the spelling implies (None: none).
_DTYPE_ALIASES: dict[str, tuple[str, int | None]] = {
    "mxfp": ("mx_fp", None), "mxfp_rceil": ("mx_fp_rceil", None), "mxint": ("mx_int", None), "nvfp": ("nv_fp", None),
    **{f"{mx}{bits}{rule}": (f"mx_fp{rule}", bits)
       for mx in ("mx_fp", "mxfp") for bits in (4, 8) for rule in ("", "_rceil")},
    "mx_int4": ("mx_int", 4), "mxint4": ("mx_int", 4), "nv_fp4": ("nv_fp", 4), "nvfp4": ("nv_fp", 4),
    "nvfp4_with_static_gs": ("nv_fp4_with_static_gs", 4), "fp8": ("fp", 8), "fp8_e4m3": ("fp", 8),
    "fp8_e5m2": ("fp8_e5m2", 8), "mx_fp8e5m2": ("mx_fp8e5m2", 8), "mxfp8e5m2": ("mx_fp8e5m2", 8),
}  # fmt: skip


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of a layer are quantized, with every default filled in."""

    bits: int
    group_size: GroupSize  # values per scale: -1 all of a token, >0 that many of it, 0 (always if static) the tensor
    sym: bool
    data_type: str
    dynamic: bool  # scales are computed from each input; else one static scale comes from the calibration data

    @property
    def has_global_scale(self) -> bool:
        """Whether the group scales are relative to a static global scale (NVFP4)."""
        return self.data_type.endswith("_with_static_gs")

    @property
    def calibrated(self) -> bool:
        """Whether a scale comes from the calibration data."""
        return self.has_global_scale or not self.dynamic


_Config = TypeVar("_Config", bound="SchemeFields")


def argument(
    default: Any, help: str = "", *, aliases: str = "", off: str = "", choices: Sequence[str] = (), local: str = "",
    quiet: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that is a keyword of `AutoRound`, a flag of the command line and a key of recipes.

    Args:
        help: one line for the flag, whose default is added to it; "" for a keyword without a flag.
        aliases, off: other spellings of the flag, and spellings that set the opposite.
        local: why no recipe holds it.
        quiet: it decides nothing of the result: a recipe may set it, and one that is written for a run does not.
    """
    metadata: dict[str, Any] = {"help": help, "aliases": tuple(aliases.split()), "off": tuple(off.split())}
    metadata |= {"choices": tuple(choices), "quiet": quiet, **({"local": local} if local else {})}
    made: dict[str, Any] = {"default_factory": dict} if isinstance(default, dict) else {"default": default}
    return field(**made, metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class SchemeFields:
    """The fields of a scheme; None is not given. Base of the algorithms' settings, which `AutoRound` merges into its
    scheme.

    16 `bits` and above leave a layer in full precision. `group_size` is along the input dimension. A `data_type` that
    includes bits (`mxfp8`) sets `bits`. None for activations takes 16 bits, dynamic, otherwise the weights' values.
    """

    bits: int | None = argument(None, "bits per weight, instead of the scheme's", aliases="bit")
    group_size: GroupSize | None = argument(None, "weights per scale, -1 per channel, 0 per tensor, or ROWS,COLUMNS")
    sym: bool | None = argument(None, "symmetric around zero", off="asym")
    data_type: str | None = argument(None, "weight data type, instead of the scheme's", aliases="dtype")
    act_bits: int | None = argument(None, "bits of the activations, instead of the scheme's; 16 leaves them alone")
    act_group_size: GroupSize | None = argument(
        None, "activations per scale: -1 a token's, 0 all, or that many of a token"
    )
    act_sym: bool | None = argument(None, "activations symmetric around zero", off="act_asym")
    act_data_type: str | None = argument(None, "activation data type, instead of the weights'", aliases="act_dtype")
    act_dynamic: bool | None = argument(
        None, "activation scales from each input (default), not fixed ones from calibration data",
        off="disable_act_dynamic",
    )  # fmt: skip
    super_bits: int | None = argument(None, "bits of the scales themselves, for GGUF's K types")
    super_group_size: int | None = argument(None, "scales that share one of their own, for GGUF's K types")
    rotation_config: Any = argument(None)

    def scheme_overrides(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in SCHEME_KEYS if getattr(self, key) is not None}

    def without_scheme(self: _Config) -> _Config:
        return replace(self, **dict.fromkeys(SCHEME_KEYS))

    def __repr__(self) -> str:
        given = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class QuantizationScheme(SchemeFields, Mapping[str, Any]):
    """How one layer is quantized; None takes the default. Also a mapping, as the entries of a layer configuration."""

    bits: int = 4
    group_size: GroupSize = 128
    sym: bool = True
    data_type: str = "int"

    def __post_init__(self) -> None:
        if isinstance(self.group_size, list):
            object.__setattr__(self, "group_size", tuple(self.group_size))
        self._normalize_dtype("data_type", "bits")
        if str(self.act_data_type).lower() == "float" and not self.quantizes_activations:
            object.__setattr__(self, "act_data_type", None)  # AutoRound 0.x writes "float" for unquantized activations
        if self.act_data_type is not None:
            self._normalize_dtype("act_data_type", "act_bits")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or self.bits < 1:
            raise ConfigError(
                f"bits={self.bits!r} is not a positive whole number; use 2 to 8, or 16 to leave a layer unquantized"
            )
        size = self.group_size
        if isinstance(size, tuple):
            if len(size) != 2 or any(not isinstance(s, int) or s <= 0 for s in size):
                raise ConfigError(f"group_size={size!r}: a block needs two positive whole numbers (rows, columns)")
        elif not isinstance(size, int) or isinstance(size, bool) or size < -1:
            raise ConfigError(
                f"group_size={size!r} is not allowed; use a positive number, -1 (per channel) or 0 (per tensor)"
            )

    def _normalize_dtype(self, dtype_field: str, bits_field: str) -> None:
        """Normalize the name of a data type, and set the bits that it implies unless they are 16 or more."""
        given = str(getattr(self, dtype_field)).lower()
        name, width = _DTYPE_ALIASES.get(given, (given, None))
        object.__setattr__(self, dtype_field, name)
        bits = getattr(self, bits_field)
        if width is not None and isinstance(bits, int) and bits < 16:
            object.__setattr__(self, bits_field, width)

    def _comparison_key(self) -> tuple[Any, ...]:
        skipped = () if self.quantizes_activations else ACTIVATION_KEYS
        return tuple(None if key in skipped else getattr(self, key) for key in SCHEME_KEYS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationScheme) and self._comparison_key() == other._comparison_key()

    def __hash__(self) -> int:
        return hash(self._comparison_key())

    @property
    def quantizes_weights(self) -> bool:
        return self.bits < 16

    @property
    def quantizes_activations(self) -> bool:
        return self.act_bits is not None and self.act_bits < 16

    @property
    def calibrated(self) -> bool:
        """Whether calibration data determines a static scale of the inputs."""
        return self.activations is not None and self.activations.calibrated

    @property
    def activations(self) -> ActivationScheme | None:
        """How activations are quantized, with defaults filled in, or None when they are not."""
        if self.act_bits is None or self.act_bits >= 16:
            return None
        size = self.group_size if self.act_group_size is None else self.act_group_size
        return ActivationScheme(
            self.act_bits, tuple(size) if isinstance(size, list) else size,
            self.sym if self.act_sym is None else self.act_sym,
            self.data_type if self.act_data_type is None else self.act_data_type,
            self.act_dynamic is not False,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationScheme:
        """Build from a mapping of field names. Raises ConfigError for an unknown name."""
        check_scheme_keys(values)
        return cls(**values)

    def with_overrides(self, values: Mapping[str, Any]) -> QuantizationScheme:
        """A copy with the given fields replaced; values of None are ignored."""
        check_scheme_keys(values)
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    @classmethod
    def get_attributes(cls) -> list[str]:
        return list(SCHEME_KEYS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __getitem__(self, key: str) -> Any:
        if key not in SCHEME_KEYS:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(SCHEME_KEYS)

    def __len__(self) -> int:
        return len(SCHEME_KEYS)

    def describe(self) -> str:
        """A short phrase for messages and reports, such as `int4 g128 sym`."""
        if not self.quantizes_weights:
            return "full precision"
        size = self.group_size
        words = {-1: "per channel", 0: "per tensor"}
        group = f"g{size[0]}x{size[1]}" if isinstance(size, tuple) else words.get(size, f"g{size}")
        text = f"{self.data_type}{self.bits} {group} {'sym' if self.sym else 'asym'}"
        if self.quantizes_activations:
            kind = " static" if self.act_dynamic is False else ""
            text += f", {self.act_data_type or self.data_type}{self.act_bits}{kind} activations"
        return text


SCHEME_KEYS = tuple(f.name for f in fields(SchemeFields))


def check_scheme_keys(values: Mapping[str, Any]) -> None:
    """Raise ConfigError when a key is not a field of QuantizationScheme."""
    for key in values:
        if key not in SCHEME_KEYS:
            raise ConfigError(
                f"unknown scheme field {key!r}{nearest(key, SCHEME_KEYS)} Allowed: {', '.join(SCHEME_KEYS)}"
            )


def _weights(bits: int, group_size: GroupSize = 128, **kw: Any) -> QuantizationScheme:
    return QuantizationScheme(bits=bits, group_size=group_size, act_bits=16, **kw)


def _weights_and_activations(
    bits: int, group_size: int, dtype: str, act_dtype: str | None = None, **kw: Any
) -> QuantizationScheme:
    """Activations with the weights' bits, group size and data type."""
    return QuantizationScheme(
        bits=bits, group_size=group_size, data_type=dtype, act_bits=bits, act_group_size=group_size, act_sym=True,
        act_data_type=act_dtype or dtype, act_dynamic=True, **kw,
    )  # fmt: skip


PRESET_SCHEMES: dict[str, QuantizationScheme] = {
    **{f"W{b}A16": _weights(b) for b in (2, 3, 4, 5, 6, 8)},
    "W2A16G64": _weights(2, 64),
    "W2A16G32": _weights(2, 32),
    "W4A16_MIXED": _weights(4),
    "MXFP4": _weights_and_activations(4, 32, "mx_fp"),
    "MXFP8": _weights_and_activations(8, 32, "mx_fp"),
    "MXFP4_RCEIL": _weights_and_activations(4, 32, "mx_fp", "mx_fp_rceil"),
    "MXFP8_RCEIL": _weights_and_activations(8, 32, "mx_fp", "mx_fp_rceil"),
    "MXINT4": _weights_and_activations(4, 32, "mx_int"),
    "NVFP4": _weights_and_activations(4, 16, "nv_fp", "nv_fp4_with_static_gs"),
    "FPW8A16": _weights(8, 0, data_type="fp"),
    "FP8_STATIC": QuantizationScheme(
        8, -1, True, "fp", act_bits=8, act_group_size=0, act_sym=True, act_data_type="fp", act_dynamic=False
    ),
    "FP8_BLOCK": QuantizationScheme(
        8, (128, 128), True, "fp", act_bits=8, act_group_size=128, act_sym=True, act_data_type="fp", act_dynamic=True
    ),
    "INT8": _weights_and_activations(8, -1, "int"),
    "INT8_W8A8": _weights_and_activations(8, -1, "int"),
    "INT4": _weights_and_activations(4, -1, "int"),
    "BF16": QuantizationScheme(16, 128, True, "fp", act_bits=16),
}


@dataclass(frozen=True)
class MixedPreset:
    """Bits of the other layers in a preset whose scheme applies to routed experts only."""

    other_bits: int
    multimodal_other_bits: int  # in a model that also reads images or sound


MIXED_PRESETS: dict[str, MixedPreset] = {"W4A16_MIXED": MixedPreset(other_bits=8, multimodal_other_bits=16)}

# GGUF types: (bits, group_size, sym, data_type, super_bits, super_group_size), from ggml's block structures.
_GGUF: dict[str, tuple[int, int, bool, str, int | None, int | None]] = {
    "Q4_0": (4, 32, True, "int", None, None),
    "Q5_0": (5, 32, True, "int", None, None),
    "Q8_0": (8, 32, True, "int", None, None),
    "Q4_1": (4, 32, False, "int_asym_float_zp", None, None),
    "Q5_1": (5, 32, False, "int_asym_float_zp", None, None),
    **{f"Q2_K{s}": (2, 16, False, "int_asym_dq", 4, 16) for s in ("", "_S", "_MIXED")},
    **{f"Q3_K{s}": (3, 16, True, "int_sym_dq", 6, 16) for s in ("_S", "_M", "_L")},
    **{f"Q4_K{s}": (4, 32, False, "int_asym_dq", 6, 8) for s in ("_S", "_M")},
    **{f"Q5_K{s}": (5, 32, False, "int_asym_dq", 6, 8) for s in ("_S", "_M")},
    "Q6_K": (6, 16, True, "int_sym_dq", 8, 16),
}
for _name, (_b, _g, _s, _d, _sb, _sg) in _GGUF.items():
    PRESET_SCHEMES[f"GGUF:{_name}"] = QuantizationScheme(
        _b, _g, _s, _d, act_bits=16, super_bits=_sb, super_group_size=_sg
    )


def __getattr__(name: str) -> QuantizationScheme:
    """The presets as names of this module: `schemes.MXFP8`."""
    if name in PRESET_SCHEMES:
        return PRESET_SCHEMES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def normalize_preset_name(name: str) -> str:
    """`w4a16` as `W4A16`: upper case, dashes as underscores."""
    return re.sub(r"[-\s]", "_", name.strip().strip("'\"")).upper()


def mixed_preset(scheme: object) -> MixedPreset | None:
    """The other layers' bits of the preset called `scheme`; None for any scheme that is not mixed."""
    return MIXED_PRESETS.get(normalize_preset_name(scheme)) if isinstance(scheme, str) else None


def is_preset_scheme(name: str) -> bool:
    """Whether `name` is a preset, in any spelling that `preset_name_to_scheme` takes."""
    return normalize_preset_name(name) in PRESET_SCHEMES


def preset_name_to_scheme(name: str) -> QuantizationScheme:
    """The preset called `name`, in any case. Raises ConfigError with the nearest names, and UnsupportedError for a
    preset that this version lacks."""
    key = normalize_preset_name(name)
    refuse(SCHEMES.get(key), f"scheme {name!r}")
    if key not in PRESET_SCHEMES:
        if key.startswith("GGUF") and "*" in key:
            raise ConfigError(f"unknown scheme {name!r}; the GGUF types are {', '.join(f'GGUF:{t}' for t in _GGUF)}")
        raise ConfigError(
            f"unknown scheme {name!r}{nearest(key, PRESET_SCHEMES)} Known schemes: {', '.join(sorted(PRESET_SCHEMES))}"
        )
    return PRESET_SCHEMES[key]


def parse_scheme(value: str | Mapping[str, Any] | QuantizationScheme) -> QuantizationScheme:
    """The scheme given as preset name, mapping of fields or scheme. Raises ConfigError for anything else."""
    if isinstance(value, QuantizationScheme):
        return value
    if isinstance(value, str):
        return preset_name_to_scheme(value)
    if isinstance(value, Mapping):
        return QuantizationScheme.from_dict(value)
    raise ConfigError(
        f"scheme={value!r}: give a preset name, a dict of fields or a QuantizationScheme, not {type(value).__name__}"
    )
