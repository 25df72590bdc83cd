"""The verb `generate`: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from auto_round.cli.arguments import GENERATE_GROUPS
from auto_round.cli.eval import local_folder
from auto_round.cli.parser import build, run_parsed
from auto_round.errors import ConfigError

USAGE = 'auto-round generate MODEL --prompt "..." [--backend NAME] [flags]'


def run_verb(argv: Sequence[str]) -> int:
    """Print the continuation token by token, then speed and backends on stderr. Returns the exit code."""
    parser = build("auto-round generate", USAGE, "Continue a prompt with any model, quantized or not.", GENERATE_GROUPS)
    return run_parsed(parser, GENERATE_GROUPS, argv, _run)


def _run(given: dict[str, Any]) -> int:
    for name in ("model", "prompt"):
        if not given.get(name):
            raise ConfigError(f"no {name} was given; use {USAGE}")
    if "temperature" in given:
        given["do_sample"] = True

    from auto_round.eval.evaluate import load_model, load_tokenizer
    from auto_round.eval.generate import generate
    from auto_round.modeling.source import resolve_dtype
    from auto_round.run.settings import resolve_device

    device, trust = given.get("device_map"), given.get("trust_remote_code", False)
    folder = local_folder(given["model"], given)
    tokenizer = load_tokenizer(folder, trust)
    model = load_model(
        folder, device="auto" if device == "auto" else resolve_device(device), trust_remote_code=trust,
        dtype=resolve_dtype(given.get("model_dtype")), backend=given.get("backend"),
    )  # fmt: skip
    settings = {k: given[k] for k in ("max_new_tokens", "do_sample", "temperature", "chat", "seed") if k in given}
    show = partial(print, end="", flush=True)
    result = generate(model, tokenizer, given["prompt"], on_text=show, **settings)
    show("\n")
    print(result.describe(), file=sys.stderr)
    return 0
