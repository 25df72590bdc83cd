"""Every family of Transformers: quantized in a short run, named as in the source, opened again, near the model.

What docs/families.md tells of each family is the slow test here; the fast one tunes for one step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import buildable, known_families
from family_checks import (
    OK,
    REFUSED,
    Quantized,
    check_family,
    logits,
    options,
    read_folder,
    relative,
    reopen,
    specs_of,
    wrong_names,
    wrong_plans,
)

from auto_round import AutoRound
from auto_round.errors import ModelError, UnsupportedError


def test_every_family_is_built_or_has_a_reason() -> None:
    families = known_families()
    assert len(families) > 150
    assert all(family.reason is None or family.reason for family in families.values())


@pytest.mark.parametrize("name", buildable())
def test_a_family(name: str, tmp_path: Path) -> None:
    family = known_families()[name]
    model = family.build()
    model.save_pretrained(tmp_path / "source")
    columns, words = REFUSED.get(name, ((), ""))
    one_step = options(iters=1, nsamples=2)
    if "tuned" in columns:
        with pytest.raises((ModelError, UnsupportedError), match=words):
            AutoRound(str(tmp_path / "source"), **one_step).quantize_and_save(tmp_path / "refused")
        one_step |= {"iters": 0, "disable_opt_rtn": True}
        if "model-free" in columns:
            return
        if "RTN" in columns:
            one_step = options(iters=0, model_free=True)
    made = AutoRound(str(tmp_path / "source"), **one_step)
    assert wrong_plans(made, specs_of(read_folder(tmp_path / "source")), ["fake"]) == []
    quantized = Quantized.of(made)
    made.quantize_and_save(tmp_path / "out", format="auto_round")
    assert wrong_names(tmp_path / "source", tmp_path / "out", quantized) == []
    found = logits(reopen(tmp_path / "out"))
    assert torch.isfinite(found).all()
    assert relative(found, logits(model)) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", buildable())
def test_a_family_in_every_way(name: str, tmp_path: Path) -> None:
    columns, words = REFUSED.get(name, ((), ""))
    for column, said in check_family(known_families()[name], tmp_path).items():
        if column in columns:
            assert said.startswith("refused: ") and words in said
        elif "model-free" not in columns:
            assert said == OK or column == "logits" and float(said) < 1e-3, f"{column}: {said}"
