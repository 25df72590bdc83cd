"""tools/shape.py on a package made up for it, each of whose lines is one case."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

FILES = {
    "__init__.py": "",
    "kinds.py": '''"""Kinds."""

from toy.run.loop import loop


def is_integer(scheme):
    return scheme.data_type == "int"


def pack(layer, scheme):
    assert layer.codes is not None
    if is_integer(scheme):
        return 1
    if layer.blocks is not None and scheme.data_type.startswith("fp"):
        return 2
    kinds = [part for part in layer if isinstance(part, (GgmlBlocks, int))]
    if codec_of(scheme).family in ("int", "fp") or family == "llama" or scheme.data_type is None:
        return 3
    return loop(kinds)
''',
    "run/__init__.py": "",
    "run/loop.py": '''"""A run."""

from __future__ import annotations

from toy import kinds


def loop(job, journal=None):
    if journal is not None:
        job = kinds.pack(job, job)
    while job.gguf:
        job = None if source.lazy else []
    return [name for name in job if name.startswith("gguf:")]


def unused(experts):
    if experts:
        return experts
''',
    "run/late.py": '''"""Imports late, which makes no cycle."""


def late():
    from toy.run.loop import loop

    return loop(1)
''',
}


@pytest.fixture
def shape(tmp_path: Path) -> tuple[Any, Path]:
    spec = importlib.util.spec_from_file_location("shape", ROOT / "tools" / "shape.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shape"] = module
    spec.loader.exec_module(module)
    for name, text in FILES.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return module, tmp_path / "toy"


def test_what_is_counted(shape: tuple[Any, Path]) -> None:
    module, folder = shape
    found = module.measure(folder)
    assert [(p.file, p.line) for p in found.codes] == [("toy/kinds.py", line) for line in (12, 14, 16, 17)]
    assert [(p.file, p.line) for p in found.modes] == [("toy/run/loop.py", line) for line in (9, 11, 12, 13)]
    assert found.cycles == [("toy.kinds", "toy.run.loop")]
    assert {place.text for place in found.once} == {"is_integer", "pack"}
    assert (found.definitions, sorted(found.functions)) == (5, [2, 3, 4, 6, 10])
    assert {name: len(lengths) for name, lengths in found.areas.items()} == {"__init__": 1, "kinds": 1, "run": 3}


def test_the_table_and_the_list(shape: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    module, folder = shape
    assert module.main(["--root", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "kind of codes: 4" in text and "mode of a run: 4" in text and "toy.kinds <-> toy.run.loop" in text
    assert module.main(["--root", str(folder), "--list", "codes"]) == 0
    assert "toy/kinds.py:12  is_integer(scheme)" in capsys.readouterr().out.splitlines()


def test_the_package_has_no_cycles(shape: tuple[Any, Path]) -> None:
    module, _ = shape
    assert module.measure(ROOT / "auto_round").cycles == []
