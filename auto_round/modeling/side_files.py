"""The files beside the weights of a checkpoint: which of them a quantized model takes along.

Everything is, whatever it is called, but: weights and their indexes, what an earlier quantization left, what training
left, hidden files, config.json and the model card (written anew), Python code of a model that is not trusted, and
folders that are models of their own or that a run of this package wrote or writes: people run it from within the
model's folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from auto_round import envs
from auto_round.modeling.links import inside

# Weights, and what training left beside them: anything that unpickles.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".ot", ".npz", ".tflite", ".mlpackage", ".mlmodel", ".distcp", ".pdparams", ".part", ".incomplete",
)  # fmt: skip
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_QUANTIZATION = (
    "quantization_config.json", "quantize_config.json", "hf_quant_config.json", "quant_config.json", "quant_log.csv",
    "recipe.yaml",
)  # fmt: skip
_WRITTEN = ("config.json", "readme.md", "report.json")
_MODELS = ("original", "onnx", "metal", "openvino", "coreml", "gguf", "ggml", "__pycache__")
_UNFINISHED, _REPORT = ".partial", "report.json"  # what marks an output folder, see `export.earlier_output`
_WORK_SPACE = "ar_work_space"  # where runs keep their journals unless AR_WORK_SPACE says otherwise
_CONFIGS = ("config.json", "adapter_config.json", "params.json", "model_index.json")

# The same for the clients of hubs, whose patterns match whole paths.
NOT_FETCHED = (
    *(f"*{ending}" for ending in (*_WEIGHTS, ".pyc", ".so", ".pyd", ".dll", ".dylib") if ending != ".safetensors"),
    *(f"{name}/*" for name in _MODELS), "*/.*",
)  # fmt: skip


def side_files(folder: Path, trusted: bool, without: Collection[Path] = ()) -> list[Path]:
    """Paths within `folder` of the files to take along, sorted.

    Args:
        folder: of a model.
        trusted: take its Python code along too.
        without: folders that are left alone, such as the output when it lies inside.

    Raises ModelError when one is a link that leads out of the folder.
    """
    root = folder.resolve()
    left = {path.expanduser().resolve() for path in (*without, envs.resume_folder(), envs.work_space())}
    return sorted(_found(folder, folder, trusted, left, (root,)))


def copy_side_files(folder: Path, target: Path, trusted: bool) -> list[Path]:
    """Copy them byte for byte to where they are not there yet. Returns their paths within both folders."""
    names = side_files(folder, trusted, without=(target, *target.parents))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return names


def _found(
    root: Path, folder: Path, trusted: bool, without: Collection[Path], above: tuple[Path, ...]
) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not _is_wanted(path.name, folder == root, trusted):
            continue
        real = path.resolve()
        if path.is_symlink() and path.exists() and real not in above:
            inside(root, path)
        if path.is_file():
            yield path.relative_to(root)
        elif path.is_dir():
            if real not in above and real not in without and not _is_model(path) and not _is_output(path):
                yield from _found(root, path, trusted, without, (*above, real))


def _is_wanted(name: str, top: bool, trusted: bool) -> bool:
    lower = name.lower()
    if lower.endswith(_WEIGHTS) or _INDEX.search(lower) or lower in _MODELS or lower == _WORK_SPACE:
        return False
    if lower.endswith(_CODE) and not (trusted and lower.endswith(".py")):
        return False
    return lower not in _QUANTIZATION and not (top and lower in _WRITTEN)


def _is_model(folder: Path) -> bool:
    """Whether a folder holds weights with a configuration of their own."""
    names = [path.name.lower() for path in folder.iterdir()]
    return any(name in _CONFIGS for name in names) and any(name.endswith(_WEIGHTS) for name in names)


def _is_output(folder: Path) -> bool:
    """Whether a run of this package wrote or began to write a folder. Those of GGUF files have no config.json."""
    if (folder / _UNFINISHED).is_dir():
        return True
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"schema_version", "format"} <= set(report)
