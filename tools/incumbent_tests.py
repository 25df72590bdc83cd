#!/usr/bin/env python3
"""Run the public-API tests of the incumbent against this package, and tell which pass and why the others do not.

    python tools/incumbent_tests.py --tests FOLDER [--work .incumbent] [--files core/test_autoround.py ...]

FOLDER is the `test` folder of a checkout of the incumbent's repository. Nothing of it is kept in this project: it is
copied to the work folder and run there, by the interpreter of an environment made for it (or by `--python`). Hub models
are replaced by small stand-ins with random weights (`incumbent_standins.py`); where a test asks for an accuracy, which
such a model does not have, the model must open and give finite logits, and the table says so.

`incumbent_tests.txt` lists which files are run, and why the others and single tests are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incumbent_standins import WIDTH, choose_opt, make_standins

HERE = Path(__file__).resolve().parent
LISTS = HERE / "incumbent_tests.txt"
MODELS = "/tf_dataset/auto_round/models/"
"""Where the incumbent's helpers look for a local copy of a hub model first."""
INTERNAL, LATER = "internal", "later"
NOT_YET = "is not available in this version"
"""Part of every refusal of a feature that comes later (auto_round/later.py)."""
NEEDS = ["compressed-tensors>=0.15", "gguf", "modelscope>=1.20", "pillow", "diffusers"]


@dataclass(frozen=True)
class Lists:
    """Files to run, and by file or test why it is not of the public API of today.

    Attributes:
        files: below unit/test_cpu.
        reasons: (group, reason) by file, test or prefix: group "internal", "later" or "failed" for a test that ran and
            does not pass, "skip" for what is left out whatever its outcome.
    """

    files: tuple[str, ...]
    reasons: dict[str, tuple[str, str]]


def read_lists(path: Path = LISTS) -> Lists:
    """Lines are `run FILE`, or `skip|failed|internal|later TEST reason`.

    A test is a file or `FILE::NAME`; a `*` at the end makes it a prefix.
    """
    files: list[str] = []
    reasons: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(None, 2)
        if not words or line.startswith("#"):
            continue
        if words[0] == "run" and len(words) == 2:
            files.append(words[1])
        elif words[0] in ("skip", "failed", INTERNAL, LATER) and len(words) == 3:
            reasons[words[1]] = words[0], words[2]
        else:
            raise SystemExit(f"{path.name}:{number}: expected 'run FILE' or 'skip TEST reason', got {line!r}")
    return Lists(tuple(files), reasons)


def listed_reason(lists: Lists, test: str) -> tuple[str, str] | None:
    """(group, reason) that the lists give for a test (`core/test_x.py::TestX::test_y[1]`), or None."""
    for pattern, reason in lists.reasons.items():
        if test == pattern or test.startswith((pattern + "::", pattern + "[")):
            return reason
        if pattern.endswith("*") and test.startswith(pattern[:-1]):
            return reason
    return None


def make_environment(folder: Path) -> Path:
    """An environment with this project and what the tests need. Returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-e", f"{HERE.parent}[test,data,gguf]", *NEEDS], check=True
        )
    return python


def copy_tests(tests: Path, work: Path) -> Path:
    """Copy the tests below `work`, with their helpers looking for models there. Returns the folder to run them in."""
    root = work / "root"
    shutil.rmtree(root / "test", ignore_errors=True)
    shutil.copytree(tests, root / "test", ignore=shutil.ignore_patterns("__pycache__", "tmp"))
    for path in (root / "test").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if MODELS in text:
            path.write_text(text.replace(MODELS, f"{work / 'models'}/"), encoding="utf-8")
    with open(root / "test" / "helpers.py", "a", encoding="utf-8") as file:
        file.write("\nfrom incumbent_plugin import _load_multimodal as mllm_load_model\n")
        file.write("from incumbent_plugin import eval_generated_prompt, evaluate_accuracy\n")
    return root


def run_file(python: Path, root: Path, name: str, record: Path, limit: int, only: str | None) -> None:
    """Run one file's tests in a process of their own; its rows are added to `record`."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "INCUMBENT_RECORD": str(record), "INCUMBENT_TESTS": str(root / "test" / "unit" / "test_cpu"),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "AR_WORK_SPACE": str(root / "work_space"),
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
    }  # fmt: skip
    command = [
        str(python), "-m", "pytest", "-p", "incumbent_plugin", "-p", "no:cacheprovider", "-q", "-x" if only else "-q",
        "-o", "addopts=", "--timeout", str(limit), f"test/unit/test_cpu/{name}",
    ]  # fmt: skip
    if only:
        command = [c for c in command if c != "-x"] + ["-k", only]
    log = record.with_name(name.replace("/", "-") + ".log")
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode not in (0, 1, 5):
        print(f"  {name}: pytest ended with {done.returncode}; see {log}")


def group_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """(group, reason) of a row: passed, failed, skipped, internal (it used a name that only the incumbent has), or
    later (it asked for a feature that is still to come, and was told so)."""
    absent, reason = list(row["absent"]), str(row["reason"])
    if row["outcome"] != "failed":
        return str(row["outcome"]), reason
    if NOT_YET in reason or any("(comes later)" in name for name in absent):
        return LATER, reason.partition(f" {NOT_YET}")[0].rpartition("Error: ")[2] or ", ".join(absent)
    if absent or "AbsentName" in reason:
        return INTERNAL, f"uses {', '.join(absent[:2])}"
    return "failed", reason


def counted(rows: Mapping[str, Mapping[str, Any]], lists: Lists) -> dict[str, tuple[str, str]]:
    """(group, reason) of every test. What the lists say of a test that does not pass outweighs its own reason."""
    found: dict[str, tuple[str, str]] = {}
    for test, row in sorted(rows.items()):
        group, reason = group_of(row)
        listed = listed_reason(lists, test)
        if listed is not None and (group != "passed" or listed[0] == "skip"):
            group, reason = listed
        found[test] = group, reason
    return found


def read_rows(record: Path) -> dict[str, dict[str, Any]]:
    """The last row of each test; a failure outweighs a pass, as of a test that passes and whose end fails."""
    rows: dict[str, dict[str, Any]] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["id"] = str(row["id"]).removeprefix("test/").removeprefix("unit/test_cpu/")
        rows[row["id"]] = row
    return rows


GROUPS = ("passed", "failed", INTERNAL, LATER, "skipped", "skip")


def write_table(rows: Mapping[str, Mapping[str, Any]], lists: Lists, target: Path) -> Counter[str]:
    """Write a Markdown page of what came out, and return how many tests came out how."""
    found = counted(rows, lists)
    counts = Counter(group for group, _ in found.values())
    public = counts["passed"] + counts["failed"]
    replaced = sum("accuracy" in row["replaced"] for test, row in rows.items() if found[test][0] == "passed")
    lines = [
        "# The incumbent's public-API tests, run against this package", "",
        f"**{counts['passed']} of {public} pass** ({counts['passed'] / max(public, 1):.1%}), by "
        "`python tools/incumbent_tests.py`.", "",
        f"Beside these, {counts[INTERNAL]} use names that only the incumbent has, {counts[LATER]} ask for features "
        f"that come later, and {counts['skipped'] + counts['skip']} are left out. Hub models are replaced by small "
        f"ones with random weights; where {replaced} of the tests that pass measure an accuracy, the model must open "
        "and give finite logits instead. Files that are not run at all: tools/incumbent_tests.txt.", "",
        "| file | " + " | ".join(GROUPS[:4]) + " | left out |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    by_file: dict[str, Counter[str]] = {}
    for test, (group, _) in found.items():
        by_file.setdefault(test.partition("::")[0], Counter())[group] += 1
    for name, here in by_file.items():
        lines.append(f"| {name} | {' | '.join(str(here[g]) for g in GROUPS[:4])} | {here['skipped'] + here['skip']} |")
    missing = [name for name in lists.files if name not in by_file]
    lines += ["", f"Not run for this page: {', '.join(missing)}."] if missing else []
    for group, title in zip(GROUPS[1:], ("Failing", "Internal", "Later", "Skipped", "Left out"), strict=True):
        tests = [(test, reason) for test, (own, reason) in found.items() if own == group]
        if tests:
            lines += ["", f"## {title}", "", "| test | why |", "|---|---|"]
            lines += [f"| {test} | {reason[:240].replace('|', '/')} |" for test, reason in tests]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the `test` folder of a checkout")
    parser.add_argument("--work", type=Path, default=Path(".incumbent"), help="folder for copies, models and results")
    parser.add_argument("--python", type=Path, help="interpreter to use instead of a new environment's")
    parser.add_argument("--files", nargs="*", help="files below unit/test_cpu; all of incumbent_tests.txt without")
    parser.add_argument("-k", dest="only", help="only tests that match, as pytest's -k")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one test")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there")
    args = parser.parse_args()
    lists = read_lists()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = args.python.absolute() if args.python else make_environment(work / "env")
    make_standins(work / "models")
    root = copy_tests(args.tests.resolve(), work)
    record = work / "rows.jsonl"
    if not args.keep:
        record.unlink(missing_ok=True)
    record.touch()
    for name in args.files or lists.files:
        print(f"{name} ...", flush=True)
        choose_opt(work / "models", WIDTH in (root / "test" / "unit" / "test_cpu" / name).read_text(encoding="utf-8"))
        run_file(python, root, name, record, args.timeout, args.only)
        rows = read_rows(record)
        here = Counter(group for test, (group, _) in counted(rows, lists).items() if test.startswith(name))
        print("  " + ", ".join(f"{n} {group}" for group, n in here.most_common()), flush=True)
    counts = write_table(read_rows(record), lists, work / "table.md")
    print(", ".join(f"{n} {group}" for group, n in counts.most_common()))
    print(f"public: {counts['passed']} of {counts['passed'] + counts['failed']} pass")
    print(f"table: {work / 'table.md'}")
    sys.exit(0 if counts["failed"] == 0 else 1)


if __name__ == "__main__":
    main()
