"""List phrases that this project does not use, with the words to use instead; exit with status 1 if there are any.

Looks at the docstrings, comments and string literals of auto_round/, at the pages of docs/ (except the ADRs, which are
history) and at README.md. `make lint` runs it. Usage: python tools/language.py [ROOT]
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# A regular expression, in which a space stands for any white space, and the words to use instead.
FORBIDDEN = (
    (r"(go|goes|going|gone|went) on", "resume, continue"),
    (r"of before", "previous, earlier"),
    (r"as (it|they) (is|are|was|were)", "unchanged, as stored"),
    (r"nowhere", "not ... anywhere, no file"),
    (r"rooms?", "memory, buffer, package"),
    (r"what is to be", "name the thing itself"),
    (r"walk(s|ed|ing)?", "iterate, traverse, quantize the blocks"),
    (r"stand-ins?", "replacement"),
    (r"told", "given, stated"),
    (r"banks?", "parameters, group"),
    (r"stay(s|ed|ing)? dense", "is left unquantized, stays unquantized"),
    (r"judg(e|es|ed|ing|ements?)", "compare, measure, decide"),
    (r"prob(es?|ed|ing)", "smoke sample, held-out sample"),
    (r"one after the other", "in order, sequentially"),
    (r"hand(s|ed|ing)? out", "return, assign"),
)
_PATTERNS = tuple(
    (re.compile(rf"\b{phrase}\b".replace(" ", r"\s+"), re.IGNORECASE), instead) for phrase, instead in FORBIDDEN
)
_LINK_TARGET = re.compile(r"\]\([^)]*\)")


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """`(first line, text)` of each string literal and of each run of comments in Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if comments and token.start[0] != last + 1:
            yield last - len(comments) + 1, "\n".join(comments)
            comments = []
        comments.append(token.string.lstrip("#"))
        last = token.start[0]
    if comments:
        yield last - len(comments) + 1, "\n".join(comments)


def violations(text: str, first_line: int = 1) -> Iterator[tuple[int, str, str]]:
    """`(line, phrase, words to use instead)` of each forbidden phrase in `text`."""
    for pattern, instead in _PATTERNS:
        for match in pattern.finditer(text):
            yield first_line + text.count("\n", 0, match.start()), " ".join(match[0].split()), instead


def check(root: Path) -> list[str]:
    """One line `file:line: ...` for each forbidden phrase under `root`, sorted."""
    found: list[tuple[str, int, str]] = []

    def report(path: Path, text: str, first_line: int) -> None:
        name = path.relative_to(root).as_posix()
        for line, phrase, instead in violations(text, first_line):
            found.append((name, line, f'{name}:{line}: "{phrase}"; use: {instead}'))

    for path in (root / "auto_round").rglob("*.py"):
        for line, text in python_texts(path.read_text(encoding="utf-8")):
            report(path, text, line)
    for path in (root / "README.md", *(root / "docs").glob("*.md")):
        report(path, _LINK_TARGET.sub("]()", path.read_text(encoding="utf-8")), 1)
    return [message for _, _, message in sorted(set(found))]


def main(arguments: list[str]) -> int:
    """Print the forbidden phrases of the project (or of the folder that is given). Returns the exit status."""
    problems = check(Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1])
    print("\n".join(problems) if problems else "no forbidden phrase")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
