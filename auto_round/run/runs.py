"""What an `AutoRound` does with an opened model: plan, quantize in memory, write folders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from auto_round.errors import ConfigError
from auto_round.formats.base import OutputFormat
from auto_round.modeling.source import ModelSource
from auto_round.output.folders import PARTIAL, ensure_output_folder, remove_files, subfolder_name
from auto_round.output.staging import Staging
from auto_round.run.driver import InMemory, Run
from auto_round.run.folders import split_runs, stale_files
from auto_round.run.journal import Journal
from auto_round.run.plan import Job
from auto_round.run.results import ModelWriter
from auto_round.run.settings import Settings


@dataclass(frozen=True)
class Runs:
    """Regular runs: one for each GGUF format, and one for all other formats. `ModelFree` has the same methods.

    Attributes:
        source, settings: the model, and how it is quantized.
        tokenizer: for calibration text and the output folder; None when neither needs one.
    """

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
        """Quantize and write all formats; every run is planned before the first one starts.

        Returns one folder per format.
        """
        groups = split_runs(self.settings, formats)
        runs = [(Run(self.source, settings, self.tokenizer, writers), group) for settings, group in groups]
        if len(runs) == 1:
            return runs[0][0].to_folders(output_dir, runs[0][1], overwrite, shard, resume)
        if not self.source.lazy:
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
            Journal(folder).remove()
        return [found[fmt.name] for fmt in formats]
