"""Note in docs/versions.md that the fast tests passed here: today's date and the versions in this environment.

Run by `make test-latest` (as `newest`) and `make test-oldest` (as `oldest`) with the environment's own Python, after
all tests passed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from importlib import metadata
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "versions.md"
PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy", "datasets",
    "pyarrow", "ml_dtypes", "gguf", "sentencepiece", "protobuf", "triton", "lm_eval", "pytest",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("environment", choices=("newest", "oldest"))
    PAGE.write_text(
        noted(PAGE.read_text(encoding="utf-8"), parser.parse_args().environment, here(), datetime.date.today()),
        encoding="utf-8",
    )


def here() -> dict[str, str]:
    """Versions by name of what is installed, without local labels."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def noted(page: str, environment: str, versions: dict[str, str], date: datetime.date) -> str:
    """The page with one environment's line written anew. Raises ValueError when the page has no such line."""
    line = f"| {environment} | {date.isoformat()} | {', '.join(f'{name} {v}' for name, v in versions.items())} |"
    changed, count = re.subn(rf"^\| {environment} \|.*$", lambda _: line, page, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} lines for {environment!r} and must have one")
    return changed


if __name__ == "__main__":
    main()
