"""`Saving`, the parent of `AutoRound`: its read-only attributes, and its methods that quantize and save."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch

from auto_round.algorithms.gptq import GPTQConfig
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.errors import ConfigError
from auto_round.formats.base import OutputFormat, parse_formats
from auto_round.modeling.source import ModelSource
from auto_round.output.folders import PARTIAL, ensure_output_folder, remove_files, subfolder_name
from auto_round.output.staging import Staging
from auto_round.run.driver import InMemory, Run
from auto_round.run.folders import default_format, split_runs, stale_files
from auto_round.run.journal import Journal
from auto_round.run.plan import Job
from auto_round.run.planner import select_blocks
from auto_round.run.results import ModelWriter, SavedModel, check_save_options
from auto_round.run.settings import Settings
from auto_round.schemes import GroupSize, QuantizationScheme

LayerFields = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Runs:
    """Regular runs: one for each GGUF format, and one for all other formats."""

    source: ModelSource
    settings: Settings
    tokenizer: Any

    model_free: ClassVar[bool] = False

    @property
    def module(self) -> torch.nn.Module | None:
        """The model that is quantized; without weights if it was given by path."""
        return self.source.model

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.source.blocks

    def copy(self) -> Runs:
        """Runs that leave the model object unchanged."""
        return replace(self, source=self.source.copy())

    def model_writers(self, packs: bool) -> list[ModelWriter]:
        """What gives a model object its quantized weights, with `packs` as packed layers. A checkpoint has none."""
        return [] if self.source.lazy else [ModelWriter(self.source, packs)]

    def plans(self, formats: Sequence[OutputFormat], output_dir: str | None) -> list[Job]:
        """The checked plan of each run. A layer name that matches nothing is an error, unless `strict` is False."""
        strict = replace(self.settings, strict=self.settings.strict is not False)
        return [
            Run(self.source, settings, self.tokenizer).checked_plan(group, output_dir)
            for settings, group in split_runs(strict, formats)
        ]

    def plan_for(self, formats: Sequence[OutputFormat] | None) -> Job:
        """The plan of the first run; without formats, of `to_memory`."""
        if formats is None:
            return Run(self.source, self.settings, self.tokenizer).memory_plan()
        settings, group = split_runs(self.settings, formats, quiet=True)[0]
        return Run(self.source, settings, self.tokenizer).plan(group)

    def to_memory(self, writers: Sequence[ModelWriter]) -> InMemory:
        """Quantize without writing files. `writers`: of `model_writers`."""
        return Run(self.source, self.settings, self.tokenizer, writers).to_memory()._replace(writers=writers)

    def to_folders(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool,
        writers: Sequence[ModelWriter] = (),
    ) -> list[Path]:  # fmt: skip
        """Quantize and write all formats; every run is planned before the first one starts. One folder per format."""
        groups = split_runs(self.settings, formats)
        runs = [Run(self.source, settings, self.tokenizer, writers) for settings, _ in groups]
        if len(runs) == 1:
            return runs[0].to_folders(output_dir, groups[0][1], overwrite, shard, resume)
        if not self.source.lazy:
            raise ConfigError(
                f"{', '.join(f.name for f in formats)} take {len(runs)} runs, and a model object is quantized in "
                "place, once; give the model by path, or one of the formats"
            )
        siblings = [subfolder_name(fmt.name) for fmt in formats]
        root = Path(output_dir).expanduser()
        folders = [root if len(group) > 1 else root / subfolder_name(group[0].name) for _, group in groups]
        work = [
            (run, run.checked_plan(group, str(folder), resume), group, str(folder))
            for run, (_, group), folder in zip(runs, groups, folders, strict=True)
        ]
        ensure_output_folder(root, overwrite, {PARTIAL, *siblings})
        stale = stale_files(root, (), siblings)[root]  # files of an earlier run that wrote other formats, or one
        found: dict[str, Path] = {}
        with nullcontext() if root in folders else Staging(root):
            for run, job, group, folder in work:
                run.check_compatible(job, folder, group, overwrite, shard, resume, siblings)
            for run, job, group, folder in work:
                paths = run.to_folders(folder, group, overwrite, shard, resume, siblings, job)
                found |= {fmt.name: path for fmt, path in zip(group, paths, strict=True)}
        remove_files(root, stale)
        for path in folders:
            Journal(path).remove()
        return [found[fmt.name] for fmt in formats]


def _read(value: str | Callable[[Any], Any]) -> Any:
    """A read-only attribute: the value at a path of the object, or what a function makes of it."""
    return property(attrgetter(value) if isinstance(value, str) else value)


def _resolved(name: str) -> Any:
    """A read-only attribute: a field of the scheme, with the default filled in."""
    return _read(lambda view: resolved_fields(view.scheme)[name])


def _tuning(name: str, without: Any) -> Any:
    """A read-only attribute: a setting of the algorithm, or its value without tuning."""
    return _read(lambda view: getattr(view.settings.algorithm, name, without))


class Saving:
    """Parent of `AutoRound`: its attributes, under the names of its arguments, and what quantizes and writes.

    `bits` and the other fields of the scheme are those of the format that was named last, because a GGUF format brings
    a scheme of its own.
    """

    settings: Settings
    tokenizer: Any
    _runs: Runs
    _quantized_in_place = False  # a model object is quantized in place, once
    _result: InMemory | None = None
    _saved: torch.nn.Module | None = None
    _named_formats: Sequence[OutputFormat] | None
    _layers_seen: tuple[tuple[str, ...] | None, LayerFields] | None = None

    @property
    def model(self) -> torch.nn.Module | None:
        """The model.

        One given by path has no weights until `quantize()` assembled it; after `quantize_and_save()` it is the saved
        model, opened on first use. None in model-free mode until then.
        """
        if self._result is not None:
            return self._result.model
        return self._runs.module if self._saved is None else self._saved

    def quantize(self) -> tuple[torch.nn.Module, dict[str, dict[str, Any]]]:
        """Quantize without saving.

        Returns:
            (model, layer configuration): a runnable model, a model object of the user with dequantized weights in
            place, or a model given by path with packed layers; and the scheme of every linear layer.

        Raises:
            UnsupportedError: in model-free mode.
        """
        if self._result is None:
            writers = self._runs.model_writers(packs=False)
            self._result = self._runs.to_memory(writers)
            for writer in writers:
                writer.finish()
        return self._result.model, {name: plan.scheme.to_dict() for name, plan in self._result.job.layers.items()}

    def save_quantized(
        self, output_dir: str | os.PathLike[str] = "tmp_autoround", format: str | Sequence[str] | None = None,
        inplace: bool = True, return_folders: bool = False, safe_serialization: bool = True, *,
        overwrite: bool = False, max_shard_size: int | str | None = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        """Write the result of `quantize()` in every format.

        Args:
            output_dir, format, overwrite, max_shard_size, safe_serialization: as in `quantize_and_save`.
            inplace: a model object gets the packed layers of the format in place of its own; False leaves it unchanged
                and returns a model that is opened from the folder on first use.
            return_folders: return (model, folder or list of folders).

        Raises:
            ConfigError: `quantize()` was not called.
            OutputError: the folder cannot be used.
        """
        check_save_options(safe_serialization, unknown)
        formats, shard = self._formats(format), self._shard_size(max_shard_size)
        if self._result is None:
            raise ConfigError("save_quantized: nothing is quantized yet; call quantize() first, or quantize_and_save()")
        model, folders = self._save_result(self._result, os.fspath(output_dir), formats, inplace, overwrite, shard)
        return (model, _one_or_all(folders)) if return_folders else model

    def quantize_and_save(
        self, output_dir: str | os.PathLike[str] = "tmp_autoround", format: str | Sequence[str] | None = None,
        inplace: bool = True, *, overwrite: bool = False, max_shard_size: int | str | None = None, resume: bool = True,
        safe_serialization: bool = True, **unknown: Any,
    ) -> tuple[torch.nn.Module, str | list[str]]:  # fmt: skip
        """Quantize and write as blocks finish.

        Args:
            output_dir: a new or empty folder, or one that holds only the result of an earlier run, which is replaced
                when the new one is complete. Several formats get a subfolder each.
            format: one name, or several separated by commas; None is the `format` that was given to `AutoRound`, else
                auto_round, or the file type of a GGUF scheme.
            inplace: a model object is quantized in place: it ends with the packed layers of the format, or with
                dequantized weights for several formats and for formats without packed layers in PyTorch. False
                quantizes a copy.
            overwrite: allow a folder with other files, and repeat a run whose result is complete.
            max_shard_size: largest weight file; None is the `max_shard_size` given to `AutoRound`, else 5 GB.
            resume: record finished blocks in AR_WORK_SPACE, and resume the same run if it was interrupted
                (docs/resume.md). False starts anew, without a journal. Runs of a model object cannot be resumed.
            safe_serialization: only True: pickles are not written.

        Raises:
            ConfigError: the interrupted run had other settings, data or weights; the message names them.
            Stopped: by Ctrl-C; the message says where.

        Returns:
            (model, folder or list of folders). A model given by path is opened from its folder (of several formats, the
            last one that Transformers opens) on first use.
        """
        check_save_options(safe_serialization, unknown)
        formats, target, shard = self._formats(format), os.fspath(output_dir), self._shard_size(max_shard_size)
        if self._result is not None:
            model, written = self._save_result(self._result, target, formats, inplace, overwrite, shard)
            return model, _one_or_all(written)
        if self._quantized_in_place:
            raise ConfigError(
                "the model object holds quantized weights since the first quantize_and_save(); to save it more than "
                "once call quantize() and then save_quantized(), name several formats at once, or give inplace=False"
            )
        runs = self._runs if inplace else self._runs.copy()
        writers = runs.model_writers(_packs(formats)) if inplace else []
        for writer in writers:
            writer.fields = self._layer_config()
        written = runs.to_folders(target, formats, overwrite, shard, resume, writers)
        for writer in writers:
            self._quantized_in_place = True
            writer.finish()
            return writer.model, _one_or_all(written)
        self._saved = self._saved_model(written, formats)
        return self._saved, _one_or_all(written)

    def _save_result(
        self, result: InMemory, output_dir: str, formats: Sequence[OutputFormat], inplace: bool, overwrite: bool,
        shard: int | str,
    ) -> tuple[torch.nn.Module, list[Path]]:  # fmt: skip
        """Write the result of `quantize()`: (model to return, folders)."""
        for writer in result.writers:
            writer.unpack()
            writer.fields = self._layer_config()
        written = result.run.save(output_dir, formats, overwrite, shard, result)
        for writer in result.writers:
            if not inplace:
                return self._saved_model(written, formats), written
            writer.pack(result.layers if _packs(formats) else {})
        return result.model, written

    def _formats(self, given: str | Sequence[str] | None) -> list[OutputFormat]:
        """The formats that were given, else those that were named last, or the default format."""
        if given is not None or self._named_formats is None:
            self._named_formats = parse_formats(default_format(self.settings) if given is None else given)
        return list(self._named_formats)

    def _shard_size(self, given: int | str | None) -> int | str:
        return self.settings.config.output.max_shard_size if given is None else given

    def _saved_model(self, folders: Sequence[Path], formats: Sequence[OutputFormat]) -> torch.nn.Module:
        """The model in the last folder that Transformers opens, opened on first use."""
        opens = [folder for folder, fmt in zip(folders, formats, strict=True) if fmt.opens_in_transformers]
        fields = lambda: job_fields(self._runs.plan_for(formats), self.settings)
        return SavedModel(str((opens or folders)[-1]), self.settings.trust_remote_code, fields)

    def _planned(self) -> Job:
        """The job of the formats that were named last."""
        return self._runs.plan_for(self._named_formats)

    def post_init(self) -> None:
        """Resolve all settings against the model and raise their errors. Calling it is optional."""
        self._layer_config()

    @property
    def layer_config(self) -> dict[str, dict[str, Any]]:
        """The resolved scheme of every linear layer by name: the scheme's fields with every default filled in,
        `in_blocks`, and for GGUF the type of the tensor (`mostly`). 16 bits: it is left unquantized. For GGUF, the
        embeddings are included."""
        return {name: dict(fields) for name, fields in self._layer_config().items()}

    def _layer_config(self) -> dict[str, dict[str, Any]]:
        formats = None if self._named_formats is None else tuple(fmt.name for fmt in self._named_formats)
        if self._layers_seen is None or self._layers_seen[0] != formats:
            self._layers_seen = formats, job_fields(self._planned(), self.settings)
        return self._layers_seen[1]

    @property
    def formats(self) -> list[str] | None:
        """Names of the formats that were named last; None before any was."""
        return None if self._named_formats is None else [fmt.name for fmt in self._named_formats]

    @property
    def scheme(self) -> QuantizationScheme:
        """The scheme of layers that no exception is made for."""
        if not self._named_formats:
            return self.settings.scheme
        return split_runs(self.settings, self._named_formats, quiet=True)[0][0].scheme

    @property
    def quant_block_list(self) -> list[list[str]]:
        """Names of the blocks that are quantized, in one list inside a list."""
        return [list(select_blocks(self.settings, self._runs.blocks))]

    @property
    def alg_configs(self) -> RTNConfig | SignRoundConfig | GPTQConfig:
        """The settings of the algorithm; with GPTQ before tuning, those of the tuning."""
        settings = self.settings
        return settings.gptq if settings.gptq is not None and not settings.tunes else settings.algorithm

    # Of the scheme.
    bits: int = _read("scheme.bits")
    group_size: GroupSize = _read("scheme.group_size")
    sym: bool = _read("scheme.sym")
    data_type: str = _read("scheme.data_type")
    act_bits: int = _resolved("act_bits")
    act_group_size: GroupSize = _resolved("act_group_size")
    act_sym: bool = _resolved("act_sym")
    act_data_type: str = _resolved("act_data_type")
    act_dynamic: bool = _resolved("act_dynamic")
    super_bits: int | None = _read("scheme.super_bits")
    super_group_size: int | None = _read("scheme.super_group_size")

    # Of the algorithm. Without tuning there are no steps, no step sizes and no optimizer.
    iters: int = _tuning("iters", 0)
    lr: float | None = _read(lambda view: view._rates()[0])
    minmax_lr: float | None = _read(lambda view: view._rates()[1])
    momentum: float = _tuning("momentum", 0.0)
    enable_adam: bool = _tuning("enable_adam", False)
    optimizer: type[torch.optim.Optimizer] | None = _read(lambda view: torch.optim.AdamW if view.enable_adam else None)
    disable_opt_rtn: bool = _read(lambda view: not view.settings.optimized_start)
    enable_minmax_tuning: bool = _tuning("enable_minmax_tuning", False)
    enable_quanted_input: bool = _tuning("enable_quanted_input", False)
    not_use_best_mse: bool = _tuning("not_use_best_mse", False)
    batch_size: int = _read("settings.config.tuning.batch_size")
    gradient_accumulate_steps: int = _read("settings.config.tuning.gradient_accumulate_steps")

    def _rates(self) -> tuple[float | None, float | None]:
        """Step sizes of rounding, for layers of `bits` bits, and of the scale factors."""
        algorithm = self.settings.algorithm
        return algorithm.learning_rates(self.bits) if isinstance(algorithm, SignRoundConfig) else (None, None)

    # Of the run. `dataset` None is the default set; `device` is the one to tune on, such as "cuda:0".
    model_free: bool = _read("_runs.model_free")
    seqlen: int = _read("settings.seqlen")
    nsamples: int = _read("settings.nsamples")
    dataset: Any = _read("settings.dataset")
    seed: int = _read("settings.seed")
    amp: bool = _read("settings.amp")
    scale_dtype: torch.dtype = _read("settings.scale_dtype")
    device: str = _read(lambda view: str(view.settings.device))
    platform: str = _read("settings.platform")
    low_gpu_mem_usage: bool = _read("settings.low_gpu_mem_usage")
    low_cpu_mem_usage: bool = _read("settings.config.memory.low_cpu_mem_usage")
    enable_torch_compile: bool = _read("settings.enable_torch_compile")
    enable_deterministic_algorithms: bool = _read("settings.enable_deterministic_algorithms")
    trust_remote_code: bool = _read("settings.trust_remote_code")
    ignore_layers: tuple[str, ...] = _read("settings.ignore_layers")
    quant_lm_head: bool = _read("settings.quant_lm_head")
    to_quant_block_names: tuple[str, ...] = _read("settings.to_quant_block_names")
    static_kv_dtype: str | None = _read("settings.config.weights.static_kv_dtype")
    static_attention_dtype: str | None = _read("settings.config.weights.static_attention_dtype")

    # This version quantizes text models.
    mllm: bool = _read(lambda view: False)
    diffusion: bool = _read(lambda view: False)


def resolved_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """The fields of a scheme with the defaults of its activations filled in."""
    fields = scheme.to_dict()
    own = {
        "act_bits": 16, "act_group_size": scheme.group_size, "act_sym": scheme.sym, "act_dynamic": True,
        "act_data_type": scheme.data_type if scheme.quantizes_activations else "float",
    }  # fmt: skip
    return fields | {name: value for name, value in own.items() if fields[name] is None}


def job_fields(job: Job, settings: Settings) -> LayerFields:
    """`AutoRound.layer_config` of a job."""
    blocks = tuple(f"{block}." for block in job.blocks)
    kinds = {**{name: (plan.scheme, plan.ggml) for name, plan in job.layers.items()}, **job.embedding_types}
    own = {"scale_dtype": settings.scale_dtype}
    return {
        name: resolved_fields(scheme) | own | {"in_blocks": name.startswith(blocks)}
        | ({} if kind is None else {"mostly": f"gguf:{kind.lower()}"})
        for name, (scheme, kind) in kinds.items()
    }  # fmt: skip


def _packs(formats: Sequence[OutputFormat]) -> bool:
    """Whether a model object ends with packed layers: there is one format, and PyTorch has layers for it."""
    return len(formats) == 1 and formats[0].has_packed_layers


def _one_or_all(folders: Sequence[Path]) -> str | list[str]:
    names = [str(folder) for folder in folders]
    return names[0] if len(names) == 1 else names
