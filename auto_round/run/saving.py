"""The methods of AutoRound that quantize and save: quantize, save_quantized, quantize_and_save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import ConfigError
from auto_round.formats.base import OutputFormat, parse_formats
from auto_round.run.driver import InMemory
from auto_round.run.folders import default_format
from auto_round.run.results import SavedModel, check_save_options, describe_layers
from auto_round.run.settings_view import SettingsView, job_fields


class Saving(SettingsView):
    """The methods of `AutoRound` that quantize and write."""

    def __init__(self) -> None:
        self._quantized_in_place = False  # a model object is quantized in place, once
        self._result: InMemory | None = None
        self._saved: torch.nn.Module | None = None

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
        writers = self._runs.model_writers(_packs(formats)) if inplace else []
        fields = self._layer_config() if writers else {}
        written = runs.to_folders(target, formats, overwrite, shard, resume, writers)
        if not writers:
            self._saved = self._saved_model(written, formats)
            return self._saved, _one_or_all(written)
        (writer,) = writers
        self._quantized_in_place = True
        writer.finish()
        describe_layers(writer.model, fields)
        return writer.model, _one_or_all(written)

    def _save_result(
        self, result: InMemory, output_dir: str, formats: Sequence[OutputFormat], inplace: bool, overwrite: bool,
        shard: int | str,
    ) -> tuple[torch.nn.Module, list[Path]]:  # fmt: skip
        """Write the result of `quantize()`: (model to return, folders)."""
        for writer in result.writers:
            writer.unpack()
        fields = self._layer_config() if result.writers else {}
        written = result.run.save(output_dir, formats, overwrite, shard, result)
        if result.writers and not inplace:
            return self._saved_model(written, formats), written
        for writer in result.writers if _packs(formats) else ():
            writer.pack(result.layers)
        describe_layers(result.model, fields)
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


def _packs(formats: Sequence[OutputFormat]) -> bool:
    """Whether a model object ends with packed layers: there is one format, and PyTorch has layers for it."""
    return len(formats) == 1 and formats[0].has_packed_layers


def _one_or_all(folders: Sequence[Path]) -> str | list[str]:
    names = [str(folder) for folder in folders]
    return names[0] if len(names) == 1 else names
