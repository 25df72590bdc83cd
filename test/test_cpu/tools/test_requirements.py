"""What is installed for the targets: the constraints lie inside the ranges of pyproject.toml and hold everywhere."""

from __future__ import annotations

import datetime
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = ROOT / "requirements"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[Requirement]:
    kept = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in kept if line and not line.startswith("#")]


def pins(python: str) -> dict[str, str]:
    """Version by name of all files in requirements/ for a Python on Linux."""
    where = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    found: dict[str, str] = {}
    for path in sorted(REQUIREMENTS.glob("*.txt")):
        for line in lines(path):
            if line.marker is None or line.marker.evaluate(where):
                (pin,) = line.specifier
                name = canonicalize_name(line.name)
                assert pin.operator == "==" and found.setdefault(name, pin.version) == pin.version, (
                    f"{path.name}: {line}"
                )
    return found


def ranges(project: dict[str, Any]) -> Iterator[Requirement]:
    yield from map(Requirement, project["dependencies"])
    for extra in ("data", "gguf", "demo", "test", "lint"):
        yield from map(Requirement, project["optional-dependencies"][extra])


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tool("floors").read()["project"]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_pin_inside_its_range(python: str, project: dict[str, Any]) -> None:
    have = pins(python)
    where = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    for wanted in ranges(project):
        if wanted.marker is None or wanted.marker.evaluate(where):
            pin = have.get(canonicalize_name(wanted.name))
            assert pin is not None, f"{wanted} has no pin for Python {python}: make lock"
            assert wanted.specifier.contains(pin), f"{wanted}: {pin} is pinned for Python {python}: make lock"


def test_the_file_is_of_no_machine() -> None:
    text = (REQUIREMENTS / "constraints.txt").read_text(encoding="utf-8")
    head = text[: text.index("\n", text.rindex("# "))]
    assert re.search(r"Made on \d{4}-\d\d-\d\d by `make lock` .* for Python 3\.10, ", head)
    body = "\n".join(str(line) for line in lines(REQUIREMENTS / "constraints.txt"))
    assert not re.search(r"[+/\\@]|file:|cuda|nvidia", body)


def test_what_is_installed_here_by_make_is_what_is_pinned(project: dict[str, Any]) -> None:
    """Only in the targets' own environment: others (newest, oldest) are meant to differ."""
    from importlib import metadata

    if Path(sys.prefix).name != ".venv" or not (Path(sys.prefix) / ".test").exists():
        pytest.skip("not the environment of make test")
    have = pins(f"{sys.version_info[0]}.{sys.version_info[1]}")
    for name in ("transformers", "numpy", "datasets", "tokenizers", "torch"):
        assert metadata.version(name).split("+")[0] == have[name]


def test_every_requirement_has_a_floor(project: dict[str, Any]) -> None:
    floors = tool("floors")
    extras = project["optional-dependencies"]
    found = [Requirement(line) for line in floors.floors(project, extras)]
    assert all(str(line.specifier).startswith("==") for line in found)
    assert len({canonicalize_name(line.name) for line in found}) == len(found), "two floors for one package"
    assert floors.floor("a>=1,<2; python_version > '3'") == "a==1 ; python_version > '3'"
    for bad in ("a", "a<2", "a==1", "a>1"):
        with pytest.raises(ValueError, match="no lower bound"):
            floors.floor(bad)


def test_pins_that_differ_between_pythons() -> None:
    lock = tool("lock")
    made = lock.text(
        {
            "3.10": {"same": "1", "numpy": "2.2", "old": "7", "gap": "1"},
            "3.9": {"same": "1", "numpy": "2.2", "old": "7", "gap": "1"},
            "3.11": {"same": "1", "numpy": "2.4", "gap": "2"},
        },
        datetime.date(2026, 1, 2),
    )
    assert "for Python 3.9, 3.10, 3.11" in made and "Made on 2026-01-02" in made
    assert [line for line in made.splitlines() if not line.startswith("#")] == [
        "gap==1 ; python_version == '3.9' or python_version == '3.10'", "gap==2 ; python_version >= '3.11'",
        "numpy==2.2 ; python_version == '3.9' or python_version == '3.10'", "numpy==2.4 ; python_version >= '3.11'",
        "old==7", "same==1",
    ]  # fmt: skip


def test_local_labels_and_what_torch_pins_are_left_out() -> None:
    packages = [
        {"name": "Some_Name", "version": "1.0+cpu"}, {"name": "torch", "version": "2.13.0+cpu"},
        {"name": "nvidia-cublas", "version": "13"}, {"name": "auto-round", "version": "1"},
        {"name": "auto-round-lib", "version": "0.16.0"},
    ]  # fmt: skip
    assert tool("lock").pinned(packages) == {"auto-round-lib": "0.16.0", "some-name": "1.0"}


def test_the_page_has_a_line_for_each_environment() -> None:
    note = tool("note_versions")
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for environment in ("newest", "oldest"):
        new = note.noted(page, environment, {"Python": "3.12.1", "torch": "9.9"}, datetime.date(2030, 1, 2))
        assert f"| {environment} | 2030-01-02 | Python 3.12.1, torch 9.9 |" in new
    with pytest.raises(ValueError, match="0 lines"):
        note.noted("nothing", "newest", {}, datetime.date(2030, 1, 2))


def test_targets_install_with_the_constraints() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "PIP := $(LOCKED) " in text
    for target in ("$(VENV)/.torch", "$(VENV)/.test", "$(VENV)/.demo", "$(VENV)/.lint"):
        recipe = text.split(f"\n{target}:")[1].split("\n\n")[0]
        assert "@$(PIP" in recipe and "-m pip" not in recipe
    floor = SpecifierSet(tool("floors").read()["project"]["requires-python"])
    assert floor.contains("3.10") and not floor.contains("3.9")
