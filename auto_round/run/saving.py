"""The methods of AutoRound that quantize and save: quantize, save_quantized, quantize_and_save."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import OutputFormat
from auto_round.modeling.source import ModelSource, open_source
from auto_round.output.folders import PARTIAL, ensure_output_folder, remove_files, subfolder_name
from auto_round.output.staging import Staging
from auto_round.run.driver import Run
from auto_round.run.finalize import RunResult
from auto_round.run.folders import split_runs, stale_files
from auto_round.run.gguf import gguf_format
from auto_round.run.model_free.driver import ModelFree
from auto_round.run.results import PackedLayers, SavedModel, check_save_options, describe_layers
from auto_round.run.resume import remove_journal
from auto_round.run.settings import Settings
from auto_round.run.writers import MemoryWriter


class Saving(ABC):
    """The methods of `AutoRound` that quantize and write.

    Attributes:
        settings: the resolved settings.
        tokenizer: for calibration text and the output folder; None when neither needs one.
    """

    settings: Settings
    tokenizer: Any
    _source: ModelSource
    _free: ModelFree | None

    def __init__(self) -> None:
        self._quantized_in_place = False  # a model object is quantized in place, once
        self._result: tuple[torch.nn.Module, dict[str, QuantizedLayer], RunResult] | None = None
        self._saved: torch.nn.Module | None = None
        self._packed = PackedLayers()

    @abstractmethod
    def _formats(self, given: str | Sequence[str] | None) -> list[OutputFormat]:
        """The formats that were given, or the default format."""

    @abstractmethod
    def _layer_fields_getter(self) -> Callable[[], Mapping[str, Mapping[str, Any]]]:
        """A function that returns the fields of every layer's scheme, for the current formats."""

    @abstractmethod
    def _layer_fields_now(self) -> Mapping[str, Mapping[str, Any]]:
        """The fields of every layer's scheme, for the current formats."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The model.

        One given by path has no weights until `quantize()` assembled it; after `quantize_and_save()` it is the saved
        model, opened on first use. None in model-free mode until then.
        """
        if self._result is None and self._saved is not None:
            return self._saved
        if self._free is not None:
            return None
        return self._source.model if self._result is None else self._result[0]

    def quantize(self) -> tuple[torch.nn.Module, dict[str, dict[str, Any]]]:
        """Quantize without saving.

        Returns:
            (model, layer configuration): a runnable model, a model object of the user with dequantized weights in
            place, or a model given by path with packed layers; and the scheme of every linear layer.
        """
        self._refuse_model_free()
        if self._result is None:
            self._result = self._run().to_memory()
        model, layers, finished = self._result
        job = self._run().memory_plan() if not self._source.lazy else None
        job = None if job is None else job.with_unquantized(finished.state.numerics.unquantized)
        names = list(job.layers) if job is not None else list(layers)
        schemes = {n: (job.layers[n].scheme if job is not None else layers[n].scheme) for n in names}
        return model, {name: scheme.to_dict() for name, scheme in schemes.items()}

    def save_quantized(
        self, output_dir: str | os.PathLike[str] = "tmp_autoround", format: str | Sequence[str] | None = None,
        inplace: bool = True, return_folders: bool = False, safe_serialization: bool = True, *,
        overwrite: bool = False, max_shard_size: int | str | None = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        """Write the result of `quantize()` in every format.

        Args:
            output_dir, format, overwrite, max_shard_size: as in `quantize_and_save`.
            inplace: a model object gets the packed layers of the format in place of its own; False leaves it unchanged
                and returns a model that is opened from the folder on first use.
            return_folders: also return the folder, or the list of folders.
            safe_serialization: only True: pickles are not written.

        Returns:
            The packed model, or (model, folder or list of folders).

        Raises:
            ConfigError: `quantize()` was not called.
            OutputError: the folder cannot be used.
        """
        check_save_options(safe_serialization, unknown)
        formats, shard = self._formats(format), self._shard_size(max_shard_size)
        if self._result is None:
            raise ConfigError("save_quantized: nothing is quantized yet; call quantize() first, or quantize_and_save()")
        model, names = self._save_result(os.fspath(output_dir), formats, inplace, overwrite, shard)
        return (model, _one_or_all(names)) if return_folders else model

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
        if self._free is not None:
            written = self._free.to_folders(target, formats, overwrite, shard, resume)
            return self._open_lazily(written, formats), _one_or_all(written)
        if self._result is not None:
            model, written = self._save_result(target, formats, inplace, overwrite, shard)
            return model, _one_or_all(written)
        if self._source.lazy:
            written = self._write(target, formats, overwrite, shard, resume)
            return self._open_lazily(written, formats), _one_or_all(written)
        return self._write_object(target, formats, inplace, overwrite, shard)

    def _shard_size(self, given: int | str | None) -> int | str:
        return self.settings.config.output.max_shard_size if given is None else given

    def _save_result(
        self, output_dir: str, formats: Sequence[OutputFormat], inplace: bool, overwrite: bool, shard: int | str
    ) -> tuple[torch.nn.Module, list[Path]]:
        """Write the result of `quantize()`: (model to return, folders)."""
        assert self._result is not None
        model, layers, finished = self._result
        self._packed.take_layers_out()
        fields = None if self._source.lazy else self._layer_fields_now()
        written = self._run().save(output_dir, formats, overwrite, shard, layers, finished)
        if fields is None:
            return model, written
        if not inplace:
            return self._saved_model(written, formats), written
        if _packs(formats):
            self._packed.put_layers_in(model, layers)
        describe_layers(model, fields)
        return model, written

    def _write_object(
        self, output_dir: str, formats: Sequence[OutputFormat], inplace: bool, overwrite: bool, shard: int | str
    ) -> tuple[torch.nn.Module, str | list[str]]:
        """Quantize and write a model object, or a copy of it."""
        if self._quantized_in_place:
            raise ConfigError(
                "the model object holds quantized weights since the first quantize_and_save(); to save it more than "
                "once call quantize() and then save_quantized(), name several formats at once, or give inplace=False"
            )
        if inplace:
            store = MemoryWriter() if _packs(formats) else None
            fields = self._layer_fields_now()
            written = self._write(output_dir, formats, overwrite, shard, False, store)
            self._quantized_in_place = True
            if store is not None:
                self._packed.put_layers_in(self._source.model, store.layers)
            describe_layers(self._source.model, fields)
            return self._source.model, _one_or_all(written)
        own = self._source
        self._source = open_source(copy.deepcopy(own.model), trust_remote_code=self.settings.trust_remote_code)
        try:
            written = self._write(output_dir, formats, overwrite, shard, False)
        finally:
            self._source = own
        return self._open_lazily(written, formats), _one_or_all(written)

    def _saved_model(self, folders: Sequence[Path], formats: Sequence[OutputFormat]) -> torch.nn.Module:
        """The model in the last folder that Transformers opens, opened on first use."""
        pairs = list(zip(folders, formats, strict=True))
        opens = [folder for folder, fmt in pairs if fmt.name != "mlx" and gguf_format([fmt]) is None]
        return SavedModel(str((opens or folders)[-1]), self.settings.trust_remote_code, self._layer_fields_getter())

    def _open_lazily(self, folders: Sequence[Path], formats: Sequence[OutputFormat]) -> torch.nn.Module:
        """The same, also as `self.model` from now on."""
        self._saved = self._saved_model(folders, formats)
        return self._saved

    def _write(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool,
        layer_store: MemoryWriter | None = None,
    ) -> list[Path]:  # fmt: skip
        """Run all groups of formats; every run is planned before the first one starts."""
        runs = [
            (Run(self._source, settings, self.tokenizer, layer_store), group)
            for settings, group in split_runs(self.settings, formats)
        ]
        if len(runs) == 1:
            return runs[0][0].to_folders(output_dir, runs[0][1], overwrite, shard, resume)
        if not self._source.lazy:
            raise ConfigError(
                f"{', '.join(f.name for f in formats)} take {len(runs)} runs, and a model object is quantized in "
                "place, once; give the model by path, or one of the formats"
            )
        siblings = [subfolder_name(fmt.name) for fmt in formats]
        root = Path(output_dir).expanduser()
        folders = [root if len(group) > 1 else root / subfolder_name(group[0].name) for _, group in runs]
        pairs = list(zip(runs, folders, strict=True))
        jobs = [run.checked_plan(group, str(folder), resume) for (run, group), folder in pairs]
        ensure_output_folder(root, overwrite, {PARTIAL, *siblings})
        stale = stale_files(root, (), siblings)[root]  # files of an earlier run that wrote other formats, or one
        found: dict[str, Path] = {}
        with nullcontext() if root in folders else Staging(root):
            for (run, group), folder, job in zip(runs, folders, jobs, strict=True):
                run.check_compatible(job, str(folder), group, overwrite, shard, resume, siblings)
            for (run, group), folder, job in zip(runs, folders, jobs, strict=True):
                paths = run.to_folders(str(folder), group, overwrite, shard, resume, siblings, job)
                found |= {fmt.name: path for fmt, path in zip(group, paths, strict=True)}
        remove_files(root, stale)
        for folder in folders:
            remove_journal(folder)
        return [found[fmt.name] for fmt in formats]

    def _refuse_model_free(self) -> None:
        if self._free is not None:
            raise UnsupportedError(
                "quantize: model-free mode has no model in memory; quantize_and_save() writes the files, and "
                "Transformers opens them"
            )

    def _run(self) -> Run:
        return Run(self._source, self.settings, self.tokenizer)


def _packs(formats: Sequence[OutputFormat]) -> bool:
    """Whether a model object ends with packed layers: there is one format, and PyTorch has layers for it."""
    return len(formats) == 1 and formats[0].name != "fake" and gguf_format(formats) is None


def _one_or_all(folders: Sequence[Path]) -> str | list[str]:
    names = [str(folder) for folder in folders]
    return names[0] if len(names) == 1 else names
