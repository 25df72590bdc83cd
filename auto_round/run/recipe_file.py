"""Make the recipe of a run: its `QuantConfig` without what belongs to one machine, as the text of `recipe.yaml`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_round.calib_dataset import DATASETS, parse_dataset_string
from auto_round.calibration.data.spec import BY_PROGRAM, redact_dataset
from auto_round.config import RECIPE_FILE, MemoryConfig, OutputConfig, QuantConfig
from auto_round.files import write_text
from auto_round.plugins import loaded_plugins
from auto_round.report.model_card import display_name
from auto_round.report.run_report import redact_path, versions
from auto_round.run.fingerprint import VARIABLES
from auto_round.run.plan import Job
from auto_round.run.settings import Settings


def recipe_of(settings: Settings, job: Job, formats: Sequence[str], shard: int | str) -> QuantConfig:
    """The recipe of a run of these formats.

    What cannot be written is None, and `supply` says what it was: calibration data that is no dataset string or lies in
    local files, and an importance file. The device is left to the machine, unless the CPU was asked for, and so is the
    memory.
    """
    config = settings.config
    dataset, missing = _portable_dataset(config.data.dataset if settings.needs_data else None)
    supply = {"dataset": missing} if missing else {}
    if settings.imatrix is not None:
        supply["imatrix"] = f"importance file {Path(settings.imatrix).name}"
    on_cpu = str(config.memory.device_map).strip().lower() == "cpu"
    return replace(
        config,
        model=display_name(job.model),
        supply=supply,
        environment={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        data=replace(config.data, dataset=dataset, imatrix=None),
        memory=MemoryConfig(device_map="cpu" if on_cpu else 0),
        output=OutputConfig(format=",".join(formats), max_shard_size=shard),
    )


def _portable_dataset(dataset: Any) -> tuple[str | None, str]:
    """A dataset as a recipe says it, without folders, and what of it the recipe cannot hold; "" for nothing."""
    if dataset is None:
        return None, ""
    if not isinstance(dataset, str):
        number = f" of {len(dataset)} samples" if isinstance(dataset, (list, tuple)) else ""
        return None, f"{type(dataset).__name__}{number}, given in Python"
    files, functions = [], []
    for name in (spec.name for spec in parse_dataset_string(dataset)):
        if name in DATASETS:
            functions += [name] if DATASETS[name].where == BY_PROGRAM else []
        elif redact_path(name) != name or os.path.exists(name):
            files.append(os.path.basename(os.path.abspath(os.path.expanduser(name))))
            dataset = dataset.replace(name, files[-1])
    missing = [f"local files {', '.join(files)}"] if files else []
    missing += [f"datasets registered by the program: {', '.join(functions)}"] if functions else []
    return redact_dataset(dataset), "; ".join(missing)


def recipe_text(config: QuantConfig, settings: Settings) -> str:
    """The file of a recipe, with comments."""
    found = versions()
    made = ", ".join(f"{name} {found[name]}" for name in ("auto_round", "torch", "transformers"))
    lines = [
        f"All settings that decide the result. Made with {made}.",
        "Use it with: auto-round MODEL --recipe FILE, or AutoRound.from_recipe(MODEL, FILE)",
    ]
    if config.supply:
        lines.append("What stands under supply could not be written here, and must be given again.")
    for name in ("trust_remote_code", "allow_pickle"):
        if getattr(settings, name):
            lines.append(f"It was made with --{name}, which a recipe cannot allow.")
    lines += [f"It was made with the plugin {name} ({version})." for name, version in loaded_plugins().items()]
    return "".join(f"# {line}\n" for line in lines) + config.to_yaml()


def write_recipe(folder: Path, settings: Settings, job: Job, shard: int | str) -> None:
    """Write `recipe.yaml` beside the weights. Raises OutputError when it cannot be written."""
    write_text(folder / RECIPE_FILE, recipe_text(recipe_of(settings, job, job.formats, shard), settings))
