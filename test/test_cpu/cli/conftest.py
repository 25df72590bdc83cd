from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from auto_round.logger import _remove_own_handlers, logger


class Recorder:
    """Stands in for AutoRound: remembers how it was called."""

    def __init__(self) -> None:
        self.kwargs: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self.planned: dict[str, Any] = {}
        self.named: Any = None
        self.fails: BaseException | None = None

    def __call__(self, **kwargs: Any) -> Recorder:
        if self.fails is not None:
            raise self.fails
        self.named = kwargs.pop("format", None)
        self.kwargs = kwargs
        return self

    def plans(self, **kwargs: Any) -> Any:
        self.planned = kwargs
        return [types.SimpleNamespace(render=lambda: "the plan")]

    def quantize_and_save(self, output_dir: str, **kwargs: Any) -> tuple[object, list[str]]:
        self.saved = {"output_dir": output_dir, **kwargs}
        return object(), [f"{output_dir}/first", f"{output_dir}/last"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = types.ModuleType("auto_round.autoround")
    module.AutoRound = recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "auto_round.autoround", module)
    return recorder


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Evaluations that were asked for; none is done."""
    from auto_round.cli import eval as module

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        module,
        "evaluate_from_flags",
        lambda given, record_in=None: calls.append({**given, **({"record_in": record_in} if record_in else {})}) or 0,
    )
    return calls


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A work space of its own, and logging as it was before."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "WorkPlan"))
    monkeypatch.delenv("AR_LOG_LEVEL", raising=False)
    handlers, level = list(logger.handlers), logger.level
    yield
    _remove_own_handlers()
    logger.handlers[:] = handlers
    logger.setLevel(level)
