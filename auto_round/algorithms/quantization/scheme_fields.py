"""Fields of a quantization scheme that an algorithm's settings may carry."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from auto_round.schemes import SCHEME_KEYS, GroupSize

_Config = TypeVar("_Config", bound="SchemeFields")


@dataclass(frozen=True, kw_only=True, repr=False)
class SchemeFields:
    """Parent of the algorithms' settings: the scheme may be given with them. None leaves a field to `AutoRound`, which
    merges the others into its scheme."""

    bits: int | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    data_type: str | None = None
    act_bits: int | None = None
    act_group_size: GroupSize | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    super_bits: int | None = None
    super_group_size: int | None = None
    rotation_config: Any = None

    def scheme_overrides(self) -> dict[str, Any]:
        """The scheme's fields that are given."""
        return {key: getattr(self, key) for key in SCHEME_KEYS if getattr(self, key) is not None}

    def without_scheme(self: _Config) -> _Config:
        """The settings of the algorithm alone."""
        return replace(self, **dict.fromkeys(SCHEME_KEYS))

    def __repr__(self) -> str:
        given = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"
