"""A program of the tests: forks tuning runs that are killed at chosen moments, and runs that go on. Not a test itself.

Argument: a JSON object with `work` (a folder), `cells` ({name: {"model", "formats", "kwargs", "ways", "alone"}}),
`kills` (how many of each cell), and `seed`. `ways`: other settings that give the same bytes, one is drawn for each run:
"threads", "file" (activations in a file, by a limit on memory that asks for it), or flags. `alone`: memory is so little
that experts are tuned one at a time. Prints one JSON line: by cell the kills, their phases, and what went wrong.

Half of the kills come at a random call of what changes the disk, before it, after it or in the middle of a write; the
other half at a random time.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = ("fsync", "replace", "unlink", "mkdir", "rmdir", "open", "ftruncate", "pwrite", "posix_fallocate")
REFUSED = 6  # exit code of OutputError
HIDDEN = {".partial"}  # what is not finished


class Moment:
    """Kills the process at call number `at`: 0 before it, 1 after it, 2 in the middle of a write."""

    def __init__(self, at: int, how: int) -> None:
        self.at, self.how, self.count = at, how, 0
        self._lock = threading.Lock()

    def __call__(self, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        with self._lock:
            self.count += 1
            now = self.count == self.at
        if not now:
            return act()
        if self.how:
            (half or act)() if self.how == 2 else act()
        os.kill(os.getpid(), signal.SIGKILL)


class WatchedFile:
    """A file opened for writing."""

    def __init__(self, file: Any, moment: Moment) -> None:
        self._file, self._moment = file, moment

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._moment(lambda: self._file.write(data), half)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: Any) -> Any:
        return self._file.__exit__(*exc)


def watch(moment: Moment) -> None:
    """From now on calls that change the disk, and tuning steps, are counted."""
    from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer

    for owner, names in ((os, WATCHED), (SignRoundQuantizer, ("_backward",))):
        for name in names:
            real = getattr(owner, name)

            def watched(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                half = None
                if _name == "pwrite":
                    half = lambda: _real(args[0], args[1][: len(args[1]) // 2], *args[2:])  # noqa: E731
                return moment(lambda: _real(*args, **kwargs), half)

            setattr(owner, name, watched)
    real_open = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wa+") or file == os.devnull:
            return real_open(file, mode, *args, **kwargs)
        return WatchedFile(moment(lambda: real_open(file, mode, *args, **kwargs)), moment)

    builtins.open = opened  # type: ignore[assignment]


def run(cell: dict[str, Any], out: Path, way: dict[str, Any] | None = None) -> None:
    from auto_round import AutoRound

    ids = [[(7 * i + 3 * j) % 240 + 3 for j in range(16)] for i in range(8)]
    data = {} if "model_free" in cell["kwargs"] else {"dataset": ids, "nsamples": 8, "seqlen": 16, "batch_size": 4}
    given, way = {**data, "device_map": "cpu", **cell["kwargs"]}, dict(way or {})
    if "threads" in way:
        import torch

        torch.set_num_threads(way.pop("threads"))
    in_file = way.pop("file", False)
    if in_file or cell.get("alone"):
        from auto_round.run import memory as memory_plan

        memory_plan.rss_bytes = lambda: 100_000_000  # not what this process happens to hold
        wanted = bool(cell.get("alone")), in_file
        plan = AutoRound(cell["model"], **given).plan().memory_plan
        while (plan.streams_experts, plan.streams == "file") < wanted:
            way["max_memory"] = plan.ram - 1
            plan = AutoRound(cell["model"], **given, **way).plan().memory_plan
    AutoRound(cell["model"], **given, **way).quantize_and_save(out, cell["formats"])


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a fork; its exit status: 0, that of an error, or a signal as a negative number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(getattr(error, "exit_code", 1))
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells times, and what is hidden. The recipe says the limit on memory that was
    given, which differs between ways to run that give the same result."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json" and not HIDDEN & set(path.relative_to(folder).parts)
    }
    for name in [name for name in found if Path(name).name == "recipe.yaml"]:
        lines = found[name].splitlines(keepends=True)
        found[name] = b"".join(line for line in lines if not line.strip().startswith(b"max_memory:"))
    return found


def phase(space: Path, out: Path) -> str:
    """Where a kill came, by what it left."""
    folders = list((space / "resume").glob("*")) if (space / "resume").is_dir() else []
    states = []
    for folder in folders:
        file = folder / "manifest.json"
        states.append(json.loads(file.read_text().partition("\n")[2]) if file.exists() else {"units": [], "done": {}})
    if any(state["done"] for state in states):
        return "showing the files"
    if not states:
        return "the journal removed" if tree(out) else "before the journal"
    units = max(len(state["units"]) for state in states)
    return f"{units} units done"


class Killer:
    """One cell: kills runs of it and lets them end."""

    def __init__(self, name: str, cell: dict[str, Any], work: Path, seed: int) -> None:
        self.cell, self.out, self.space = cell, work / f"{name}-out", work / f"{name}-space"
        os.environ["AR_WORK_SPACE"] = str(self.space)
        self.choose = random.Random(seed)
        self.problems: list[str] = []
        self.phases: Counter[str] = Counter()
        counted = work / f"{name}-calls"

        def undisturbed() -> None:
            moment = Moment(-1, 0)
            watch(moment)
            run(cell, work / name)
            counted.write_text(str(moment.count))

        started = time.monotonic()
        if forked(undisturbed):
            raise SystemExit(f"{name}: the run that nothing disturbs failed")
        self.seconds, self.calls = time.monotonic() - started, int(counted.read_text())
        self.wanted = tree(work / name)

    def _way(self) -> dict[str, Any] | None:
        ways = self.cell.get("ways")
        return self.choose.choice(ways) if ways else None

    def kill(self) -> bool:
        """One run that is killed. Whether it was."""
        at, way = None, self._way()
        if self.choose.random() < 0.5:
            at = self.choose.uniform(0, self.seconds)
            status = forked(lambda: run(self.cell, self.out, way), at)
        else:
            moment = Moment(self.choose.randint(1, self.calls), self.choose.randint(0, 2))

            def work() -> None:
                watch(moment)
                run(self.cell, self.out, way)

            status = forked(work)
        if status not in (0, REFUSED, -signal.SIGKILL):
            self.problems.append(f"a run that was to be killed left with {status}")
        if status == -signal.SIGKILL:
            self.phases[phase(self.space, self.out)] += 1
        self._check_shown()
        return status == -signal.SIGKILL

    def _check_shown(self) -> None:
        """What opens must be whole."""
        for config in [*self.out.rglob("config.json"), *self.out.rglob("*.gguf")]:
            if not HIDDEN & set(config.parts):
                shown = {k: v for k, v in tree(config.parent).items() if "/" not in k}
                prefix = "" if config.parent == self.out else f"{config.parent.name}/"
                whole = {k for k in self.wanted if k.startswith(prefix) and "/" not in k.removeprefix(prefix)}
                less = config.suffix == ".json" and len(shown) < len(whole)
                if less or any(self.wanted.get(prefix + name) != data for name, data in shown.items()):
                    self.problems.append(f"{config} is shown and not what was wanted")

    def end(self) -> None:
        """Let the run end, and compare."""
        way = self._way()
        status = forked(lambda: run(self.cell, self.out, way))
        if status not in (0, REFUSED):
            self.problems.append(f"going on left with {status}")
        if tree(self.out) != self.wanted:
            self.problems.append(f"other files after {status}")
        if any(list(self.out.rglob(name)) for name in HIDDEN):
            self.problems.append("something unfinished is left")
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.space, ignore_errors=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    work = Path(given["work"])
    os.environ["AR_WORK_SPACE"] = str(work / "first-space")
    for number, cell in enumerate(given["cells"].values()):
        # Everything is imported before the forks; without a step of tuning, since autograd does not survive one.
        plain = {} if "model_free" in cell["kwargs"] else {"iters": 0, "disable_opt_rtn": True}
        run({**cell, "kwargs": {**cell["kwargs"], **plain}}, work / f"first-{number}")
    found = {}
    for number, (name, cell) in enumerate(given["cells"].items()):
        killer = Killer(name, cell, work, given["seed"] + number)
        kills = 0
        while kills < given["kills"]:
            for _ in range(killer.choose.randint(1, 3)):
                kills += killer.kill()
            killer.end()
        found[name] = {"kills": kills, "calls": killer.calls, "phases": killer.phases, "problems": killer.problems}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
