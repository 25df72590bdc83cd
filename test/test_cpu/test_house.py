"""The house rules that a machine can check: who may import whom, file length, what importing costs and touches."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "auto_round"
MOST_LINES = 600

# A room may import rooms of a lower rank, and itself. Rooms of one rank do not know each other.
RANKS: dict[str, int] = {
    "_version": 0, "errors": 0,
    "edits": 1, "envs": 1, "files": 1, "later": 1, "threads": 1,
    "auto_scheme": 2, "logger": 2, "plugins": 2,
    "schemes": 2,
    "codecs": 3, "config": 3, "layer_config": 3, "recipes": 3,
    "data_type": 4, "gguf": 4, "layouts": 4,
    "algorithms": 5, "formats": 5, "modeling": 5, "output": 5, "report": 5,
    "calibration": 6, "inference": 6,
    "calib_dataset": 7, "eval": 7,
    "run": 8,
    "autoround": 9, "utils": 9,
    "cli": 10,
    "__main__": 11,
}  # fmt: skip

HEAVY = ("transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "rich", "psutil")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sources():
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_rooms(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(room, line) of every import of this package, at any depth. `from auto_round import x` means the room x."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "auto_round" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "auto_round" and len(parts) > 1:
                # `from auto_round import AutoRound` goes through the package's own lazy names.
                yield ("autoround" if parts[1] == "AutoRound" else parts[1]), node.lineno  # type: ignore[attr-defined]


def violations(room: str, tree: ast.Module) -> list[str]:
    found = []
    for other, line in imported_rooms(tree):
        if other != room and not (other in RANKS and RANKS[other] < RANKS[room]):
            found.append(f"line {line}: {room} must not import {other}")
    return found


def test_imports_point_downwards() -> None:
    wrong: list[str] = []
    for path in sources():
        name = module_name(path)
        if name == "auto_round":
            continue  # the package's lazy names, checked below
        room = name.split(".")[1]
        assert room in RANKS, f"{room} is a new room: give it a rank here and a line in the README"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)} {problem}" for problem in violations(room, tree)]
    assert not wrong, "\n".join(wrong)


def test_the_direction_check_can_fail() -> None:
    tree = ast.parse("def f():\n    from auto_round.cli.main import run\n    from auto_round import errors\n")
    assert violations("modeling", tree) == ["line 2: modeling must not import cli"]
    assert violations("cli", tree) == []
    assert violations("errors", ast.parse("from auto_round import AutoRound")) == [
        "line 1: errors must not import autoround"
    ]


def test_files_are_short() -> None:
    folders = [ROOT / name for name in ("auto_round", "test", "tools", "examples", "bench")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert len(lengths) > 100
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


def fresh(code: str) -> dict[str, object]:
    """What `code` puts into `found`, run in a new interpreter."""
    program = f"import json, sys\nfound = {{}}\n{code}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import auto_round", ("torch", *HEAVY)),
        ("from auto_round import AutoRound, PRESET_SCHEMES, SignRoundConfig", HEAVY),
        ("from auto_round.cli import main\nassert main.run(['--help']) == 0", ("torch", *HEAVY)),
        ("from auto_round.cli import main\nassert main.run(['list', 'scheme']) == 0", HEAVY),
    ],
    ids=["import", "from-import", "help", "list"],
)
def test_importing_is_cheap(code: str, absent: tuple[str, ...]) -> None:
    loaded = fresh(f"{code}\nfound['modules'] = sorted({{m.split('.')[0] for m in sys.modules}})")["modules"]
    assert isinstance(loaded, list) and "auto_round" in loaded
    assert [name for name in absent if name in loaded] == []


WATCH = """
import importlib, logging, os, pkgutil, signal, threading, warnings
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.quantizers import auto as quantizers
from transformers.utils import quantization_config
watched = [
    torch, torch.nn.Module, torch.nn.Linear, torch.nn.functional, torch.Tensor, torch.cuda, torch.utils.data,
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, transformers.modeling_utils,
    quantizers, quantization_config, quantizers.AUTO_QUANTIZER_MAPPING, quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING,
    os, logging.Logger,
]
def state():
    tables = [{k: id(v) for k, v in (w if isinstance(w, dict) else vars(w)).items()} for w in watched]
    flags = [
        str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.get_num_threads(),
        torch.get_float32_matmul_precision(), dict(os.environ), os.getcwd(), list(sys.path), id(sys.excepthook),
        list(map(id, logging.getLogger().handlers)), logging.getLogger().level, len(warnings.filters),
        id(signal.getsignal(signal.SIGINT)), threading.active_count(), torch.random.initial_seed(),
    ]
    return tables, flags
tables, flags = state()
import auto_round
names = [m.name for m in pkgutil.walk_packages(auto_round.__path__, 'auto_round.') if m.name != 'auto_round.__main__']
for name in names:
    importlib.import_module(name)
after_tables, after_flags = state()
found['modules'] = len(names)
# New names may appear (a submodule that was loaded lazily); what was there must be what it was.
found['changed'] = [
    f'{getattr(w, "__name__", type(w).__name__)}.{k}'
    for w, before, after in zip(watched, tables, after_tables)
    for k, v in before.items() if k != '__warningregistry__' and after.get(k) != v
]
found['flags'] = [str(pair) for pair in zip(flags, after_flags) if pair[0] != pair[1]]
found['cuda'] = torch.cuda.is_initialized()
"""


def test_importing_everything_touches_nothing() -> None:
    found = fresh(WATCH)
    assert isinstance(found["modules"], int) and found["modules"] > 60
    assert found["changed"] == []
    assert found["flags"] == []
    assert found["cuda"] is False


def calls_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield "raise " + ast.unparse(node.exc).split("(")[0], node.lineno


def test_the_library_neither_prints_nor_exits_nor_leaves_stubs() -> None:
    everywhere = ("exit", "quit", "sys.exit", "os._exit", "raise NotImplementedError", "breakpoint", "pickle.load")
    library = (*everywhere, "print", "raise SystemExit", "input")
    wrong = []
    for name, tree in trees():
        program = name.startswith("auto_round/cli/")
        allowed = ("raise SystemExit", "sys.exit") if name == "auto_round/__main__.py" else ()
        for call, line in calls_in(tree):
            if call in (everywhere if program else library) and call not in allowed:
                wrong.append(f"{name}:{line} {call}")
    assert not wrong, "\n".join(wrong)


def test_no_error_is_swallowed_unseen() -> None:
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kind = ast.unparse(node.type) if node.type is not None else "everything"
            silent = all(isinstance(s, ast.Pass) for s in node.body)
            if node.type is None or (silent and kind in ("Exception", "BaseException")):
                wrong.append(f"{name}:{node.lineno} catches {kind}")
    assert not wrong, "\n".join(wrong)


def test_public_names_say_what_they_are() -> None:
    wrong = []
    for name, tree in trees():
        if ast.get_docstring(tree) is None and Path(name).name != "__init__.py":
            wrong.append(f"{name}: the module")
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                wrong.append(f"{name}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_every_data_file_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["auto_round"]
    data = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert "py.typed" in data and "calibration/data/builtin.txt.xz" in data
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.slow
def test_the_wheel_holds_the_package(tmp_path: Path) -> None:
    """Builds a wheel; needs the package index for the build's own requirements."""
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert wanted <= names
    extra = {n for n in names if not n.startswith("auto_round/") and ".dist-info/" not in n}
    assert not extra, "only the package belongs into the wheel"
