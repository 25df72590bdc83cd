"""Every family of Transformers: quantized in a short run, named as in the source, opened again, near the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import buildable, known_families
from family_checks import logits, options, quantize, relative, reopen, wrong_names

from auto_round import AutoRound
from auto_round.errors import ModelError, UnsupportedError

# What tuning refuses, and in which words.
REFUSED: dict[str, str] = {
    "blt": "several stacks of the same blocks",
    "dory": "in a cycle",
    "hrm_text": "several stacks of the same blocks",
}
ROUNDED = [name for name in buildable() if name not in ("blt", "hrm_text")]


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = known_families()[name].save(tmp_path_factory.mktemp(name.replace(":", "-")))
        return made[name]

    return folder


def test_every_family_is_built_or_has_a_reason() -> None:
    families = known_families()
    assert len(families) > 150
    assert all(family.reason is None or family.reason for family in families.values())


@pytest.mark.parametrize("name", buildable())
def test_planning_works(name: str, family_folder: Any) -> None:
    if name in ("blt", "hrm_text"):
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            AutoRound(str(family_folder(name)), **options())
        return
    job = AutoRound(str(family_folder(name)), **options()).plan()
    assert job.quantized() and job.render()


@pytest.mark.parametrize("name", buildable())
def test_a_tuned_family(name: str, family_folder: Any, tmp_path: Path) -> None:
    source = family_folder(name)
    if name in REFUSED:
        with pytest.raises((ModelError, UnsupportedError), match=REFUSED[name]):
            quantize(source, tmp_path / "out")
        return
    out = quantize(source, tmp_path / "out")
    assert wrong_names(source, out) == []
    found = logits(reopen(out))
    assert torch.isfinite(found).all()
    assert relative(found, logits(known_families()[name].build())) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_family(name: str, family_folder: Any, tmp_path: Path) -> None:
    rounding = options(iters=0, disable_opt_rtn=True)
    out = quantize(family_folder(name), tmp_path / "out", iters=0, disable_opt_rtn=True)
    assert wrong_names(family_folder(name), out) == []
    live, _ = AutoRound(known_families()[name].build(), **rounding).quantize()
    assert torch.allclose(logits(reopen(out)), logits(live), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_a_family_without_a_model(name: str, family_folder: Any, tmp_path: Path) -> None:
    try:
        out = quantize(family_folder(name), tmp_path / "out", iters=0, model_free=True)
    except UnsupportedError as error:
        assert "model-free mode cannot read" in str(error)
        return
    assert wrong_names(family_folder(name), out) == []
    assert torch.isfinite(logits(reopen(out))).all()
