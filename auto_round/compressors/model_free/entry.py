"""How `AutoRound` enters model-free mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.compressors.model_free.drive import ModelFree
from auto_round.compressors.model_free.options import check_model, model_free_options
from auto_round.compressors.settings import Settings
from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.logger import logger

AUTO = "auto"
_OWN = ("parallelism",)


def rounding_only(alg_configs: Any, iters: int | None, options: dict[str, Any]) -> int | None:
    """`iters` for a model-free run, 0 where nothing was said; the search for scales is switched off in `options`.

    Raises ConfigError when tuning or the search was asked for.
    """
    if options["model_free"] not in (True, AUTO):
        raise ConfigError(f"model_free={options['model_free']!r} is not allowed; use True or False")
    if alg_configs is not None or options["algorithm"] is not None:
        given = alg_configs if alg_configs is not None else options["algorithm"]
        if not (isinstance(given, str) and given.lower() == "rtn") and not (
            isinstance(given, RTNConfig) and not given.optimized
        ):
            raise ConfigError(f"model_free=True only rounds to nearest, and the algorithm {given!r} does more")
        if isinstance(given, RTNConfig):
            return iters
    if iters:
        raise ConfigError(f"iters={iters} contradicts model_free=True, which does no tuning; leave one out")
    if options["disable_opt_rtn"] is False:
        raise ConfigError(
            "enable_opt_rtn contradicts model_free=True: the search for scales needs calibration data; leave one out"
        )
    options["disable_opt_rtn"] = True
    return 0


def open_model_free(model: Any, settings: Settings, options: Mapping[str, Any]) -> ModelFree | None:
    """The run, or None when the regular flow does it.

    Raises:
        ConfigError: options of this mode without it, or a model object.
        UnsupportedError, ModelError: it was asked for and cannot be; where it was only offered (`AUTO`), that is said
            and the regular flow goes on.
    """
    wanted = options["model_free"]
    if not wanted:
        given = [name for name in _OWN if options[name] is not None]
        if given:
            raise ConfigError(f"{given[0]} is an option of model-free mode; add model_free=True (--model_free)")
        return None
    try:
        if settings.imatrix is not None or settings.save_imatrix is not None:
            raise UnsupportedError(
                "model-free mode rounds to nearest, and importance files weigh a search; leave one out"
            )
        budget = settings.max_memory
        own = model_free_options(options["parallelism"], None if budget is None else budget.ram)
        free = ModelFree(check_model(model), settings, own, options["model_dtype"])
        free.source()
    except (UnsupportedError, ModelError) as error:
        if wanted is True:
            raise
        logger.info("the regular flow is taken: %s", error)
        return None
    return free
