"""What the documentation says must be so: links, flags, code, exit codes."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from auto_round import errors, schemes
from auto_round.cli.arguments import EVAL_GROUPS, GENERATE_GROUPS, QUANTIZE_GROUPS, spellings
from auto_round.cli.parser import NO_OP_FLAGS
from auto_round.later import REFUSED

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
IDS = [p.relative_to(ROOT).as_posix() for p in PAGES]

# Flags of other programs that the pages mention.
FOREIGN = {"no-deps", "version", "help", "list", "render", "hf_overrides", "nnodes", "nproc_per_node"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_exist(page: Path) -> None:
    groups = (*QUANTIZE_GROUPS, *EVAL_GROUPS, *GENERATE_GROUPS)
    refused = {spelling for name in REFUSED for spelling in (name, f"no_{name}")}
    known = {*spellings(groups), *refused, *NO_OP_FLAGS, *FOREIGN}
    text = page.read_text(encoding="utf-8")
    named = {f.replace("-", "_") for f in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)} - FOREIGN
    assert named - {k.replace("-", "_") for k in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_is_python(page: Path) -> None:
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        ast.parse(code)


def test_the_table_of_backends_is_made_from_the_rows() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "make_backend_docs.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_exit_codes_are_the_classes_own() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)`", text, re.MULTILINE))
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AutoRoundError)]
    assert rows == {str(c.exit_code): c.__name__ for c in classes}


def test_every_preset_is_in_the_table() -> None:
    text = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    missing = [n for n in schemes.PRESET_SCHEMES if not n.startswith("GGUF:") and f"`{n}`" not in text]
    assert missing == []


def definitions(path: Path) -> set[str]:
    """Names of functions and classes in a file, methods as `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_architecture_names_what_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "auto_round"
    named = re.findall(r"`([\w/]+\.py)`(?:\s+`(\w+(?:\.\w+)?)`)?", text)
    named = [(file, name) for file, name in named if not file.startswith("test/")]
    assert len(named) > 40
    missing = [f"{file} {name}" for file, name in named if not (package / file).is_file()]
    missing += [f"{file} {name}" for file, name in named if name and name not in definitions(package / file)]
    assert missing == []
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - set(re.findall(r"`(\w+)/`", text)) == set()


def test_the_data_type_of_the_guide_works(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The page's own code, tuned for two steps, gives weights on the grid that it promises."""
    from auto_round import AutoRound
    from auto_round.data_type import QUANT_FUNC_WITH_DTYPE, get_quant_func

    code = blocks((ROOT / "docs" / "adding-a-data-type.md").read_text(encoding="utf-8"), "python")[0]
    namespace: dict[str, Any] = {"__name__": "guide"}
    try:
        exec(compile(code, "adding-a-data-type.md", "exec"), namespace)
        assert get_quant_func("power2", 4) is namespace["quant_tensor_power2"]
        data = [[(7 * i + 3 * j) % 96 for j in range(16)] for i in range(4)]
        job = AutoRound(
            tiny_folder("llama"), data_type="power2", bits=4, group_size=16, dataset=data, iters=2,
            nsamples=4, seqlen=16, device_map="cpu",
        )  # fmt: skip
        _, folder = job.quantize_and_save(tmp_path / "out", format="fake")
    finally:
        QUANT_FUNC_WITH_DTYPE.pop("power2", None)
    with safe_open(Path(str(folder)) / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    groups = weight.reshape(-1, 16).double()
    for group in groups:
        exponent = [int(math.frexp(v)[1]) for v in group.abs().tolist() if v]
        step = 2.0 ** (max(exponent) - 5)
        assert torch.equal((group / step).round() * step, group)
