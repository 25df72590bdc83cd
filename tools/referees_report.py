"""The results of `tools/referees.py`: one JSON file for each program, and the page that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INTRO = """# Which program opens what

Written by `make referees`, which lets each program open checkpoints that we wrote and compares its logits with ours in
the same dtype. The model is a tiny random Llama where the row names no other. Do not edit: run `make referees`, or
`python tools/referees.py --render`.

A number is the largest relative difference of any position: the norm of the difference of the logits over the
vocabulary, divided by the norm of ours. In brackets the same for what quantization itself does to the model, for scale.
A star: the program quantizes the inputs by rules of its own, described in [formats.md](formats.md), and is compared
with our weights under these rules, as a second implementation of them computes; the last section has both differences.
The tiny models of the GGUF rows are those of `tools/referee_gguf_models.py`; what llama.cpp computes from the files
themselves, with inputs rounded to 8 bits, is in [gguf.md](gguf.md#what-llamacpp-makes-of-the-files).
"no" means that the program refuses or fails; the reasons are listed below. "-" was not tried. `gptqmodel` writes the
files of `auto_gptq`, and `auto_round:gptqmodel` those of `auto_round:auto_gptq`. `auto_round:llm_compressor` writes the
files of `llm_compressor`, byte for byte, and its cells are those of that format. Our own loader opens every cell of
`auto_round` and its packings, `auto_gptq` and `auto_awq` in Transformers, and each run checks that; it is not listed as
a program.
"""
# Other names of formats that are listed.
_ALIASES = ("gptqmodel", "auto_round:gptqmodel")
# Formats that write the files of another, whose cells they have.
SAME_FILES = {"auto_round:llm_compressor": "llm_compressor"}


def _store(root: Path, program: str) -> Path:
    return root / "docs" / "compatibility" / f"{program}.json"


def record(root: Path, program: str, version: str, rows: list[dict[str, Any]]) -> None:
    """Merge new cells into the program's file."""
    path = _store(root, program)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["cells"] if path.exists() else []
    cells = {(cell["format"], cell["scheme"]): cell for cell in [*old, *rows]}
    text = json.dumps({"program": program, "about": version, "cells": list(cells.values())}, indent=1)
    path.write_text(text + "\n")


def load(root: Path) -> dict[str, dict[str, Any]]:
    """By program: {"about", "cells"}."""
    files = sorted((root / "docs" / "compatibility").glob("*.json"))
    return {values["program"]: values for values in (json.loads(path.read_text()) for path in files)}


def markdown(results: Mapping[str, dict[str, Any]], schemes: Mapping[str, Any], writable: set[tuple[str, str]]) -> str:
    """The page. `writable`: the (scheme, format) cells that we write."""
    cells = {(p, c["format"], c["scheme"]): c for p, values in results.items() for c in values["cells"]}
    programs = list(results)
    formats = list(dict.fromkeys(f for _, f in sorted(writable)))
    lines = [_INTRO, "| program | versions | dtype |", "|---|---|---|"]
    for program in programs:
        opened = [c for c in results[program]["cells"] if c["opened"]]
        versions = ", ".join(f"{k} {v}" for k, v in (opened[0]["versions"] if opened else {}).items())
        dtypes = ", ".join(sorted({c["dtype"] for c in results[program]["cells"]}))
        lines.append(f"| {program} ({results[program]['about']}) | {versions} | {dtypes} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for fmt in formats:
        files = SAME_FILES.get(fmt, fmt)
        here = [p for p in programs if any(cell[:2] == (p, files) for cell in cells)]
        lines += ["", f"## {fmt}", "", f"| scheme | {' | '.join([*here, ''])} |", "|---|" + "---|" * (len(here) + 1)]
        for scheme in schemes:
            if (scheme, fmt) not in writable:
                continue
            row = [cells.get((p, files, scheme)) for p in here]
            for program, cell in zip(here, row, strict=True):
                if cell is not None and not cell["opened"] and files == fmt:
                    reasons.setdefault((program, cell["reason"]), []).append(f"{fmt} {scheme}")
            mark = "" if any(c and c["opened"] for c in row) else _nobody(fmt)
            lines.append(f"| {scheme} | {' | '.join([*map(_cell, row), mark])} |")
    if reasons:
        lines += ["", "## Why not", ""]
        lines += [f"- {p}: {', '.join(where)}: `{reason}`" for (p, reason), where in reasons.items()]
    own = [key for key, values in cells.items() if "to_ours" in values]
    if own:
        lines += ["", "## Inputs by a program's own rules", ""]
        lines += ["| program | format | scheme | from its own rules | from our loader |", "|---|---|---|---|---|"]
        for key in own:
            values = cells[key]
            lines.append(f"| {' | '.join(key)} | {values['difference']:.1e} | {values['to_ours']:.1e} |")
    return "\n".join(lines) + "\n"


def _nobody(fmt: str) -> str:
    from auto_round.formats.base import FORMATS

    ours = fmt in FORMATS and FORMATS[fmt].loadable_here
    return f"**no program here{' but our own loader' if ours else ''} opens it**"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if not cell["opened"]:
        return "no"
    star = " \\*" if "to_ours" in cell else ""
    return f"{cell['difference']:.1e} ({cell['effect']:.1e}){star}"


def writable_cells(schemes: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, str]]:
    """The (scheme, format) pairs that a format of ours holds, layer exceptions included."""
    from auto_round.formats.base import FORMATS, available_formats
    from auto_round.schemes import SCHEME_KEYS, parse_scheme

    found = set()
    for name, options in schemes.items():
        own = {key: value for key, value in options.items() if key in SCHEME_KEYS}
        base = parse_scheme(options["scheme"]).with_overrides(own)
        layers = [base.with_overrides(entry) for entry in (options.get("layer_config") or {}).values()]
        for fmt in available_formats():
            held = all(FORMATS[fmt].check_scheme(scheme) is None for scheme in (base, *layers))
            held = held and fmt in options.get("formats", (fmt,))
            if held and fmt != "fake" and fmt not in _ALIASES:
                found.add((name, fmt))
    return found


def render(root: Path, programs: Mapping[str, Any], schemes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write docs/compatibility.md."""
    results = {name: values for name, values in load(root).items() if name in programs}
    text = markdown(results, schemes, writable_cells(schemes))
    (root / "docs" / "compatibility.md").write_text(text)
