"""Recipes: named tuning settings (default, best, light, opt_rtn, rtn) for what the user left unset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from auto_round.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """Settings of one recipe; `lr` None lets the tuner choose from the number of steps."""

    name: str
    command: str
    batch_size: int
    iters: int
    seqlen: int
    nsamples: int
    lr: float | None
    disable_opt_rtn: bool
    summary: str

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `AutoRound` that the recipe sets."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "command", "summary")}


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("default", "auto-round", 8, 200, 2048, 128, None, False, "the balance of accuracy and time"),
        Recipe("best", "auto-round-best", 8, 1000, 2048, 512, None, False,
               "most accurate, for 2 bits; several times slower"),
        Recipe("light", "auto-round-light", 8, 50, 2048, 128, 5e-3, False,
               "faster; for 4 bits and 3B parameters or more"),
        Recipe("opt_rtn", "auto-round-opt-rtn", 8, 0, 2048, 128, None, False,
               "no tuning; scales found by a weighted search"),
        Recipe("rtn", "auto-round-rtn", 8, 0, 2048, 0, None, True, "plain rounding to nearest; no data, fastest"),
    )
}  # fmt: skip


def fill_defaults(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, completed with the recipe's values for keys that are missing or None.

    Raises ConfigError when `given` requests tuning steps from a recipe without tuning.
    """
    if recipe.iters == 0 and given.get("iters"):
        raise ConfigError(
            f"iters={given['iters']} contradicts the recipe {recipe.name!r}, which does no tuning; "
            f"use auto-round instead of {recipe.command}, or leave out iters"
        )
    return {k: v for values in (recipe.settings(), given) for k, v in values.items() if v is not None}
