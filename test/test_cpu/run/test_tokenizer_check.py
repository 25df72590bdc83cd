"""The processor of a written folder is compared with the source's: a tiny one for sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from auto_round.errors import VerifyError
from auto_round.output.verify import check_tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A source with a tokenizer and a feature extractor, and a copy."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapFeatureExtractor, ClapProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1, "fox": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ClapProcessor(ClapFeatureExtractor(feature_size=4), tokenizer).save_pretrained(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "out")
    return tmp_path / "source", tmp_path / "out"


def processor_file(folder: Path) -> Path:
    return next(f for f in (folder / "processor_config.json", folder / "preprocessor_config.json") if f.is_file())


def test_the_same_passes(folders: tuple[Path, Path]) -> None:
    assert check_tokenizer(folders[1], folders[0], None, trusted=False)


@pytest.mark.parametrize("how", ["setting", "removed", "broken"])
def test_another_processor_is_an_error(folders: tuple[Path, Path], how: str) -> None:
    file = processor_file(folders[1])
    if how == "setting":
        text = file.read_text()
        assert '"feature_size": 4' in text
        file.write_text(text.replace('"feature_size": 4', '"feature_size": 5'))
    elif how == "removed":
        file.unlink()
    else:
        file.write_text("{")
    with pytest.raises(VerifyError, match="processor is not the source's|AutoProcessor opens, and its own does not"):
        check_tokenizer(folders[1], folders[0], None, trusted=False)


def test_a_processor_that_does_not_open_here_is_not_compared(folders: tuple[Path, Path]) -> None:
    """Its packages may be missing: the tokenizer is compared all the same."""
    for folder in folders:
        file = processor_file(folder)
        file.write_text(json.dumps({"processor_class": "NoSuchProcessor"}))
    assert check_tokenizer(folders[1], folders[0], None, trusted=False)
