"""The verb `eval`: measure a model on local text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.cli.arguments import EVAL_GROUPS
from auto_round.cli.parser import build, run_parsed
from auto_round.errors import ConfigError, OutputError

USAGE = "auto-round eval MODEL [--reference MODEL] [--eval_text FILE] [flags]"


def run_verb(argv: Sequence[str]) -> int:
    """Evaluate a model. Returns the exit code."""
    parser = build("auto-round eval", USAGE, "Measure perplexity, KL divergence and top-1 agreement.", EVAL_GROUPS)
    return run_parsed(parser, EVAL_GROUPS, argv, evaluate_from_flags)


def evaluate_from_flags(given: Mapping[str, Any], record_in: Path | None = None) -> int:
    """Evaluate with the given flags, print a table and write `--eval_output`. Returns the exit code.

    `record_in`: folder of a model just saved, whose card and report get the result.
    """
    if "model" not in given:
        raise ConfigError(f"no model was given; use {USAGE}")
    output = Path(given["eval_output"]).expanduser() if "eval_output" in given else None
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise OutputError(
            f"--eval_output {given['eval_output']!r} is not a file in an existing folder; make the folder or choose "
            "another"
        )
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from auto_round.eval.evaluate import evaluate
    from auto_round.modeling.source import resolve_dtype
    from auto_round.run.settings import resolve_device

    names = {"path": "eval_text", "seqlen": "eval_seqlen", "max_windows": "max_windows", "batch_size": "eval_bs",
             "add_bos": "add_bos_token", "trust_remote_code": "trust_remote_code", "backend": "backend"}  # fmt: skip
    result = evaluate(
        local_folder(given["model"], given),
        reference=local_folder(given["reference"], given) if "reference" in given else None,
        device=resolve_device(given.get("device_map")),
        dtype=resolve_dtype(given.get("eval_model_dtype")),
        **{name: given[flag] for name, flag in names.items() if flag in given},
    )
    table = Table()
    table.add_column("measure")
    table.add_column("value ± standard error", justify="right")
    for name, value in result.rows():
        table.add_row(name, value)
    console = Console()
    console.print(Text(result.model if result.reference is None else f"{result.model} against {result.reference}"))
    console.print(table)
    console.print(Text(result.describe()))
    if record_in is not None:
        from auto_round.report.model_card import add_quality

        add_quality(record_in, result.to_dict(), result.rows(), result.describe())
    if output is not None:
        from auto_round.config import plain
        from auto_round.files import write_text

        write_text(output, json.dumps(plain(result.to_dict()), indent=2, allow_nan=False) + "\n")
    return 0


def local_folder(model: str, given: Mapping[str, Any]) -> str:
    """The local folder of a model given as folder or hub id. Raises ModelError when there is none."""
    from auto_round import envs
    from auto_round.modeling.files.folder import model_folder

    platform = given.get("platform") or ("model_scope" if envs.AR_USE_MODELSCOPE else "hf")
    return str(model_folder(model, trust_remote_code=given.get("trust_remote_code", False), platform=platform))
