"""A program of the tests: forks runs that are killed at chosen moments, and runs that resume. Not a test itself.

Arguments: a JSON object with `model`, `work`, `kwargs`, and `kills` (how many) or `ranks` (how many processes). Prints
one JSON line with what differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

WATCHED = ("pwrite", "fsync", "replace", "posix_fallocate", "mkdir", "unlink")


def run(model: str, out: Path, kwargs: dict[str, Any]) -> None:
    from auto_round import AutoRound
    from auto_round.run.model_free import workers as shard_run

    shard_run.SYNC_BYTES = 20_000  # a line of the journal every few tensors
    AutoRound(model, model_free=True, device_map="cpu", **kwargs).quantize_and_save(out)


def watch(at: int, torn: bool, count: list[int]) -> None:
    """From now on the process kills itself at call number `at` of the watched functions, before it or in its middle."""
    for name in WATCHED:
        real = getattr(os, name)

        def watched(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                if torn and _name == "pwrite":
                    _real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                elif torn:
                    _real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*args, **kwargs)

        setattr(os, name, watched)


def forked(work: Any) -> int:
    """Run `work` in a fork; its exit status: 0, a signal as a negative number, or 1."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json" and ".partial" not in path.parts
    }


def finished(out: Path) -> bool:
    """Whether nothing is left to do: config.json is moved last, and then the journal is removed."""
    return (out / "config.json").exists() and not (out / ".partial" / ".journal" / "run.json").exists()


def killed_once(given: dict[str, Any], out: Path, at: int, torn: bool) -> int:
    def work() -> None:
        watch(at, torn, [0])
        run(given["model"], out, given["kwargs"])

    return forked(work)


def kill_and_resume(given: dict[str, Any], wanted: dict[str, bytes], calls: int) -> list[str]:
    """Kill runs at random moments, up to three times each, then let one end. What went wrong, as words."""
    problems = []
    choose = random.Random(given.get("seed", 0))
    out = Path(given["work"]) / "killed"
    done = 0
    while done < given["kills"]:
        shutil.rmtree(out, ignore_errors=True)
        moments: list[tuple[int, bool]] = []
        for _ in range(choose.randint(1, 3)):
            moments.append((choose.randint(1, calls), choose.random() < 0.5))
            status = killed_once(given, out, *moments[-1])
            done += status == -signal.SIGKILL
            if status not in (0, -signal.SIGKILL):
                problems.append(f"{moments}: left with {status}")
            if finished(out):
                break
            names = [path.name for path in out.glob("*.safetensors")]
            problems += [f"{moments}: {n} is not whole" for n in names if len(wanted[n]) != (out / n).stat().st_size]
        if not finished(out):
            status = killed_once(given, out, -1, False)
            if status:
                problems.append(f"{moments}: the resumed run exited with {status}")
        if tree(out) != wanted:
            problems.append(f"{moments}: other files")
    return problems


def in_ranks(given: dict[str, Any], wanted: dict[str, bytes]) -> list[str]:
    """One run by several processes."""
    out = Path(given["work"]) / "ranks"
    pids = []
    for rank in range(given["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(given["ranks"]))
            os._exit(forked(lambda: run(given["model"], out, given["kwargs"])) & 127)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    problems = [f"processes left with {codes}"] if any(codes) else []
    return problems + ([] if tree(out) == wanted else ["other files"])


def main() -> None:
    given = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    whole = Path(given["work"]) / "whole"
    run(given["model"], Path(given["work"]) / "first", given["kwargs"])  # everything is imported before the forks
    counted = Path(given["work"]) / "count"

    def count_calls() -> None:
        count = [0]
        watch(-1, False, count)
        run(given["model"], whole, given["kwargs"])
        counted.write_text(str(count[0]))

    if forked(count_calls):
        raise SystemExit("the run that nothing disturbs failed")
    wanted = tree(whole)
    problems = in_ranks(given, wanted) if "ranks" in given else kill_and_resume(given, wanted, int(counted.read_text()))
    print(json.dumps({"calls": int(counted.read_text()), "problems": problems}))


if __name__ == "__main__":
    main()
