"""Write the model card, `README.md` of a saved model, with front matter for the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.config import plain
from auto_round.errors import OutputError
from auto_round.files import write_text
from auto_round.report.memory import format_bytes
from auto_round.report.run_report import FILE_NAME as REPORT_NAME
from auto_round.report.run_report import redact_paths, versions

FILE_NAME = "README.md"
_MOST_ROWS = 40  # of layers with other settings
_HEADING, _NEXT_HEADING = "## Quality\n", "## How to run\n"


@dataclass(frozen=True)
class ModelCard:
    """Contents of a model card."""

    base_model: str  # name or path of the source model; only the last part of a local path is shown
    scheme: str  # name or description of the default scheme, such as "W4A16" or "int4 g128 sym"
    format: str = "auto_round"
    bits_per_weight: float | None = None  # average over the quantized layers, scales included
    size_bytes: int | None = None  # of all weight files
    settings: Mapping[str, Any] = field(default_factory=dict)  # such as {"algorithm": "SignRound", "iters": 200}
    data: str | None = None  # description of the calibration data; None: none was used
    exceptions: Mapping[str, str] = field(default_factory=dict)  # layers with other settings, and which
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by file name


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a hub id: `owner/name` or `name`, and not a local folder."""
    return re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def display_name(base_model: str) -> str:
    """A hub id unchanged; of a path only the last part, so that a card does not show folders of this machine."""
    return base_model if is_hub_id(base_model) else os.path.basename(os.path.abspath(os.path.expanduser(base_model)))


def render_model_card(card: ModelCard) -> str:
    """The text of README.md."""
    base = display_name(card.base_model)
    lines = ["---"]
    if is_hub_id(card.base_model):  # a JSON string is valid YAML
        lines += [f"base_model: {json.dumps(base, ensure_ascii=False)}", "base_model_relation: quantized"]
    library = "mlx" if card.format == "mlx" else "transformers"
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "quantized_by: auto-round", "tags:"]
    tags = ["auto-round", "quantized", card.scheme.split(" ")[0].lower()]
    lines += [f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags]
    name = f"[{base}](https://huggingface.co/{base})" if is_hub_id(card.base_model) and "/" in base else f"`{base}`"
    facts = [f"scheme {card.scheme}", f"format `{card.format}`"]
    if card.bits_per_weight is not None:
        facts.append(f"{card.bits_per_weight:.2f} bits per quantized weight, scales included")
    if card.size_bytes is not None:
        facts.append(f"{format_bytes(card.size_bytes)} of weights")
    parts = ["\n".join([*lines, "---"]), f"# {base}, {card.scheme}"]
    parts.append(f"{name}, quantized with AutoRound: {', '.join(facts)}. The base model's licence and terms apply.")
    parts.append(_NEXT_HEADING + "\n" + _usage(card.format))
    words = {True: "yes", False: "no", None: "automatic"}
    made = [(k, words[v] if v is None or isinstance(v, bool) else str(v)) for k, v in card.settings.items()]
    made.append(("calibration data", card.data or "none"))
    parts.append("## How it was made\n\n" + _table(("setting", "value"), made))
    if card.exceptions:
        rows = list(card.exceptions.items())
        more = [(f"and {len(rows) - _MOST_ROWS} more", "see report.json")] if len(rows) > _MOST_ROWS else []
        parts.append("Layers with other settings:\n\n" + _table(("layer", "is"), rows[:_MOST_ROWS] + more))
    parts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if card.files:
        parts.append("## Files\n\n" + _table(("file", "sha256"), list(card.files.items())))
    return "\n\n".join(parts) + "\n"


def write_model_card(folder: str | os.PathLike[str], card: ModelCard) -> Path:
    """Write README.md into `folder`; returns its path. Raises OutputError when it cannot be written."""
    return write_text(Path(folder) / FILE_NAME, render_model_card(card))


def _usage(format_name: str) -> str:
    if format_name == "fake":
        return """The weights are rounded and stored in full precision, for research. \
Any tool that opens the base model opens this one."""
    if format_name == "mlx":
        return """On Apple Silicon, with `pip install mlx-lm`, from this folder or its hub id:

```bash
mlx_lm.generate --model . --prompt "There is a girl who likes adventure," --max-tokens 50
```"""
    transformers = """\
With Transformers (`pip install auto-round transformers accelerate`), from this folder or its hub id:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."
model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("There is a girl who likes adventure,", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""
    vllm = "\n\nWith vLLM, on a GPU with a kernel for this scheme:\n\n```bash\nvllm serve .\n```"
    return transformers if format_name == "auto_round:mlx" else transformers + vllm


def _table(head: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    escaped = [[text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in escaped)])


def add_quality(
    folder: str | os.PathLike[str], values: Mapping[str, Any], rows: Sequence[tuple[str, str]], note: str
) -> None:
    """Write a measurement to README.md and report.json of `folder`, those that exist, replacing an earlier one.

    `values` is for report.json, `rows` of (measure, value) and a `note` what it was measured on for the card. Raises
    OutputError when a file cannot be written or report.json is not JSON.
    """
    root = Path(folder)
    report = root / REPORT_NAME
    if report.is_file():
        try:
            record = json.loads(report.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{report} is not JSON ({error}); the measurement is not recorded") from error
        quality = {k: display_name(v) if k in ("model", "reference") and v else v for k, v in values.items()}
        record["quality"] = redact_paths(plain(quality), (str(root),))
        write_text(report, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    card = root / FILE_NAME
    if card.is_file():
        write_text(card, with_quality(card.read_text(encoding="utf-8"), rows, redact_paths(note, (str(root),))))


def with_quality(card: str, rows: Sequence[tuple[str, str]], note: str) -> str:
    """The text of a model card with this table in its section "Quality"."""
    section = f"{_HEADING}\n{_table(('measure', 'value'), rows)}" + (f"\n\n{note}" if note else "")
    start, end = card.find(_HEADING), card.find(_NEXT_HEADING)
    if end < 0:
        return card.rstrip("\n") + "\n\n" + section + "\n"
    return card[: start if 0 <= start < end else end] + section + "\n\n" + card[end:]
