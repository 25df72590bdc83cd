"""Print the lowest versions that pyproject.toml allows, as requirements for pip: `numpy==1.26` for `numpy>=1.26`.

    python tools/floors.py             what the package itself needs
    python tools/floors.py test gguf   and these extras

Other clauses (`<0.17`, markers) are kept. `make test-oldest` installs what this prints.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("extras", nargs="*")
    print("\n".join(floors(read()["project"], parser.parse_args().extras)))


def read() -> dict[str, Any]:
    """pyproject.toml, also on Python 3.10, whose own library cannot read it but whose pip can."""
    try:
        import tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))


def floors(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """Each requirement of a project and of these extras once, with `>=` turned into `==`.

    Raises ValueError for one without a lower bound, which would stand for any version.
    """
    asked = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return list(dict.fromkeys(floor(requirement) for requirement in asked))


def floor(requirement: str) -> str:
    """`name==1.2` for `name>=1.2,<2`; a marker stays."""
    wanted, _, marker = requirement.partition(";")
    found = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*>=\s*([0-9][^,\s]*)\s*(?:,\s*[<!][^;]*)?\s*", wanted)
    if not found:
        raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound of the form name>=version")
    return f"{found[1]}=={found[2]}" + (f" ; {marker.strip()}" if marker else "")


if __name__ == "__main__":
    main()
