"""`builtin`: the calibration text inside the package, for machines that reach no hub.

1.3 MB of public-domain English: reference, technical, fiction and scripture (see `data/SOURCES.md`), enough for 128
samples of 2048 tokens. Documents are about a thousand tokens long, so they are joined by default (`concat=True`).
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterator
from importlib import resources

from auto_round.calibration.registry import register_dataset
from auto_round.errors import DataError

BUILTIN = "builtin"
"""The name of the packaged text."""


HELD_OUT_EVERY = 16
"""Every sixteenth document is kept for measuring, so that each source has its share there too."""


def _held_out(index: int) -> bool:
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def held_out_documents() -> list[str]:
    """The documents that calibration never reads, about 20 thousand tokens. Raises DataError as `builtin_documents`."""
    return [d for i, d in enumerate(builtin_documents()) if _held_out(i)]


def builtin_documents() -> list[str]:
    """All documents of the packaged text, in the order of the file. Raises DataError when the file is not there."""
    file = resources.files("auto_round.calibration") / "data" / "builtin.txt.xz"
    try:
        text = lzma.decompress(file.read_bytes()).decode("utf-8")
    except (FileNotFoundError, lzma.LZMAError) as error:
        raise DataError(
            f"the packaged calibration text is missing or damaged ({error}); install auto-round again"
        ) from error
    return text.strip("\n").split("\n\n\n")


@register_dataset(
    BUILTIN,
    description="mixed public-domain English text, short documents joined",
    where="inside the package",
    concat=True,
)
def builtin(seed: int, split: str | None) -> Iterator[str]:
    """The packaged text's documents in an order that `seed` fixes. There is one split, `train`."""
    if split not in (None, "train"):
        raise DataError(f"dataset 'builtin' has no split {split!r}; leave split out")
    documents = [d for i, d in enumerate(builtin_documents()) if not _held_out(i)]
    random.Random(seed).shuffle(documents)
    yield from documents
