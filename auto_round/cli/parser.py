"""Parse command-line arguments into a dictionary of the given values. Errors are raised; nothing exits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from auto_round.cli.arguments import Flag, Group, spellings
from auto_round.errors import ConfigError, nearest
from auto_round.later import REFUSED, VALUES, is_default_value, refuse
from auto_round.logger import logger
from auto_round.plugins import load_plugins

# Flags of older scripts that have no effect: whether a value follows, and why.
NO_OP_FLAGS: dict[str, tuple[bool, str]] = {
    "mllm": (False, "the kind of a model is found from its files"),
    "seed": (True, "this command makes no random choice"),
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a usage error, instead of printing it and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _SwitchAction(argparse.Action):
    """A flag without a value that raises ConfigError when its opposite was given too."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any = None, **kw: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, default=None, **kw)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        if before is not None and before != self.const:
            raise ConfigError(
                f"{option_string} contradicts another flag that sets {self.dest} to {before}; give one of them"
            )
        setattr(namespace, self.dest, self.const)


def group_size(text: str) -> int | tuple[int, int]:
    """The group size in `128` or `128,64`."""
    try:
        numbers = [int(part) for part in text.strip("()[] ").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a group size; use one whole number, or two as ROWS,COLUMNS")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "size": group_size, "list": str}


def build(
    prog: str, usage: str, description: str, groups: tuple[Group, ...], epilog: str = ""
) -> argparse.ArgumentParser:
    """An argparse parser with one titled section per group; a value of None means "not given"."""
    parser = Parser(
        prog=prog, usage=usage, description=description, epilog=epilog, add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for group in groups:
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            help_text = argparse.SUPPRESS if flag.hidden else flag.help.replace("%", "%%")
            names = [f"--{name}" for name in (flag.dest, *flag.aliases)]
            if flag.kind == "switch":
                section.add_argument(*names, dest=flag.dest, action=_SwitchAction, const=True, help=help_text)
                if flag.off:
                    opposite = [f"--{name}" for name in flag.off]
                    help_text = f"the opposite of --{flag.dest}"
                    section.add_argument(*opposite, dest=flag.dest, action=_SwitchAction, const=False, help=help_text)
            else:
                section.add_argument(
                    *names, dest=flag.dest, action="append" if flag.kind == "list" else "store",
                    type=_TYPES[flag.kind], metavar=flag.metavar or flag.dest.upper(), choices=flag.choices or None,
                    help=help_text,
                )  # fmt: skip
    other = parser.add_argument_group("other")
    other.add_argument("-h", "--help", action="store_true", help="show this text")
    other.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("positional", nargs="*", help=argparse.SUPPRESS)
    return parser


def run_parsed(
    parser: argparse.ArgumentParser, groups: tuple[Group, ...], argv: Sequence[str],
    run: Callable[[dict[str, Any]], int],
) -> int:  # fmt: skip
    """Print the help, or load the plugins and call `run` with the other values of `parse`. Returns the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(parser.format_help())
        return 0 if argv else ConfigError.exit_code
    values = parse(parser, groups, argv)
    load_plugins(values.pop("plugins", ()))
    return run(values)


def parse(parser: argparse.ArgumentParser, groups: tuple[Group, ...], argv: Sequence[str]) -> dict[str, Any]:
    """The given values by `dest`; flags that were not given are absent.

    Raises UnsupportedError for a flag of a missing feature, ConfigError for an unknown or malformed one, for two
    models, and for contradictions.
    """
    tokens = [
        f"--{name[2:].replace('-', '_').lower()}{equals}{value}" if name.startswith("--") else name + equals + value
        for name, equals, value in (token.partition("=") for token in argv)
    ]  # flags in lower case with underscores
    namespace = vars(parser.parse_intermixed_args(check_flags(tokens, spellings(groups))))
    models = namespace.pop("positional", [])
    values = {k: v for k, v in namespace.items() if v is not None and k not in ("help", "version")}
    if len(models) > 1:
        raise ConfigError(
            f"more than one model was given without a flag: {', '.join(map(repr, models))}; "
            "give one, and quote values with spaces"
        )
    if models:
        if "model" in values and values["model"] != models[0]:
            raise ConfigError(f"two models were given, {values['model']!r} and {models[0]!r}; give one")
        values["model"] = models[0]
    return values


def check_flags(tokens: Sequence[str], known: dict[str, Flag]) -> list[str]:
    """The tokens without flags that have no effect: those that leave a missing feature off (`--nblocks 1`), and
    `NO_OP_FLAGS`, with a warning. Raises ConfigError for an unknown flag, UnsupportedError for a missing feature's."""
    out: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*out, token, *rest]
        is_value = not token.startswith("-") or _as_number(token.partition(",")[0]) is not None
        if is_value or token in ("-h", "--help", "--version"):
            out.append(token)
            continue
        name, sep, value = token.lstrip("-").partition("=")
        follows = rest[0] if rest and not rest[0].startswith("--") else None
        given = value if sep else follows
        flag = name if token.startswith("--") else ""
        takes_value, reason = NO_OP_FLAGS.get(flag, (False, ""))
        if flag in known:
            refuse(VALUES.get((name, (given or "").strip().lower())), f"--{name} {given}")
            out.append(token)
        elif reason:
            logger.warning("--%s has no effect: %s", name, reason)
            if takes_value and not sep and follows is not None:
                rest.pop(0)
        elif flag.startswith("no_") and flag[3:] in REFUSED:
            continue
        elif flag in REFUSED and given is not None and is_default_value(flag, _as_number(given) or given):
            if not sep:
                rest.pop(0)
        else:
            refuse(None if name in known else REFUSED.get(name), f"--{name}")
            shown = token.partition("=")[0]
            raise ConfigError(
                f"unknown flag {shown!r}{nearest(shown, [f'--{k}' for k in known])} See --help for all flags"
            )
    return out


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
