"""The verb `quantize`: turn the given flags and a recipe into one call of `AutoRound`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.cli.arguments import EVAL_FLAGS, OUTPUT_FLAGS, QUANTIZE_GROUPS, RECIPE_FLAGS
from auto_round.cli.parser import build, run_parsed
from auto_round.config import TUNED_NAMES, read_recipe
from auto_round.errors import ConfigError, OutputError, nearest
from auto_round.later import refuse_algorithm
from auto_round.layer_config import parse_layer_config
from auto_round.recipes import RECIPES, Recipe, fill_defaults

# What the verb itself uses; everything else that was given is a keyword of AutoRound.
_EVAL_NAMES = tuple(flag.dest for flag in EVAL_FLAGS)
_VERB_FLAGS = (
    *(flag.dest for flag in (*OUTPUT_FLAGS, *RECIPE_FLAGS)), *_EVAL_NAMES, "format", "max_shard_size", "algorithm",
)  # fmt: skip
# Flags that do not by themselves ask for quantization, so that `auto-round MODEL --eval` only evaluates.
_NOT_QUANTIZING = {
    *_EVAL_NAMES, "model", "device_map", "trust_remote_code", "seed", "platform", "batch_size", "seqlen", "model_dtype",
}  # fmt: skip
DEFAULT_OUTPUT_DIR = "./tmp_autoround"


def run_verb(argv: Sequence[str], recipe_name: str = "default", overview: str = "") -> int:
    """Quantize, print a plan (`--dry_run`), or evaluate (`--eval` alone). Returns the exit code."""
    recipe = RECIPES[recipe_name]
    usage = f"{recipe.command} [quantize] MODEL [--scheme W4A16] [--format auto_round] [--output_dir DIR] [flags]"
    parser = build(
        recipe.command, usage, f"Quantize a language model. Recipe: {recipe.summary}.", QUANTIZE_GROUPS, overview
    )
    return run_parsed(parser, QUANTIZE_GROUPS, argv, lambda given: _run(given, recipe))


def _run(given: dict[str, Any], recipe: Recipe) -> int:
    if "model" not in given:
        raise ConfigError(f"no model was given; use {recipe.command} MODEL, a folder or a hub id")
    if "save_recipe" in given and Path(given["save_recipe"]).expanduser().is_dir():
        raise OutputError(f"--save_recipe {given['save_recipe']} is a folder; give the name of a file in it")
    if given.get("eval") and set(given) <= _NOT_QUANTIZING:
        from auto_round.cli.eval import evaluate_from_flags

        # The shared spellings --bs and --seqlen mean the evaluation's.
        renamed = {"batch_size": "eval_bs", "seqlen": "eval_seqlen", "model_dtype": "eval_model_dtype"}
        return evaluate_from_flags({new: given.pop(old) for old, new in renamed.items() if old in given} | given)
    extra = [name for name in _EVAL_NAMES if name in given and name not in ("eval", "eval_backend")]
    if extra and not given.get("eval"):
        raise ConfigError(f"--{extra[0]} has no effect without --eval; add --eval, or leave it out")
    return quantize(given, recipe)


def quantize(given: dict[str, Any], recipe: Recipe) -> int:
    """Run the job that the given values describe."""
    kwargs = autoround_kwargs(given, recipe)
    output_dir = given.get("output_dir", DEFAULT_OUTPUT_DIR)
    check_output_path(output_dir)
    formats = given.get("format", kwargs.get("format"))
    if formats is not None:
        kwargs["format"] = formats  # so that it is checked before the model is opened

    from auto_round.autoround import AutoRound

    job = AutoRound(**kwargs)
    if "save_recipe" in given:
        job.save_recipe(given["save_recipe"], format=formats, max_shard_size=given.get("max_shard_size"))
    if given.get("dry_run"):
        print("\n\n".join(plan.render() for plan in job.plans(format=formats, output_dir=output_dir)))
        return 0
    writing = {k: given[k] for k in ("max_shard_size", "overwrite", "resume") if k in given}
    _, folders = job.quantize_and_save(output_dir, format=formats, **writing)
    if not given.get("eval"):
        return 0
    from auto_round.cli.eval import evaluate_from_flags

    folder = Path(folders if isinstance(folders, str) else folders[-1])
    after = {**given, "model": str(folder), "reference": given.get("reference", given["model"])}
    return evaluate_from_flags(after, record_in=folder)


def check_output_path(path: str) -> None:
    """Raise OutputError when nothing can be written at `path`, before a model is opened."""
    target = Path(path).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise OutputError(f"output path {path} is a file; give a folder that is new or empty")
    parent = next(folder for folder in (target, *target.parents) if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"output folder {path} cannot be made: {parent} is a file; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {path} cannot be made: {parent} is not writable; choose another")


def autoround_kwargs(given: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Keywords for `AutoRound`: what was given, then the recipe's values. Raises ConfigError for contradictions."""
    chosen = {k: v for k, v in given.items() if k not in _VERB_FLAGS}
    if "algorithm" in given:
        chosen |= _algorithm_kwargs(given["algorithm"], chosen.get("iters"), recipe)
    formats = given.get("format")
    if "recipe" in given:
        beside = {name: given[name] for name in ("format", "max_shard_size") if name in given}
        chosen = _with_recipe_file(given["recipe"], {**chosen, **beside}, "algorithm" in given)
        formats = chosen.get("format")
    filled = _with_model_free(recipe, chosen, formats)
    if "device_map" in filled:
        device = str(filled["device_map"]).strip()
        filled["device_map"] = int(device) if re.fullmatch(r"\d+", device) else device
    if isinstance(filled.get("layer_config"), str):
        filled["layer_config"] = parse_layer_config(filled["layer_config"])
    return filled


def _algorithm_kwargs(value: str, iters: Any, recipe: Recipe) -> dict[str, Any]:
    """What `--algorithm` means for `AutoRound`: transforms first, then one algorithm. Raises UnsupportedError for one
    that this version lacks, and ConfigError for an unknown one or one that contradicts `iters` or the recipe."""
    from auto_round.algorithms.base import ALGORITHMS
    from auto_round.algorithms.transforms.base import split_transforms

    entries, rest = split_transforms([part.strip() for part in value.split(",") if part.strip()])
    name = ",".join(rest) or "auto_round"
    if name not in ALGORITHMS:
        for part in rest:
            refuse_algorithm(f"--algorithm {name}", part)
        known, asked = ("rtn", "gptq", *TUNED_NAMES), name
        name = asked.lower().replace("-", "_")
        if name not in known:
            raise ConfigError(
                f"--algorithm {asked!r} is not known{nearest(name, known) or ';'} Use one of auto_round (tuned "
                "rounding), gptq and rtn"
            )
    if name == "gptq" and recipe.name == "rtn":
        raise ConfigError(
            f"{recipe.command} rounds to nearest without calibration data, and --algorithm gptq needs it; use "
            "auto-round --algorithm gptq --iters 0"
        )
    untuned = name == "rtn" or name in ALGORITHMS
    if untuned and iters:
        raise ConfigError(f"--algorithm {value} does no tuning, but --iters {iters} was given; leave one out")
    if name not in ("rtn", *TUNED_NAMES):
        entries = (*entries, name)
    return ({"algorithm": ",".join(entries)} if entries else {}) | ({"iters": 0} if untuned else {})


def _with_recipe_file(path: str, chosen: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """The settings of a recipe file, overridden by what was chosen beside it. `named`: an algorithm was, too."""
    settings = read_recipe(path).keywords_with(chosen, f"recipe {path}")
    if settings["model_free"] == "auto":
        del settings["model_free"]  # which is said again, if rounding is still all there is to do
    if named and "algorithm" not in chosen:
        dropped = {"algorithm", "damping"}
        if "iters" not in chosen and settings.get("iters") == 0:
            dropped.add("iters")  # a recipe without tuning, and tuning was asked for
        settings = {name: value for name, value in settings.items() if name not in dropped}
    return settings


def _with_model_free(recipe: Recipe, chosen: Mapping[str, Any], formats: str | None) -> dict[str, Any]:
    """The recipe's values filled in, and model-free mode where it is asked for, or where rounding is all there is to
    do. Raises ConfigError when the recipe contradicts it."""
    if chosen.get("model_free"):
        if recipe.name not in ("default", "rtn"):
            raise ConfigError(
                f"--model_free only rounds to nearest, and {recipe.command} does more; use auto-round-rtn, or leave "
                "--model_free out"
            )
        return fill_defaults(RECIPES["rtn"], chosen)
    filled = fill_defaults(recipe, chosen)
    plain = filled.get("iters") == 0 and filled.get("disable_opt_rtn") and "algorithm" not in filled
    rounds = filled.pop("model_free", None) is None and plain
    if rounds and "gguf:" not in (formats or "").lower():
        filled["model_free"] = "auto"
    return filled
