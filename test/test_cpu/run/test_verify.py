"""The check after saving finds faults that were planted in the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import VerifyError
from auto_round.run import folder_output
from auto_round.run.folder_output import FolderWriter, verify_folder
from auto_round.run.writers import OutputContext

Tensors = dict[str, torch.Tensor]
Expected = tuple[FolderWriter, OutputContext]
FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def missing(t: Tensors) -> None:
    del t[f"{FIRST}.scales"]


def missing_norm(t: Tensors) -> None:
    del t["model.norm.weight"]


def unplanned(t: Tensors) -> None:
    t["model.layers.0.extra"] = torch.zeros(2)


def swapped(t: Tensors) -> None:
    for leaf in ("qweight", "qzeros", "scales"):
        t[f"{FIRST}.{leaf}"], t[f"{SECOND}.{leaf}"] = t[f"{SECOND}.{leaf}"], t[f"{FIRST}.{leaf}"]


def duplicated(t: Tensors) -> None:
    for leaf in ("qweight", "qzeros", "scales"):
        t[f"{SECOND}.{leaf}"] = t[f"{FIRST}.{leaf}"].clone()


def zeroed_codes(t: Tensors) -> None:
    t[f"{SECOND}.qweight"].zero_()


def zeroed_scales(t: Tensors) -> None:
    t[f"{SECOND}.scales"].zero_()


def one_bit(t: Tensors) -> None:
    t["model.layers.1.mlp.down_proj.qweight"][3, 5] ^= 1 << 9


def zero_point_up(t: Tensors) -> None:
    t[f"{FIRST}.qzeros"] += 0x11111111


def zero_point_down(t: Tensors) -> None:
    t[f"{FIRST}.qzeros"] -= 0x11111111


def wider_scales(t: Tensors) -> None:
    t[f"{FIRST}.scales"] = t[f"{FIRST}.scales"].float()


def other_shape(t: Tensors) -> None:
    t[f"{FIRST}.scales"] = t[f"{FIRST}.scales"].reshape(-1)


def swapped_norms(t: Tensors) -> None:
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    t[a], t[b] = t[b], t[a]


def zeroed_embedding_row(t: Tensors) -> None:
    t["model.embed_tokens.weight"][200].zero_()


def head_in_half(t: Tensors) -> None:
    t["lm_head.weight"] = t["lm_head.weight"].half()


FAULTS = [
    missing, missing_norm, unplanned, swapped, duplicated, zeroed_codes, zeroed_scales, one_bit, zero_point_up,
    zero_point_down, wider_scales, other_shape, swapped_norms, zeroed_embedding_row, head_in_half,
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(
    packable_folder: Callable[..., str], token_ids: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Expected]]]:
    """A packed symmetric, a packed asymmetric and a dense checkpoint, and the expected contents of each."""
    from auto_round import AutoRound

    found: dict[str, tuple[Path, Expected]] = {}

    def record(folder: Path, *expected: Any) -> dict[str, Any]:
        place = folder.parent  # it is checked before it is shown
        found[key if place.name == "auto-round" else "fake"] = (place, expected)
        return verify_folder(folder, *expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_output, "verify_folder", record)
        for key, sym in (("asym", False), ("sym", True)):
            ar = AutoRound(packable_folder("llama"), group_size=32, sym=sym, iters=0, dataset=token_ids, seqlen=24)
            ar.quantize_and_save(tmp_path_factory.mktemp(key) / "out", "auto_round,fake")
    yield found


def with_loss(made: OutputContext, more: float) -> OutputContext:
    assert made.finished.loss is not None
    return replace(made, finished=replace(made.finished, loss=made.finished.loss + more))


def plant(folder: Path, copy: Path, fault: Callable[[Tensors], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fault(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", ["sym", "asym", "fake"])
def test_what_was_written_passes(kind: str, saved: Any, tmp_path: Path) -> None:
    folder, expected = saved[kind]
    result = verify_folder(plant(folder, tmp_path / "copy", lambda tensors: None), *expected)
    assert result["passed"] and result["layers"] == 14
    assert result["loss_reopened"] == pytest.approx(result["loss_in_memory"], rel=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_a_planted_fault_is_found(kind: str, fault: Any, saved: Any, tmp_path: Path) -> None:
    folder, expected = saved[kind]
    with pytest.raises(VerifyError, match="layers.0|layers.1|norm|embed_tokens|lm_head"):
        verify_folder(plant(folder, tmp_path / "copy", fault), *expected)


def test_faults_in_dense_files(saved: Any, tmp_path: Path) -> None:
    folder, expected = saved["fake"]

    def swap(t: Tensors) -> None:
        t[f"{FIRST}.weight"], t[f"{SECOND}.weight"] = t[f"{SECOND}.weight"], t[f"{FIRST}.weight"]

    def nudge(t: Tensors) -> None:
        t[f"{FIRST}.weight"][0, 0] += 1e-3

    for number, fault in enumerate((swap, nudge)):
        with pytest.raises(VerifyError, match="layers.0.self_attn.q_proj"):
            verify_folder(plant(folder, tmp_path / str(number), fault), *expected)


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"group_size": 16}, {"packing_format": "auto_round"}, {"extra_config": {FIRST: {"bits": 16}}}],
)
def test_a_config_that_does_not_fit_the_files_is_found(change: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    folder, expected = saved["sym"]
    copy = plant(folder, tmp_path / "copy", lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError):
        verify_folder(copy, *expected)


def test_a_cut_file_is_found(saved: Any, tmp_path: Path) -> None:
    folder, expected = saved["sym"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(VerifyError, match="does not open"):
        verify_folder(copy, *expected)


def test_another_loss_is_found(saved: Any) -> None:
    folder, (output, made) = saved["sym"]
    with pytest.raises(VerifyError, match="loss on the smoke sample"):
        verify_folder(folder, output, with_loss(made, 0.1))


def test_dense_weights_rounded_to_a_half_dtype_have_another_loss(
    packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format fake stores what was tuned in the model's dtype; that is not an error of the files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round import AutoRound

    source = packable_folder("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "half")
    seen: dict[str, Expected] = {}

    def further(folder: Path, output: FolderWriter, made: OutputContext) -> dict[str, Any]:
        seen[folder.parent.name] = output, made
        return verify_folder(folder, output, with_loss(made, 0.01))

    monkeypatch.setattr(folder_output, "verify_folder", further)
    ar = AutoRound(str(tmp_path / "half"), group_size=32, iters=0, dataset=token_ids, seqlen=24)
    ar.quantize_and_save(tmp_path / "out" / "fake", "fake")
    output, made = seen["fake"]
    assert output.format.casts_to_model_dtype and made.finished.state.dtype == torch.float32
    with pytest.raises(VerifyError, match="loss on the smoke sample"):
        ar.quantize_and_save(tmp_path / "out" / "packed", "auto_round")


def test_a_run_that_writes_wrong_tensors_fails(make: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    from auto_round.formats.config_auto_round import AutoRoundFormat

    right = AutoRoundFormat.pack

    def wrong(self: Any, layer: Any, **kwargs: Any) -> Tensors:
        tensors = right(self, layer, **kwargs)
        if layer.name == FIRST:
            tensors[f"{FIRST}.qweight"] ^= 1
        return tensors

    monkeypatch.setattr(AutoRoundFormat, "pack", wrong)
    with pytest.raises(VerifyError, match=FIRST):
        make("llama", iters=0).quantize_and_save(tmp_path / "out")
    make("llama", iters=0, verify=False).quantize_and_save(tmp_path / "unchecked")
