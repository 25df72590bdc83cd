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
from auto_round.output.folders import PARTIAL, ensure_output_folder, remove_files
from auto_round.output.staging import Staging
from auto_round.run.driver import Run
from auto_round.run.finalize import RunResult
from auto_round.run.folders import folder_name, split_runs, stale_files
from auto_round.run.gguf import gguf_format
from auto_round.run.model_free.driver import ModelFree
from auto_round.run.results import PackedLayers, SavedModel, check_save_options, describe_layers
from auto_round.run.resume import remove_journal
from auto_round.run.settings import Settings
from auto_round.run.writers import MemoryWriter


class Saving(ABC):
    """The methods of `AutoRound` that quantize and write.

    Attributes:
        settings: what was asked for, resolved.
        tokenizer: for calibration text and the folder that is written; None when neither needs one.
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
        """The formats that were asked for, or the one of a run that names none."""

    @abstractmethod
    def _layer_fields_getter(self) -> Callable[[], Mapping[str, Mapping[str, Any]]]:
        """What gives the fields of every layer's scheme, for the formats that are named now."""

    @abstractmethod
    def _layer_fields_now(self) -> Mapping[str, Mapping[str, Any]]:
        """The fields of every layer's scheme, for the formats that are named now."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The model. One given by path holds no weights until `quantize()` has put it together; after
        `quantize_and_save()` it is the saved one, opened when it is first used. None in model-free mode until then."""
        if self._result is None and self._saved is not None:
            return self._saved
        if self._free is not None:
            return None
        return self._source.model if self._result is None else self._result[0]

    def quantize(self) -> tuple[torch.nn.Module, dict[str, dict[str, Any]]]:
        """Quantize without saving.

        Returns:
            (model, layer configuration): the model runs; a model object given by the user holds dequantized weights in
            place, a model given by path holds packed layers. The configuration gives every linear layer's scheme.
        """
        self._refuse_model_free()
        if self._result is None:
            self._result = self._run().to_memory()
        model, layers, finished = self._result
        job = self._run().memory_plan() if not self._source.lazy else None
        job = None if job is None else job.with_unquantized(finished.state.numerics.kept)
        names = list(job.layers) if job is not None else list(layers)
        schemes = {n: (job.layers[n].scheme if job is not None else layers[n].scheme) for n in names}
        return model, {name: scheme.to_dict() for name, scheme in schemes.items()}

    def save_quantized(
        self, output_dir: str | os.PathLike[str] = "tmp_autoround", format: str | Sequence[str] | None = None,
        inplace: bool = True, return_folders: bool = False, safe_serialization: bool = True, *,
        overwrite: bool = False, max_shard_size: int | str = "5GB", **unknown: Any,
    ) -> Any:  # fmt: skip
        """Write the model that `quantize()` made, once for each format.

        Args:
            output_dir, format, overwrite, max_shard_size: as in `quantize_and_save`.
            inplace: a model object gets the packed layers of the format in place of its own; False leaves it as it is,
                and the model that is returned is opened from the folder when it is first used.
            return_folders: return the folder, or the list of folders, too.
            safe_serialization: only True: pickles are not written.

        Returns:
            The packed model, or (model, folder or list of folders).

        Raises:
            ConfigError: `quantize()` was not called.
            OutputError: the folder cannot be used.
        """
        check_save_options(safe_serialization, unknown)
        formats = self._formats(format)
        if self._result is None:
            raise ConfigError("save_quantized: nothing is quantized yet; call quantize() first, or quantize_and_save()")
        model, names = self._save_result(os.fspath(output_dir), formats, inplace, overwrite, max_shard_size)
        return (model, _one_or_all(names)) if return_folders else model

    def quantize_and_save(
        self, output_dir: str | os.PathLike[str] = "tmp_autoround", format: str | Sequence[str] | None = None,
        inplace: bool = True, *, overwrite: bool = False, max_shard_size: int | str = "5GB", resume: bool = True,
        safe_serialization: bool = True, **unknown: Any,
    ) -> tuple[torch.nn.Module, str | list[str]]:  # fmt: skip
        """Quantize and write as blocks finish.

        Args:
            output_dir: a folder that is new or empty, or holds nothing but the result of an earlier run, which is
                replaced once the new one is whole. Several formats get a subfolder each.
            format: one name or several, separated by commas; None is the `format` that was given to `AutoRound`, else
                auto_round, or the file type of a GGUF scheme.
            inplace: a model object is worked on: it ends with the packed layers of the format (of several formats, and
                of formats that store no packed layers for PyTorch, with rounded weights). False works on a copy.
            overwrite: allow a folder that holds other files, and make a result anew that this command made before.
            max_shard_size: largest weight file.
            resume: keep a journal in AR_WORK_SPACE, and go on with the same run if it was interrupted (docs/resume.md).
                False: start anew, without a journal. A model object is never gone on with.
            safe_serialization: only True: pickles are not written.

        Raises:
            ConfigError: the interrupted run had other settings, data or weights; the message names them.
            Stopped: by Ctrl-C; the text says where.

        Returns:
            (model, folder or list of folders). A model that was given by path is opened from its folder (of several
            formats, the last that Transformers opens) when it is first used.
        """
        check_save_options(safe_serialization, unknown)
        formats, target = self._formats(format), os.fspath(output_dir)
        if self._free is not None:
            written = self._free.to_folders(target, formats, overwrite, max_shard_size, resume)
            return self._open_lazily(written, formats), _one_or_all(written)
        if self._result is not None:
            model, written = self._save_result(target, formats, inplace, overwrite, max_shard_size)
            return model, _one_or_all(written)
        if self._source.lazy:
            written = self._write(target, formats, overwrite, max_shard_size, resume)
            return self._open_lazily(written, formats), _one_or_all(written)
        return self._write_object(target, formats, inplace, overwrite, max_shard_size)

    def _save_result(
        self, output_dir: str, formats: Sequence[OutputFormat], inplace: bool, overwrite: bool, shard: int | str
    ) -> tuple[torch.nn.Module, list[Path]]:
        """Write what `quantize()` made: (model to return, folders)."""
        assert self._result is not None
        model, layers, finished = self._result
        self._packed.take_layers_out()
        fields = None if self._source.lazy else self._layer_fields_now()
        written = self._run().save(output_dir, formats, overwrite, shard, layers, finished)
        if fields is None:
            return model, written
        if not inplace:
            return self._open_lazily(written, formats, keep=False), written
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
            keep = MemoryWriter() if _packs(formats) else None
            fields = self._layer_fields_now()
            written = self._write(output_dir, formats, overwrite, shard, False, keep)
            self._quantized_in_place = True
            if keep is not None:
                self._packed.put_layers_in(self._source.model, keep.layers)
            describe_layers(self._source.model, fields)
            return self._source.model, _one_or_all(written)
        own = self._source
        self._source = open_source(copy.deepcopy(own.model), trust_remote_code=self.settings.trust_remote_code)
        try:
            written = self._write(output_dir, formats, overwrite, shard, False)
        finally:
            self._source = own
        return self._open_lazily(written, formats), _one_or_all(written)

    def _open_lazily(
        self, folders: Sequence[Path], formats: Sequence[OutputFormat], keep: bool = True
    ) -> torch.nn.Module:
        """The model in one of these folders, not opened yet; with `keep`, `model` gives the same from now on."""
        pairs = list(zip(folders, formats, strict=True))
        opens = [folder for folder, fmt in pairs if fmt.name != "mlx" and gguf_format([fmt]) is None]
        model = SavedModel(str((opens or folders)[-1]), self.settings.trust_remote_code, self._layer_fields_getter())
        if keep:
            self._saved = model
        return model

    def _write(
        self, output_dir: str, formats: Sequence[OutputFormat], overwrite: bool, shard: int | str, resume: bool,
        keep: MemoryWriter | None = None,
    ) -> list[Path]:  # fmt: skip
        """Every run of these formats, each planned once, before the first begins. `keep` is given the layers, too."""
        runs = [(Run(self._source, s, self.tokenizer, keep), group) for s, group in split_runs(self.settings, formats)]
        if len(runs) == 1:
            return runs[0][0].to_folders(output_dir, runs[0][1], overwrite, shard, resume)
        if not self._source.lazy:
            raise ConfigError(
                f"{', '.join(f.name for f in formats)} take {len(runs)} runs, and a model object is quantized in "
                "place, once; give the model by path, or one of the formats"
            )
        siblings = [folder_name(fmt) for fmt in formats]
        root = Path(output_dir).expanduser()
        places = [root if len(group) > 1 else root / folder_name(group[0]) for _, group in runs]
        jobs = [run.checked_plan(group, str(place), resume) for (run, group), place in zip(runs, places, strict=True)]
        # an empty one has no subfolder that a later run could stumble over
        ensure_output_folder(root, overwrite, {PARTIAL, *siblings})
        stale = stale_files(root, (), siblings)[root]  # of an earlier run that wrote other formats, or one
        found: dict[str, Path] = {}
        with nullcontext() if root in places else Staging(root):
            for (run, group), folder, job in zip(runs, places, jobs, strict=True):
                run.check_compatible(job, str(folder), group, overwrite, shard, resume, siblings)
            for (run, group), folder, job in zip(runs, places, jobs, strict=True):
                paths = run.to_folders(str(folder), group, overwrite, shard, resume, siblings, job)
                found |= {fmt.name: path for fmt, path in zip(group, paths, strict=True)}
        remove_files(root, stale)
        for folder in places:
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
    """Whether a model object ends with packed layers: there is one format, and it stores some for PyTorch."""
    return len(formats) == 1 and formats[0].name != "fake" and gguf_format(formats) is None


def _one_or_all(folders: Sequence[Path]) -> str | list[str]:
    names = [str(folder) for folder in folders]
    return names[0] if len(names) == 1 else names
