"""Which formats one run can write, and which need a run of their own: every GGUF file type has types of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from auto_round.compressors.gguf_job import gguf_format
from auto_round.compressors.settings import Settings
from auto_round.export.earlier_output import subfolder_name
from auto_round.export.formats import OutputFormat
from auto_round.logger import logger
from auto_round.schemes import normalize_preset_name

GGUF = "gguf:"
_DEFAULT_SCHEME = "W4A16"


def default_format(settings: Settings) -> str:
    """The format of a run that names none: the file type of a GGUF scheme, else auto_round."""
    name = settings.scheme_name.lower()
    return name if name.startswith(GGUF) else "auto_round"


def split_runs(
    settings: Settings, formats: Sequence[OutputFormat], quiet: bool = False
) -> list[tuple[Settings, list[OutputFormat]]]:
    """(settings, formats) of each run, one with several formats first.

    A GGUF format brings its scheme, which is said unless `quiet`. Format `fake` beside GGUF formats alone is the fake
    of the first of them.
    """
    files = [fmt for fmt in formats if gguf_format([fmt])]
    others = [fmt for fmt in formats if fmt not in files]
    if not files:
        return [(settings, others)]
    runs = [(for_file(settings, fmt, quiet), [fmt]) for fmt in files]
    if [fmt.name for fmt in others] == ["fake"]:
        runs[0][1].append(others[0])
    elif others:
        runs.insert(0, (settings, others))
    return runs


def for_file(settings: Settings, fmt: Any, quiet: bool = False) -> Settings:
    """The settings with the scheme of a GGUF format."""
    name = f"GGUF:{fmt.preset}"
    if not quiet and settings.scheme_name not in (name, _DEFAULT_SCHEME):
        logger.warning("format %s has types of its own: scheme %s is not used for it", fmt.name, settings.scheme_name)
    return replace(settings, scheme=fmt.scheme, scheme_name=normalize_preset_name(name), mixed=None)


def folder_name(fmt: OutputFormat) -> str:
    """The subfolder of a format, where there are several."""
    return subfolder_name(fmt.name)
