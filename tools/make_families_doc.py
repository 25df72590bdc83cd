"""Writes docs/families.md: what works for every model type of the installed Transformers, tried on tiny models.

    python tools/make_families_doc.py --work DIR [NAME ...]     # try families, those without a result in DIR first
    python tools/make_families_doc.py --work DIR --only-write   # write the page from the results that are there

Each family is tried by itself, and its result kept as a JSON file in DIR, so that the script can be stopped and started
again. NAMEs are tried anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]
COLUMNS = ("tuned", "RTN", "model-free", "names", "reopened", "logits")


def try_family(name: str, work: Path) -> dict[str, Any]:
    """One family's row, kept in `work`."""
    from families import known_families
    from family_checks import check_family

    with tempfile.TemporaryDirectory() as folder:
        os.environ["AR_WORK_SPACE"] = str(Path(folder) / "space")
        try:
            row = check_family(known_families()[name], Path(folder))
        except Exception as error:
            row = {"tuned": f"fails: cannot be built: {type(error).__name__}: {error}".splitlines()[0]}
        row = {column: str(said).replace(folder, "...") for column, said in row.items()}
    row["date"] = datetime.date.today().isoformat()
    (work / f"{name.replace(':', '-')}.json").write_text(json.dumps(row, indent=1))
    return row


def read_row(name: str, work: Path) -> dict[str, Any] | None:
    """What was found earlier."""
    file = work / f"{name.replace(':', '-')}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def page(rows: dict[str, dict[str, Any] | None]) -> str:
    """The page as text."""
    import torch
    import transformers
    from families import known_families

    families = known_families()
    tried = {name: row for name, row in rows.items() if row}
    dates = sorted(row.get("date", "") for row in tried.values())
    reasons: list[str] = []
    lines = [
        "# Families",
        "",
        "Every model type of Transformers' causal-LM mapping, and a few models that read images too, each tried on a "
        "tiny model with random weights (`test/families.py`), W4A16 with groups of 32. Made by "
        f"`tools/make_families_doc.py` with Transformers {transformers.__version__} and PyTorch {torch.__version__}, "
        f"{dates[-1] if dates else 'never'}.",
        "",
        "- **tuned**: two steps on four samples; **RTN**: `--iters 0 --disable_opt_rtn`.",
        "- **names**: every tensor that is not quantized is in all outputs under its own name, with the same bytes. "
        "So it is planned for llm_compressor, auto_gptq, auto_awq and fake too, where they can hold the family; "
        "fake has every tensor of the source, experts as the source has them.",
        "- **reopened**: through Transformers' auto class, nothing missing or left over.",
        "- **logits**: largest difference between the reopened model and the one in memory with dequantized weights.",
        "",
        f"| family | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, row in sorted(tried.items()):
        cells = []
        for column in COLUMNS:
            said = str(row.get(column, "-"))
            if said.startswith(("refused", "fails")):
                if said not in reasons:
                    reasons.append(said)
                said = f"{said.split(':')[0]} [{reasons.index(said) + 1}]"
            cells.append(said)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Why", ""]
    lines += [f"{number}. {said.replace('|', '/')}" for number, said in enumerate(reasons, 1)]
    lines += ["", "## Not tried", ""]
    lines += [f"- {name}: {family.reason}" for name, family in sorted(families.items()) if family.reason]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families to try anew; all that have no result yet when none is given")
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only-write", action="store_true", help="try nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    given.work.mkdir(parents=True, exist_ok=True)
    from families import buildable

    names = [name for name in given.names or buildable() if given.names or read_row(name, given.work) is None]
    for number, name in enumerate([] if given.only_write else names, 1):
        row = try_family(name, given.work)
        bad = {column: said for column, said in row.items() if said.startswith(("refused", "fails"))}
        print(f"{number}/{len(names)} {name}: {bad or 'all right'}", flush=True)
    given.out.write_text(page({name: read_row(name, given.work) for name in buildable()}))


if __name__ == "__main__":
    main()
