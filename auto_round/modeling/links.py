"""Symbolic links in a model folder: followed only to where they belong.

A folder from elsewhere may hold a link to any file of this machine, whose bytes would then be read as weights, or be
copied into the output beside them. A link may point inside its own folder, and in the hub's local cache from
`models--org--name/snapshots/REVISION` to `models--org--name/blobs`, which is how that cache stores every file.
"""

from __future__ import annotations

from pathlib import Path

from auto_round.errors import ModelError


def inside(folder: Path, file: Path) -> Path:
    """`file` itself. Raises ModelError when following its links leads out of `folder` and of its cache's blobs."""
    root, target = folder.resolve(), file.resolve()
    if root in target.parents:
        return file
    blobs = _blobs(root)
    if blobs is not None and blobs in target.parents:
        return file
    raise ModelError(
        f"{file} is a link to {target}, outside of the model's folder, and is not followed; put the file itself there, "
        "or give the folder that holds it"
    )


def _blobs(root: Path) -> Path | None:
    """Where the hub's cache keeps the files of the snapshot `root`, or None when it is no snapshot."""
    for parent in root.parents:
        if parent.name == "snapshots":
            return parent.parent / "blobs" if (parent.parent / "blobs").is_dir() else None
    return None
