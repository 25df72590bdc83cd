"""The tool that rebuilds the packaged text keeps out what is not in the public domain."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from auto_round.calibration.data.sources import builtin_documents

ROOT = Path(__file__).parents[3]
CALIB = Path(os.environ.get("AR_TEST_SHARED", ROOT.parent / "shared")) / "data" / "calib.txt"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("make_builtin_text", ROOT / "tools" / "make_builtin_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("document", "source"),
    [
        ("SQLite and sqlite3 and SQLite again, said the SQLite page.", "sqlite"),
        ("SQLite and sqlite3 and SQLite again, unlike PostgreSQL.", None),
        ("DROP TABLE removes tables from the database. Only the owner can drop them.", None),
        ("32.2. When to JIT? JIT compilation is beneficial primarily for long-running queries.", None),
        ("note: 12% of the country (2023 est.)", "factbook"),
        ("Mr. Darcy bowed to Elizabeth, and she was surprised.", "austen"),
        ("Verses 1-5\nHere the prophet is shewn what is to come.", "commentary"),
        ("Yahweh spoke to the king of Israel, and the king answered.", "bible"),
        ("Nothing tells where this comes from.", None),
    ],
)
def test_what_is_not_certain_stays_out(tool: Any, document: str, source: str | None) -> None:
    assert tool.source_of(document) == source


def test_every_packaged_document_has_a_source(tool: Any) -> None:
    assert all(tool.source_of(d) in tool.BUDGET for d in builtin_documents())


def test_packaged_text_is_what_the_tool_makes(tool: Any) -> None:
    if not CALIB.is_file():
        pytest.skip("the text it is made from is not here (set AR_TEST_SHARED)")
    made = [document for _, document in tool.select(CALIB.read_text(encoding="utf-8"))]
    assert made == builtin_documents()
