"""Finish an output folder: config, tokenizer, recipe, model card and report beside the weights; verify and publish it.

A recipe is the `QuantConfig` of a run without what belongs to one machine, such as paths and device numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.calib_dataset import DATASETS, parse_dataset_string
from auto_round.calibration.data.spec import BY_PROGRAM, redact_dataset
from auto_round.config import RECIPE_FILE, MemoryConfig, OutputConfig, QuantConfig, plain
from auto_round.errors import VerifyError
from auto_round.files import file_sha256, write_json, write_text
from auto_round.formats.base import OutputFormat
from auto_round.logger import logger
from auto_round.modeling.config import causal_class, source_config, untied, with_both_rope_spellings, with_dtype
from auto_round.modeling.files.folder import copy_side_files
from auto_round.modeling.source import ModelSource
from auto_round.output.staging import LOCK, sync_and_hash
from auto_round.plugins import loaded_plugins
from auto_round.report import run_report
from auto_round.report.memory import peak_rss_bytes, peak_vram_bytes
from auto_round.report.model_card import ModelCard, display_name, write_model_card
from auto_round.run.fingerprint import VARIABLES
from auto_round.run.journal import Journal
from auto_round.run.numerics import NumericsPolicy
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.settings import Settings
from auto_round.run.writers import FileOutput, OutputContext


def write_side_files(folder: Path, source: ModelSource, tokenizer: Any, trusted: bool) -> None:
    """Copy tokenizer and other small files, with Python files if `trusted`, or save them from the objects."""
    if source.folder is not None:
        copy_side_files(source.folder, folder, trusted)
    if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(folder)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        write_text(folder / "generation_config.json", generation.to_json_string())


def write_config(folder: Path, source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> None:
    """Write the files of `config_values`; config.json keeps the key order of the source."""
    for name, values in config_values(source, job, fmt, trusted).items():
        if name == "config.json":
            write_text(folder / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        else:
            write_json(folder / name, values)


def config_values(source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> dict[str, Any]:
    """By file name: the source's config.json with the format's quantization_config, and the latter alone."""
    values = source_config(source.config, source.folder, trusted)
    values = with_both_rope_spellings(with_dtype(values, str(source.dtype).removeprefix("torch.")))
    if values.get("architectures") is None:
        name = type(source.model).__name__ if source.can_run else causal_class(values)
        values |= {} if name is None else {"architectures": [name]}
    if any(not name.startswith(tuple(f"{b}." for b in job.blocks)) for name in job.quantized()):
        values = untied(values)
    plan = job.export_plan(fmt)
    quantization = fmt.file_config(plan)
    found: dict[str, Any] = {} if quantization is None else dict.fromkeys(fmt.config_files, quantization)
    return {**found, "config.json": fmt.model_config(values, plan)}


def recipe_of(settings: Settings, job: Job, formats: Sequence[str], shard: int | str) -> QuantConfig:
    """The recipe of a run of these formats.

    What cannot be written is None, and `supply` says what it was: calibration data that is no dataset string or lies in
    local files, and an importance file. Device and memory are left to the machine, unless the CPU was asked for.
    """
    config = settings.config
    dataset, missing = _portable_dataset(config.data.dataset if settings.needs_data else None)
    supply = {"dataset": missing} if missing else {}
    if settings.imatrix is not None:
        supply["imatrix"] = f"importance file {Path(settings.imatrix).name}"
    on_cpu = str(config.memory.device_map).strip().lower() == "cpu"
    memory = MemoryConfig(device_map="cpu" if on_cpu else 0)
    return replace(
        config, model=display_name(job.model), supply=supply, memory=memory,
        environment={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        data=replace(config.data, dataset=dataset, imatrix=None),
        output=OutputConfig(format=",".join(formats), max_shard_size=shard),
    )  # fmt: skip


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
        elif run_report.redact_path(name) != name or os.path.exists(name):
            files.append(os.path.basename(os.path.abspath(os.path.expanduser(name))))
            dataset = dataset.replace(name, files[-1])
    missing = [f"local files {', '.join(files)}"] if files else []
    missing += [f"datasets registered by the program: {', '.join(functions)}"] if functions else []
    return redact_dataset(dataset), "; ".join(missing)


def recipe_text(config: QuantConfig, settings: Settings) -> str:
    """The file of a recipe, with comments."""
    found = run_report.versions()
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
    """Write `recipe.yaml` beside the weights."""
    write_text(folder / RECIPE_FILE, recipe_text(recipe_of(settings, job, job.formats, shard), settings))


_UNREACHED = "no calibration token reached it: rounded by its weights alone"


def finalize(made: OutputContext, output: FileOutput, journal: Journal, stale: Iterable[str] = ()) -> None:
    """Complete one folder, verify it, and publish it in place of the `stale` files of an earlier run. Files that differ
    from the quantized model, a VerifyError, remain in the staging folder."""
    stage, digests, verified = output.stage, output.writer.sha256, None
    finished, state = made.finished, made.finished.state
    try:
        output.write_beside(made)
        if made.settings.verify:
            started = time.monotonic()
            verified = output.verify(made)
            finished.seconds["verify"] = time.monotonic() - started
            loss = "" if verified["loss_reopened"] is None else f", smoke loss {verified['loss_reopened']:.4f}"
            tensors, layers = verified["tensors"], verified["layers"]
            logger.info("verified %s: %d tensors, %d layers%s", stage.folder, tensors, layers, loss)
        write_recipe(output.folder, made.settings, made.job, made.shard)
        write_records(
            output.folder, made.job, made.settings, output.format, state.records, finished.seconds, digests,
            verified, finished.data, state.nearest | dict.fromkeys(state.unreached, _UNREACHED),
            state.numerics, made.made_from,
        )  # fmt: skip
    except VerifyError:
        stage.retain = True
        raise
    files = sync_and_hash(stage.path, digests)
    journal.complete(output.format.name, files)
    stage.publish(files, stale)
    logger.info("saved %s", stage.folder)


def stored_bits(plan: LayerPlan, fmt: OutputFormat) -> float:
    """Bits per weight of a quantized layer in the format's files, with its scales; for `fake` what codes would take."""
    scheme = plan.scheme
    if fmt.name == "fake":
        size = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else plan.in_features
        return float(scheme.bits + (16 + scheme.bits) / size)
    specs = fmt.tensor_specs(plan.name, scheme, plan.in_features, plan.out_features)
    stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    return stored * 8 / plan.weights


def write_records(
    folder: Path, job: Job, settings: Settings, fmt: OutputFormat, blocks: Sequence[run_report.BlockRecord],
    seconds: Mapping[str, float], files: Mapping[str, str], verify: Mapping[str, Any] | None, data: str | None,
    reasons: Mapping[str, str] | None = None, numerics: NumericsPolicy | None = None,
    made_from: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write README.md and report.json, without any path of this machine. `files`: SHA-256 of the weight files by name;
    `reasons`: by layer, why it was rounded in another way than asked for."""
    given = settings.dataset if isinstance(settings.dataset, str) else ""
    known = [job.model, job.output_dir or "", str(folder), str(envs.work_space()), *re.split("[,:=]", given)]
    clean = partial(run_report.redact_paths, known=[path for path in known if path])
    model, data = display_name(job.model), clean(data)
    sizes = {name: (folder / name).stat().st_size for name in files}
    bits = {name: stored_bits(plan, fmt) for name, plan in job.quantized().items()}
    weights = {name: plan.weights for name, plan in job.quantized().items()}
    average = sum(bits[name] * weights[name] for name in bits) / sum(weights.values()) if bits else None
    shown = {k: v for k, v in job.settings.items() if v is not None and k != "dataset"}
    if job.stored_as:
        shown = {"weights of the source": job.stored_as, **shown}
    card = ModelCard(
        base_model=model, scheme=f"{job.scheme_name} ({job.scheme.describe()})", format=fmt.name,
        bits_per_weight=average if fmt.name != "fake" else None, size_bytes=sum(sizes.values()),
        settings=clean(plain(shown)), data=data, files=files,
        exceptions={name: plan.description for name, plan in job.layers.items() if plan.scheme != job.scheme},
    )  # fmt: skip
    write_model_card(folder, card)
    reasons = {**(reasons or {})}
    if numerics is not None:
        reasons |= {name: f"rounded by its weights alone: {why}" for name, why in numerics.rounded.items()}
    full = job.scheme.with_overrides({"bits": 16, "act_bits": 16}).describe()
    layers = [
        run_report.LayerRecord(name, plan.description, bits.get(name), clean(reasons.get(name, plan.reason)))
        for name, plan in job.layers.items()
    ]
    left = {name.removesuffix(".weight"): why for name, why in job.skipped.items()}
    layers += [run_report.LayerRecord(name, full, None, clean(why)) for name, why in left.items()]
    others = {*files, LOCK, run_report.FILE_NAME, "README.md"}  # the last two are rewritten when the model is evaluated
    small = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    small = {name: path for name, path in small.items() if name not in others and not name.startswith(".")}
    report = run_report.RunReport(
        model=model, format=fmt.name, job=clean(plain(job.to_dict())) | {"model": model, "data": data},
        layers=tuple(layers), blocks=tuple(blocks), seconds=seconds, peak_rss_bytes=peak_rss_bytes(),
        peak_vram_bytes=peak_vram_bytes(), files=files, sizes=sizes, verify=clean(verify), made_from=made_from,
        small_files={name: file_sha256(path) for name, path in small.items()},
        numerics=None if numerics is None else clean(plain(numerics.to_dict())),
    )  # fmt: skip
    run_report.write_report(folder, report)
