"""Every cell of the guide's table of formats and schemes is written, and passes the run's own check of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guide_matrix import GUIDE_MATRIX, formats_for_preset

SCHEMES = sorted(
    {s for f, schemes in GUIDE_MATRIX.items() for s in schemes if f != "fake" and not f.startswith("gguf")}
)
_ASYMMETRIC = ("W2A16", "W2A16G32", "W2A16G64", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16", "W4A16_MIXED")


@pytest.fixture
def wide(packable_folder: Callable[..., str]) -> str:
    """A llama whose widths every group size and block of the table divides."""
    return packable_folder("llama", hidden_size=128, intermediate_size=256)


def _write(folder: str, scheme: str, out: Path, token_ids: list[torch.Tensor], **options: Any) -> None:
    from auto_round import AutoRound

    formats = [name for name in formats_for_preset(scheme) if not name.startswith("gguf")]
    if scheme == "BF16":  # for some layers beside quantized ones
        scheme, options = "W4A16", {"layer_config": {"model.layers.1.mlp": "BF16"}}
    ar = AutoRound(
        folder, scheme=scheme, iters=0, disable_opt_rtn=True, dataset=token_ids, nsamples=4, seqlen=24, **options
    )
    _, folders = ar.quantize_and_save(out, format=",".join(formats))
    assert len(folders) == len(formats) > 1
    for written in folders:
        assert (Path(written) / "config.json").is_file() and list(Path(written).glob("*.safetensors"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cell(scheme: str, wide: str, token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    _write(wide, scheme, tmp_path / "out", token_ids)


@pytest.mark.parametrize("scheme", _ASYMMETRIC)
def test_every_asymmetric_cell(scheme: str, wide: str, token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    _write(wide, scheme, tmp_path / "out", token_ids, sym=False)
