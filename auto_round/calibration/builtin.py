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
    documents = builtin_documents()
    random.Random(seed).shuffle(documents)
    yield from documents
