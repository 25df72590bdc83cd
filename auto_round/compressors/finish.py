"""The small files beside the weights: config, tokenizer, generation settings, model card, report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.non_finite import Numbers
from auto_round.compressors.settings import Settings
from auto_round.export.formats import OutputFormat
from auto_round.export.shard_writer import file_sha256, write_json, write_text
from auto_round.export.staging import LOCK
from auto_round.modeling.config_json import causal_class, source_values, untied, with_both_ropes, with_dtype
from auto_round.modeling.side_files import copy_side_files
from auto_round.modeling.skeleton import Skeleton
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import peak_rss_bytes, peak_vram_bytes
from auto_round.report.model_card import ModelCard, shown_name, write_model_card
from auto_round.report.paths import without_paths
from auto_round.report.run_report import FILE_NAME as REPORT
from auto_round.report.run_report import BlockRecord, LayerRecord, RunReport, plain, write_report


def write_config(folder: Path, source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> None:
    """Write what `config_values` gives; config.json in the source's own order."""
    for name, values in config_values(source, job, fmt, trusted).items():
        if name == "config.json":
            write_text(folder, name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        else:
            write_json(folder, name, values)


def config_values(source: ModelSource, job: Job, fmt: OutputFormat, trusted: bool) -> dict[str, Any]:
    """By file name: config.json with the format's quantization_config, and the same alone in its `config_files`.

    config.json is the source's own with what the run changed, whichever flow it was. `trusted`: its Python files come
    along.
    """
    values = source_values(source.config, getattr(source, "folder", None), trusted)
    values = with_both_ropes(with_dtype(values, str(source.dtype).removeprefix("torch.")))
    if values.get("architectures") is None:
        own = None if isinstance(source.model, Skeleton) else type(source.model).__name__
        name = own or causal_class(values)
        values |= {} if name is None else {"architectures": [name]}
    if any(not name.startswith(tuple(f"{b}." for b in job.blocks)) for name in job.quantized()):
        values = untied(values)
    plan = job.export_plan(fmt)
    quantization = fmt.file_config(plan)
    found: dict[str, Any] = {} if quantization is None else dict.fromkeys(fmt.config_files, quantization)
    return {**found, "config.json": fmt.model_config(values, plan)}


def write_side_files(folder: Path, source: ModelSource, tokenizer: Any, trust_remote_code: bool) -> None:
    """Everything beside the weights: copied from the source folder, else saved from the objects."""
    origin = getattr(source, "folder", None)
    if origin is not None:
        copy_side_files(Path(origin), folder, trust_remote_code)
    if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(folder)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        write_text(folder, "generation_config.json", generation.to_json_string())


def layer_records(
    job: Job, fmt: OutputFormat, unreached: Sequence[str] = (), numbers: Numbers | None = None
) -> tuple[LayerRecord, ...]:
    """Every linear layer of the job and every other matrix in its blocks, for the report.

    `unreached`: layers that no calibration token reached.
    """
    plain = {} if numbers is None else numbers.plain
    records = []
    without = set(unreached)
    for name, plan in job.layers.items():
        bits = stored_bits(plan, fmt) if plan.scheme.quantizes_weights else None
        reason = "no calibration token reached it: rounded by its weights alone" if name in without else plan.reason
        if name in plain:
            reason = f"rounded by its weights alone: {plain[name]}"
        records.append(LayerRecord(name, plan.described, bits, reason))
    full = job.scheme.with_overrides({"bits": 16, "act_bits": 16}).describe()
    records += [LayerRecord(name.removesuffix(".weight"), full, None, reason) for name, reason in job.left.items()]
    return tuple(records)


def stored_bits(plan: LayerPlan, fmt: OutputFormat) -> float:
    """Bits a weight of a quantized layer takes in the format's files, with its share of scales and zero points.

    Format `fake` stores dense weights; the value is what its grid would take with float16 scales.
    """
    scheme = plan.scheme
    if fmt.name == "fake":
        size = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else plan.in_features
        return float(scheme.bits + (16 + scheme.bits) / size)
    specs = fmt.tensor_specs(plan.name, scheme, plan.in_features, plan.out_features)
    stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    return stored * 8 / (plan.out_features * plan.in_features)


def bits_per_weight(job: Job, fmt: OutputFormat) -> float | None:
    """Average over the quantized layers, scales and zero points included."""
    total = count = 0.0
    for plan in job.quantized().values():
        weights = plan.out_features * plan.in_features
        total += weights * stored_bits(plan, fmt)
        count += weights
    return total / count if count else None


def write_records(
    folder: Path, job: Job, settings: Settings, fmt: OutputFormat, blocks: Sequence[BlockRecord],
    seconds: Mapping[str, float], files: Mapping[str, str], verify: Mapping[str, Any] | None, data: str | None,
    unreached: Sequence[str] = (), numbers: Numbers | None = None, made_from: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """README.md and report.json. Neither holds a path of this machine."""
    given = settings.dataset if isinstance(settings.dataset, str) else ""
    known = [job.model, job.output_dir or "", str(folder), str(envs.work_space()), *re.split("[,:=]", given)]
    clean = partial(without_paths, known=[path for path in known if path])
    model, data = shown_name(job.model), clean(data)
    sizes = {name: (folder / name).stat().st_size for name in files}
    exceptions = {n: p.described for n, p in job.layers.items() if p.scheme != job.scheme}
    shown = {k: v for k, v in job.settings.items() if v is not None and k != "dataset"}
    if job.stored_as:
        shown = {"weights of the source": job.stored_as, **shown}
    card = ModelCard(
        base_model=model, scheme=f"{job.scheme_name} ({job.scheme.describe()})", format=fmt.name,
        bits_per_weight=bits_per_weight(job, fmt) if fmt.name != "fake" else None, size_bytes=sum(sizes.values()),
        settings=clean(plain(shown)), data=data, exceptions=exceptions, files=files,
    )  # fmt: skip
    write_model_card(folder, card)
    others = {*files, LOCK, REPORT, "README.md"}  # the last two are written again when the model is evaluated
    small = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    small = {name: path for name, path in small.items() if name not in others and not name.startswith(".")}
    report = RunReport(
        model=model, format=fmt.name, job=clean(plain(job.to_dict())) | {"model": model, "data": data},
        layers=tuple(replace(r, reason=clean(r.reason)) for r in layer_records(job, fmt, unreached, numbers)),
        blocks=tuple(blocks), seconds=seconds, peak_rss_bytes=peak_rss_bytes(), peak_vram_bytes=peak_vram_bytes(),
        files=files, small_files={name: file_sha256(path) for name, path in small.items()},
        sizes=sizes, verify=clean(verify), numerics=None if numbers is None else clean(plain(numbers.to_dict())),
        made_from=made_from,
    )  # fmt: skip
    write_report(folder, report)
