"""Model-free runs on tiny checkpoints, and the regular runs that they have to equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from auto_round.errors import OutputError
from auto_round.run.model_free.unit_processor import UnitProcessor


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's weight files."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}
    return found


@pytest.fixture(scope="session")
def same_tensors() -> Callable[[Path, Path], None]:
    """`same_tensors(a, b)`: names, dtypes, shapes and every byte."""

    def check(one: Path, other: Path) -> None:
        a, b = read_tensors(one), read_tensors(other)
        assert set(a) == set(b)
        for name in a:
            assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
            raw = [t[name].contiguous().view(-1).view(torch.uint8) for t in (a, b) if t[name].numel()]
            assert not raw or torch.equal(*raw), name

    return check


@pytest.fixture(scope="session")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`resharded(folder, count)`: a copy whose tensors lie in `count` files in turns, with an index."""

    def make(folder: str | Path, count: int) -> Path:
        root = tmp_path_factory.mktemp("resharded")
        for file in Path(folder).iterdir():
            if not file.name.startswith("model"):
                (root / file.name).write_bytes(file.read_bytes())
        tensors = read_tensors(Path(folder))
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        place = {name: names[i * count // len(tensors)] for i, name in enumerate(sorted(tensors))}
        for file in names:
            own = {name: tensor.clone() for name, tensor in tensors.items() if place[name] == file}
            save_file(own, root / file, {"format": "pt"})
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
        return root

    return make


@pytest.fixture
def free(tmp_path: Path) -> Callable[..., Path]:
    """`free(model, name="free", format="auto_round", **kwargs)`: a model-free run; returns its folder."""
    from auto_round import AutoRound

    def run(
        model: Any, name: str = "free", format: str = "auto_round", overwrite: bool = False,
        max_shard_size: int | str = "5GB", **kwargs: Any,
    ) -> Path:  # fmt: skip
        job = AutoRound(str(model), model_free=True, device_map="cpu", **kwargs)
        job.quantize_and_save(tmp_path / name, format=format, overwrite=overwrite, max_shard_size=max_shard_size)
        return tmp_path / name

    return run


@pytest.fixture
def check_fails() -> Callable[[str], AbstractContextManager[None]]:
    """`with check_fails(message):` all files are made, and the check ends the run with that OutputError."""

    @contextmanager
    def failing(message: str) -> Iterator[None]:
        def fail(*_: Any) -> None:
            raise OutputError(message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnitProcessor, "check_samples", fail)
            yield

    return failing
