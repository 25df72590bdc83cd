"""Count the shape of the package: sizes, decisions about kinds of codes and modes of a run, cycles, functions.

    python tools/shape.py                 tables of everything
    python tools/shape.py --list codes    file:line of each place that asks for the kind of codes; also modes, once

What counts is defined here, by the syntax tree, so that two people count the same:

- `codes`: an expression that asks which kind of codes or data type a layer has (`asks_codes`);
- `modes`: a condition on the mode of a run: GGUF or not, in memory or folder, resumed or not, experts streamed or not,
  model-free or not (`asks_mode`);
- `once`: a top-level function or class whose name is used once in the package, imports left out.

An expression counts once per line. Assertions decide nothing and do not count, nor do the bodies of the functions that
answer the question (`def is_float`).
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent / "auto_round"

# Calls and attributes that tell one kind of codes from another.
CODES_CALLS = (
    "is_integer", "is_float", "minifloat_spec", "ggml_type_of", "ggml_type_for",
    "float_family_of", "minifloat_name", "has_codes", "scheme_has_codes", "_is_float", "tuned",
)  # fmt: skip
CODES_CLASSES = re.compile(
    r"Codes$|Codec$|^(GgmlBlocks|DenseWeight|GgmlType|BlockFloatSpec|MinifloatType|QuantParams|BlockScale|FloatLayout)$"
)
CODES_FIELDS = ("data_type", "act_data_type")  # in a comparison, or with startswith / endswith / in
CODES_FAMILIES = ("int", "mx_fp", "mx_int", "nv_fp", "fp", "float", "ggml", "function")  # compared with a `family`
CODES_OPTIONAL = ("blocks", "element", "codes", "ggml")  # attributes of a layer that are compared with None
MODE_NAMES = re.compile(
    r"^(is_gguf|gguf|gguf_format|gguf_output|in_memory|per_expert|model_free|streams_experts|stream_experts|resume"
    r"|resumed|resumable|continues|recovers|writers)$"
)
MODE_OPTIONAL = re.compile(r"^(journal|experts|buffers|source\.folder)$")  # compared with None
MODE_CLASSES = ("CheckpointSource", "LiveSource", "FolderWriter", "MemoryWriter", "GgufFileWriter", "MetaModel",
                "ModelFree", "NoJournal", "RunJournal", "ExpertLayers", "ExpertStreamer", "RoundedExperts")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One counted expression."""

    file: str
    line: int
    text: str


@dataclass
class Shape:
    """What was counted. `areas`: lengths of the files of each top-level folder or module."""

    areas: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    codes: list[Place] = field(default_factory=list)
    modes: list[Place] = field(default_factory=list)
    once: list[Place] = field(default_factory=list)
    cycles: list[tuple[str, ...]] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    definitions: int = 0


def leaf(node: ast.expr) -> str:
    """The last part of a name: `c` of `a.b.c`, and of a call the function's."""
    if isinstance(node, ast.Call):
        return leaf(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def tested_classes(node: ast.AST) -> list[str]:
    """Names of the classes of an `isinstance` call, else nothing."""
    if not (isinstance(node, ast.Call) and leaf(node.func) == "isinstance" and len(node.args) == 2):
        return []
    kinds = node.args[1]
    if isinstance(kinds, ast.BinOp):
        return [name.id for name in ast.walk(kinds) if isinstance(name, ast.Name)]
    return [leaf(kind) for kind in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])]


def asks_codes(node: ast.AST) -> bool:
    """Whether the expression asks which kind of codes or data type there is."""
    if any(CODES_CLASSES.search(name) for name in tested_classes(node)):
        return True
    if isinstance(node, ast.Call):
        name = leaf(node.func)
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        strings = name in ("startswith", "endswith") and owner is not None and leaf(owner) in CODES_FIELDS
        if name == "tuned" and owner is None:  # a function of kernels; the codec's is a method
            return False
        return name in CODES_CALLS or strings
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    if any(leaf(side) in CODES_FIELDS for side in sides):
        return not any(map(is_none, sides))  # whether it is given tells no kind
    if any(leaf(side) == "family" for side in sides):
        constants = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
        return bool(constants & set(CODES_FAMILIES))
    fields = [side.attr for side in sides if isinstance(side, ast.Attribute)]
    return any(name in CODES_OPTIONAL for name in fields) and any(map(is_none, sides))


def deciding(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of assertions and of the functions that answer what is asked."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Assert) or (isinstance(node, ast.FunctionDef) and node.name in CODES_CALLS):
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    """Every atom of a condition: of `if`, `while`, conditional expressions and comprehensions."""
    for node in deciding(tree):
        tests: list[ast.expr] = []
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        elif isinstance(node, ast.BoolOp):
            tests = node.values
        while tests:
            test = tests.pop()
            if isinstance(test, ast.BoolOp):
                tests += test.values
            elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                tests.append(test.operand)
            else:
                yield test


def asks_mode(test: ast.expr) -> bool:
    """Whether an atom of a condition asks for the mode of a run."""
    if any(name in MODE_CLASSES for name in tested_classes(test)):
        return True
    if isinstance(test, ast.Call) and leaf(test.func) == "startswith":
        return any(isinstance(a, ast.Constant) and str(a.value).lower().startswith("gguf") for a in test.args)
    if isinstance(test, ast.Compare):
        sides = [test.left, *test.comparators]
        if any(isinstance(s, ast.Constant) and str(s.value).lower().startswith("gguf") for s in sides):
            return True
        names = [leaf(side) for side in sides]
        names += [f"{leaf(s.value).lstrip('_')}.{s.attr}" for s in sides if isinstance(s, ast.Attribute)]
        return any(map(is_none, sides)) and any(MODE_NAMES.match(n) or MODE_OPTIONAL.match(n) for n in names)
    if isinstance(test, ast.Attribute) and test.attr == "lazy":
        return leaf(test.value) in ("source", "_source", "self")
    return MODE_NAMES.match(leaf(test)) is not None


def found(file: str, nodes: Iterator[ast.expr]) -> list[Place]:
    """One place a line, in order."""
    lines = {node.lineno: ast.unparse(node) for node in nodes}
    return [Place(file, line, text) for line, text in sorted(lines.items())]


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Modules of the package that are imported at module level; those for type checking alone are left out."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_cycles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = tuple(sorted(stack[stack.index(name) :]))
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(group)

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return groups


def measure(root: Path) -> Shape:
    """Count everything in the package at `root`."""
    shape, trees = Shape(), {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        trees[path] = ast.parse(text)
        area = path.relative_to(root).parts[0].removesuffix(".py")
        shape.areas[area].append(len(text.splitlines()))
    modules = {path: ".".join((root.name, *path.relative_to(root).with_suffix("").parts)) for path in trees}
    modules = {path: name.removesuffix(".__init__") for path, name in modules.items()}
    names = set(modules.values())
    graph = {modules[path]: (set(imported(tree, root.name)) & names) - {modules[path]} for path, tree in trees.items()}
    shape.cycles = find_cycles(graph)
    uses: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                uses[node.attr] += 1
    for path, tree in trees.items():
        file = path.relative_to(root.parent).as_posix()
        shape.codes += found(file, (n for n in deciding(tree) if isinstance(n, ast.expr) and asks_codes(n)))
        shape.modes += found(file, (test for test in conditions(tree) if asks_mode(test)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                shape.functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                shape.definitions += 1
                if uses[node.name] == 1:
                    shape.once.append(Place(file, node.lineno, node.name))
    return shape


def render(shape: Shape) -> str:
    """The tables."""
    lengths = [length for part in shape.areas.values() for length in part]
    lines = [f"{'folder or module':<22}{'files':>7}{'lines':>8}{'median':>8}{'largest':>9}"]
    rows = sorted(shape.areas.items(), key=lambda item: -sum(item[1]))
    for name, part in (*rows, ("all", lengths)):
        lines.append(f"{name:<22}{len(part):>7}{sum(part):>8}{median(part):>8.0f}{max(part):>9}")
    lines += [
        "",
        f"places that ask for the kind of codes: {len(shape.codes)}",
        f"places that ask for the mode of a run: {len(shape.modes)}",
        f"import cycles at module level: {len(shape.cycles)}",
        *(f"  {' <-> '.join(group)}" for group in shape.cycles),
        f"functions: {len(shape.functions)}, median length {median(shape.functions):.0f} lines",
        f"top-level definitions: {shape.definitions}, used once: {len(shape.once)}",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", choices=("codes", "modes", "once"), help="print the places instead")
    parser.add_argument("--root", type=Path, default=ROOT, help="package to measure (default: auto_round/)")
    given = parser.parse_args(argv)
    shape = measure(given.root.resolve())
    if given.list:
        for place in getattr(shape, given.list):
            print(f"{place.file}:{place.line}  {place.text}")
        return 0
    print(render(shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
