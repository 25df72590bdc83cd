"""Rebuild `auto_round/calibration/data/builtin.txt.xz`, the calibration text that ships with the package.

    python tools/make_builtin_text.py path/to/calib.txt [--out FILE]

`calib.txt` is a mix of documents separated by two blank lines, from six sources. Five are in the public domain; the
sixth (PostgreSQL documentation) has a licence of its own and must not be shipped. A document is taken only when it
can be told with confidence which public-domain source it comes from, so what is unclear is left out. The result
depends on the text alone: no clock, no random numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import sys
from collections import Counter
from pathlib import Path

# Bytes wanted from each source. Reference and technical prose weigh more than fiction and scripture, because they
# are closer to what language models read; technical text carries the numbers, lists and code.
BUDGET = {"factbook": 400_000, "sqlite": 400_000, "austen": 300_000, "bible": 100_000, "commentary": 100_000}

# Any one of these words sends a document out, whatever else it holds.
_EXCLUDED = re.compile(
    r"postgres|\bpg_|psql|\blibpq|\bpl/?(pgsql|perl|python|tcl)|ecpg|pgbench|initdb|tablespace|\bSPI_|\btuple|\boracle\b"
    r"|\bMVCC\b|\bGUC\b|\bdatum\b|logical replication|\bpublication",
    re.IGNORECASE,
)
_TECHNICAL = re.compile(
    r"\b(SQL|queries|query|database|columns?|index(es)?|functions?|server|transactions?|parameter|boolean|integer|syntax"
    r"|schema|file system|compile|SELECT|CREATE TABLE)\b"
)
_AUSTEN = re.compile(
    r"\b(Elinor|Marianne|Willoughby|Dashwood|Brandon|Ferrars|Jennings|Elizabeth|Darcy|Bingley|Bennet|Wickham|Collins"
    r"|Lydia|Fanny|Edmund|Crawford|Bertram|Norris|Rushworth|Wentworth|Elliot|Musgrove|Catherine|Tilney|Thorpe"
    r"|Isabella|Morland|Sir Walter|Lady Russell)\b"
)
_FACTBOOK = re.compile(
    r"\d est\.\)|\bnote ?\d?:|\((19|20)\d\d\)|\bpercent\b|% of|\bUS\b|\bcountry\b|\bindependence\b|\bgovernment"
)
_SCRIPTURE = re.compile(r"\b(Yahweh|God|Lord|Jesus|Israel|Judah|Jerusalem|king|sons? of|you shall|says)\b")
_YEAR = re.compile(r"\b(1[5-9]|20)\d\d\b")
# Tables of links and of requirement numbers are no prose.
_TABLE = re.compile(r"→|\bR-\d{5}-\d{5}|\.html\b")


def source_of(document: str) -> str | None:
    """The public-domain source of a document ("factbook", "sqlite", ...), or None when it is not certain."""
    thousands = len(document) / 1000
    if _EXCLUDED.search(document) or len(_TABLE.findall(document)) > 2 * thousands:
        return None
    technical = len(_TECHNICAL.findall(document))
    if len(re.findall("sqlite", document, re.IGNORECASE)) >= 4:
        return "sqlite"
    if technical < 3 and re.search(r"^Verses? \d+", document, re.MULTILINE):
        return "commentary"
    if technical < 2:
        if len(_AUSTEN.findall(document)) >= thousands and not re.search(r"\d{3}|sqlite", document):
            return "austen"
        if len(_SCRIPTURE.findall(document)) >= 2.5 * thousands and not _YEAR.search(document):
            return "bible"
    if technical <= 6 and len(_FACTBOOK.findall(document)) >= 1.5 * thousands and '"' not in document[:2]:
        return "factbook"
    return None


def select(text: str) -> list[tuple[str, str]]:
    """`(source, document)` pairs up to each source's budget, in an order that mixes the sources."""
    documents = sorted(
        {d.strip() for d in text.split("\n\n\n") if d.strip()},
        key=lambda d: hashlib.sha256(d.encode()).hexdigest(),
    )
    taken: Counter[str] = Counter()
    chosen: list[tuple[str, str]] = []
    for document in documents:
        source = source_of(document)
        size = len(document.encode())
        if source is not None and taken[source] + size <= BUDGET[source]:
            taken[source] += size
            chosen.append((source, document))
    return chosen


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Rebuild the calibration text that ships with the package.")
    parser.add_argument("calib", type=Path, help="text with documents separated by two blank lines")
    default = Path(__file__).resolve().parent.parent / "auto_round" / "calibration" / "data" / "builtin.txt.xz"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    chosen = select(args.calib.read_text(encoding="utf-8"))
    sizes: Counter[str] = Counter()
    for source, document in chosen:
        sizes[source] += len(document.encode())
    short = [s for s, wanted in BUDGET.items() if sizes[s] < 0.9 * wanted]
    if short:
        print(f"too little text found for: {', '.join(short)}", file=sys.stderr)
        return 1
    data = "\n\n\n".join(document for _, document in chosen).encode() + b"\n"
    args.out.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    for source, size in sorted(sizes.items()):
        print(f"{source:12} {size:9,} bytes, {sum(s == source for s, _ in chosen)} documents")
    print(f"{'all':12} {len(data):9,} bytes, {args.out.stat().st_size:,} compressed, sha256 of the text")
    print(hashlib.sha256(data).hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
