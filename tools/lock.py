"""Pin everything that `make demo`, `make test` and `make lint` install in requirements/constraints.txt.

Each Python that is given gets a fresh environment in which pip resolves the project with its extras, PyTorch as pinned
in requirements/torch.txt, from its index alone (no settings or package folders of this machine). Nothing is installed:
pip reads the packages' metadata. A package that gets one version on all Pythons has one line, one that does not has a
line for each, chosen by a marker.

    python tools/lock.py python3.10 python3.11 python3.12 python3.13
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "requirements" / "constraints.txt"
EXTRAS = ("data", "gguf", "demo", "test", "lint")
# PyTorch has a file of its own and pins what its CUDA builds need itself; the project is no dependency of itself.
LEFT_OUT = re.compile(r"(torch|auto-round|cuda-.*|nvidia-.*)$")
# What a machine may add to pip's own index and choices.
SETTINGS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_PRE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("pythons", nargs="+", help="interpreters to resolve for, such as python3.11")
    pythons = [name for name in parser.parse_args().pythons if runs(name)]
    if not pythons:
        sys.exit("none of these interpreters is here; name them with LOCK_PYTHONS=")
    versions = {}
    for python in pythons:
        minor, pins = resolve(python)
        print(f"Python {minor}: {len(pins)} packages", flush=True)
        versions[minor] = pins
    OUT.write_text(text(versions, datetime.date.today()), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")


def runs(python: str) -> bool:
    """Whether this interpreter is here; a name on the path may be one that only says that it is not."""
    return bool(shutil.which(python)) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """("3.11", version by package) for an interpreter."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(next(Path(folder).glob("[bS]*/python*")))
        pip = [inside, "-m", "pip", "-q"]
        subprocess.run([*pip, "install", "--upgrade", "pip"], check=True, env=environment)
        report = Path(folder) / "report.json"
        subprocess.run(
            [*pip, "install", "--dry-run", "--ignore-installed", "--report", str(report), "--no-input",
             "-r", "requirements/torch.txt", "-r", "requirements/lint.txt", "setuptools", f".[{','.join(EXTRAS)}]"],
            check=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        found = json.loads(report.read_text(encoding="utf-8"))
    major, minor = found["environment"]["python_full_version"].split(".")[:2]
    return f"{major}.{minor}", pinned([item["metadata"] for item in found["install"]])


def pinned(packages: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Version by normalized name, without local labels such as `+cpu` and without what the file leaves out."""
    names = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"].split("+")[0] for p in packages}
    return {name: version for name, version in sorted(names.items()) if not LEFT_OUT.match(name)}


def text(versions: Mapping[str, Mapping[str, str]], date: datetime.date) -> str:
    """The file for pins by Python version ("3.10" to {name: version})."""
    pythons = sorted(versions, key=lambda minor: [int(part) for part in minor.split(".")])
    lines = [
        "# The exact version of everything that `make demo`, `make test`, `make lint` install, but for PyTorch, whose",
        "# version is in requirements/torch.txt. Only a constraint: a package that nobody asks for is not installed.",
        f"# Made on {date.isoformat()} by `make lock` (tools/lock.py), pip on Linux, for Python {', '.join(pythons)}.",
        "# Do not edit: change pyproject.toml and make it again.",
    ]
    for name in sorted({name for pins in versions.values() for name in pins}):
        lines += _lines(name, {minor: versions[minor].get(name) for minor in pythons})
    return "\n".join(lines) + "\n"


def _lines(name: str, by_python: Mapping[str, str | None]) -> list[str]:
    wanted = [version for version in by_python.values() if version]
    if len(set(wanted)) == 1:  # where nothing asks for it, the line does no harm
        return [f"{name}=={wanted[0]}"]
    made, pythons = [], list(by_python)
    for version in dict.fromkeys(wanted):
        own = [minor for minor in pythons if by_python[minor] == version]
        if own[-1] == pythons[-1]:  # Pythons newer than any that was resolved for get what the newest of these gets
            marker = f"python_version >= '{own[0]}'"
            earlier = pythons[pythons.index(own[0]) :]
            if any(by_python[minor] not in (version, None) for minor in earlier):
                raise ValueError(f"{name}: {version} is wanted on Python {own}, with another version between")
        else:
            marker = " or ".join(f"python_version == '{minor}'" for minor in own)
        made.append(f"{name}=={version} ; {marker}")
    return made


if __name__ == "__main__":
    main()
