"""The pytest plugin of `incumbent_tests.py`: what the incumbent's tests need around them, and the record of what came.

Names of the incumbent's that this package has not are replaced by `Absent`, so that a file is collected although one of
its tests looks at internals; a test that uses one fails with the name. The record says for every test which names it
met, so that "internal" is never guessed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "auto_round"
LATER = "(comes later)"
_RECORD = os.environ["INCUMBENT_RECORD"]
_met: set[str] = set()
_replaced: set[str] = set()
_state = {"running": False}


class AbsentName(Exception):
    """A test used a name that this package does not have."""


class Absent:
    """Stands for a name that this package does not have: silent while tests are collected, an error when one runs."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _use(self) -> None:
        _met.add(self._name)
        if _state["running"]:
            raise AbsentName(self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._use()
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._use()
        return Absent(f"{self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._use()

    def __iter__(self) -> Any:
        self._use()
        return iter(())

    def __getitem__(self, key: Any) -> Any:
        self._use()
        return self

    def __contains__(self, key: Any) -> bool:
        self._use()
        return False

    def __or__(self, other: Any) -> Any:
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an empty module for each module below the package that is not there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.startswith((PACKAGE + ".", PACKAGE + "_extension")):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _AbsentModule(spec.name)

    def exec_module(self, module: Any) -> None:
        support = _SUPPORT.get(module.__name__, {})
        for name, value in support.items():
            setattr(module, name, value)


def _get_module(model: Any, name: str) -> Any:
    return model.get_submodule(name)


def _set_attr(model: Any, name: str, value: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _get_attr(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def _load_model(path: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": "auto", **{k: v for k, v in options.items() if k in ("dtype", "device_map")}}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval(), AutoTokenizer.from_pretrained(path)


def _load_multimodal(path: Any, **options: Any) -> Any:
    """For fixtures that make a small one: tests that only ask for the fixture run, the others meet our refusal."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").eval()
    return model, None, AutoTokenizer.from_pretrained(path), None


def _listdir(path: Any = ".") -> list[str]:
    """`os.listdir` with GGUF files first: tests take the first name for the file, and we write a report beside it."""
    return sorted(_system_listdir(path), key=lambda name: not name.endswith(".gguf"))


_system_listdir = os.listdir


def _load_other(path: Any, **options: Any) -> Any:
    pytest.skip("diffusion models come later")


def _block_names(model: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    return [
        [f"{name}.{i}" for i in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) and len(list(module[0].parameters())) > 2
    ]


_SUPPORT: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.utils": {
        "get_module": _get_module, "get_attr": _get_attr, "set_attr": _set_attr, "get_block_names": _block_names,
        "get_major_device": lambda *a, **k: "cpu", "llm_load_model": _load_model, "mllm_load_model": _load_multimodal,
        "diffusion_load_model": _load_other, "download_hf_model": lambda name, *a, **k: str(name),
        "is_transformers_version_greater_or_equal_5_4_0": lambda: True,
    },
}  # fmt: skip


def check_runs(model: Any, tokenizer: Any = None) -> None:
    """In the place of an accuracy, which random weights do not have: the model opens and its logits are finite."""
    import torch

    _replaced.add("accuracy")
    if isinstance(model, str):
        model, tokenizer = _load_model(model)
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        logits = model(ids.to(next(model.parameters()).device)).logits
    assert torch.isfinite(logits).all(), "logits are not finite"
    assert logits.float().std() > 0, "logits are all equal"


def evaluate_accuracy(model_or_save_dir: Any, tokenizer: Any = None, *args: Any, **kwargs: Any) -> float:
    check_runs(model_or_save_dir, tokenizer)
    return 1.0


def eval_generated_prompt(model: Any, tokenizer: Any = None, *args: Any, **kwargs: Any) -> None:
    check_runs(model, tokenizer)


def _fill_absent(folder: Path) -> None:
    """Give our modules an `Absent` for each name that a test file imports from them and that they lack."""
    wanted: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(PACKAGE):
                wanted.setdefault(str(node.module), set()).update(a.name for a in node.names)
    for name, names in wanted.items():
        try:
            module = importlib.import_module(name)
        except ImportError:  # below a module of ours that is no package
            module = sys.modules[name] = _AbsentModule(name)
        for wanted_name in names:
            try:
                if hasattr(module, wanted_name):
                    continue
                importlib.import_module(f"{name}.{wanted_name}")
            except Exception as error:
                if type(error).__module__.startswith(PACKAGE):  # a feature that comes later, refused with a sentence
                    setattr(module, wanted_name, Absent(f"{name}.{wanted_name} {LATER}"))
                    continue
            if not hasattr(module, wanted_name) or isinstance(getattr(module, wanted_name), _AbsentModule):
                setattr(module, wanted_name, Absent(f"{name}.{wanted_name}"))


sys.meta_path.append(_Finder())  # before pytest imports the tests' conftest.py, so not in a hook
_fill_absent(Path(os.environ["INCUMBENT_TESTS"]))
os.listdir = _listdir  # type: ignore[assignment]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    _met.clear()
    _replaced.clear()
    _state["running"] = True
    yield
    _state["running"] = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    if not text and report.longrepr is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(report.longrepr)[-600:]
    row = {
        "id": report.nodeid, "outcome": report.outcome, "when": report.when, "seconds": round(report.duration, 1),
        "reason": " ".join(text.split())[:600], "absent": sorted(_met), "replaced": sorted(_replaced),
    }  # fmt: skip
    with open(_RECORD, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        reason = " ".join(str(report.longrepr).split())[-600:]
        row = {
            "id": report.nodeid, "outcome": "failed", "when": "collect", "seconds": 0.0, "reason": reason,
            "absent": sorted(_met), "replaced": [],
        }  # fmt: skip
        with open(_RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
