"""The verb `list`: print tables of formats, schemes, algorithms, datasets, backends, variables and recipes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest

from auto_round.cli.parser import Parser
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.plugins import load_plugins


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110) -> str:
    """Rows as text with aligned columns. Cells may have several lines; the last column is wrapped at `width`."""
    cells = [[str(cell).split("\n") for cell in row] for row in (head, *rows)]
    sizes = [max(len(line) for row in cells for line in row[i]) for i in range(len(head) - 1)]
    last_width = max(20, width - sum(sizes) - 2 * len(sizes))
    lines: list[str] = []
    for *leading, last in cells:
        wrapped = textwrap.wrap(" ".join(last), last_width)
        for parts in zip_longest(*leading, wrapped, fillvalue=""):
            start = "".join(f"{cell:<{size + 2}}" for cell, size in zip(parts[:-1], sizes, strict=True))
            lines.append((start + parts[-1]).rstrip())
    return "\n".join(lines)


USAGE = "usage: auto-round list {format,scheme,algorithm,dataset,backend,env,recipe} [--plugin FILE.py]"


def run_verb(argv: Sequence[str]) -> int:
    """Print one of the tables. Raises ConfigError for an unknown one."""
    parser = Parser("auto-round list", add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", "--plugins", action="append", default=[], metavar="FILE.py")
    given, words = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if not words:
        print(USAGE)
        return 0 if argv else ConfigError.exit_code
    if len(words) > 1:
        raise ConfigError(f"list takes one word, got {' '.join(words)!r}; {USAGE}")
    name = words[0].lower().strip("-")
    key = name[:-1] if name.endswith("s") else name
    key = "algorithm" if key == "alg" else key
    if key not in TABLES:
        raise ConfigError(f"nothing called {words[0]!r} to list{nearest(key, TABLES)} {USAGE}")
    load_plugins(given.plugin)
    print(TABLES[key]())
    return 0


def formats() -> str:
    """Formats, and the presets they support."""
    from auto_round.formats.base import available_formats, get_format

    rows = [(name, ", ".join(get_format(name).support_schemes)) for name in available_formats()]
    return text_table(("format", "schemes"), rows)


def schemes() -> str:
    """Presets, their fields, and the formats that support them or what is missing."""
    from auto_round.codecs.activation import activation_function
    from auto_round.codecs.kinds import codec_of
    from auto_round.formats.base import formats_for_scheme
    from auto_round.schemes import PRESET_SCHEMES

    rows = []
    for name, scheme in PRESET_SCHEMES.items():
        missing = f"data type {scheme.data_type}"
        try:
            codec_of(scheme)
            if scheme.activations is not None:
                missing = f"activations of data type {scheme.activations.data_type}"
                activation_function(scheme.activations)
        except UnsupportedError:
            supported = f"not yet: {missing}"
        else:
            supported = ", ".join(formats_for_scheme(scheme)) or "not yet: no format supports it"
        rows.append((name, scheme.describe(), supported))
    return text_table(("scheme", "means", "formats"), rows)


def datasets() -> str:
    """Registered calibration sets."""
    from auto_round.calib_dataset import available_datasets

    return text_table(("dataset", "where", "what"), [(name, where, what) for name, what, where in available_datasets()])


def backends() -> str:
    """The inference backends, and whether each can be used on this machine or why not."""
    from auto_round.inference.table import BACKENDS, DTYPE_LABELS, available_devices, usable

    here = available_devices()
    rows = [
        (b.name, "/".join(b.devices), ",".join(map(str, b.bits)), "/".join(DTYPE_LABELS[d] for d in b.dtypes),
         str(b.priority), "\n".join(b.packings), "\n".join(b.requirements) or "-", ("yes, " if yes else "no: ") + why)
        for b in BACKENDS
        for yes, why in (usable(b, here),)
    ]  # fmt: skip
    head = ("backend", "devices", "bits", "dtypes", "priority", "packing", "requirements", "usable here")
    return text_table(head, rows, width=150)


def environment() -> str:
    """Environment variables with their current values."""
    import os

    from auto_round.envs import VARIABLES

    rows = [
        (v.name, os.environ.get(v.name) or f"({'unset' if v.default is None else v.default})",
         f"{v.doc} Values: {v.allowed()}.")
        for v in VARIABLES
    ]  # fmt: skip
    return text_table(("variable", "value (default)", "meaning"), rows)


def algorithms() -> str:
    """Algorithms, their other names, and what to use instead of those that are missing."""
    from auto_round.algorithms.base import ALGORITHMS as registered
    from auto_round.later import ALGORITHMS

    rows = [
        ("auto_round", "yes", "rounding tuned block by block; also sign_round, signround, autoround"),
        ("gptq", "yes", "codes by error feedback: alone with --iters 0, else as the start of tuning"),
        ("rtn", "yes", "round to nearest, by a weighted search of scales unless --disable_opt_rtn"),
    ]
    rows += [(name, "yes", "of a plugin") for name in registered]
    rows += [(name, "not yet", f"{feature.what}; {feature.instead}") for name, feature in ALGORITHMS.items()]
    return text_table(("algorithm", "here", "what"), rows)


def recipes() -> str:
    """Recipes and their settings."""
    from auto_round.recipes import RECIPES

    head = ("recipe", "command", "batch_size", "iters", "seqlen", "nsamples", "lr", "disable_opt_rtn", "for")
    rows = [[str(value) for value in vars(recipe).values()] for recipe in RECIPES.values()]
    return text_table(head, rows, width=160)


TABLES: dict[str, Callable[[], str]] = {
    "format": formats, "scheme": schemes, "dataset": datasets, "backend": backends, "env": environment,
    "recipe": recipes, "algorithm": algorithms,
}  # fmt: skip
