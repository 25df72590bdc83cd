"""What saving returns: the packed model, opened when it is used, and the folder."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from auto_round import AutoRound
from auto_round.errors import ConfigError, ModelError
from auto_round.inference.linear import PackedLinear
from auto_round.run import results as saved_model
from auto_round.run.results import SavedModel

RTN: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "seqlen": 24, "nsamples": 8}
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def ar(packable_folder: Callable[..., str], token_ids: list[torch.Tensor]) -> AutoRound:
    return AutoRound(packable_folder("llama"), dataset=token_ids, **RTN)


@pytest.fixture
def of_object(packable_model: Any, token_ids: list[torch.Tensor]) -> Callable[..., tuple[AutoRound, torch.nn.Module]]:
    def make(**given: Any) -> tuple[AutoRound, torch.nn.Module]:
        model = packable_model("llama")
        return AutoRound(model, dataset=token_ids, **{**RTN, **given}), model

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that were opened."""
    folders: list[str] = []
    real = saved_model.open_saved

    def watched(folder: str, *rest: Any) -> torch.nn.Module:
        folders.append(folder)
        return real(folder, *rest)

    monkeypatch.setattr(saved_model, "open_saved", watched)
    return folders


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def packed(model: torch.nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def test_it_is_opened_when_it_is_used_and_not_before(ar: AutoRound, opened: list[str], tmp_path: Path) -> None:
    model, folder = ar.quantize_and_save(tmp_path / "out")
    assert folder == str(tmp_path / "out")
    assert isinstance(model, torch.nn.Module) and ar.model is model
    assert str(tmp_path / "out") in repr(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert type(other) is SavedModel
    assert bool(model) and hash(model) and model == model and not opened
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    assert torch.equal(logits(model), wanted)
    assert opened == [folder]
    assert isinstance(model, LlamaForCausalLM) and packed(model) == 14 and not model.training


USES: dict[str, Callable[[Any], Any]] = {
    "call": lambda m: m(IDS).logits, "generate": lambda m: m.generate(IDS, max_new_tokens=2, do_sample=False),
    "state_dict": lambda m: m.state_dict()["lm_head.weight"], "named_modules": lambda m: len(list(m.named_modules())),
    "parameters": lambda m: next(iter(m.parameters())), "eval": lambda m: m.eval(), "to": lambda m: m.to("cpu"),
    "config": lambda m: m.config.vocab_size, "submodule": lambda m: m.model.layers[0], "dtype": lambda m: m.dtype,
    "set": lambda m: setattr(m, "mine", 1), "dir": lambda m: dir(m), "hook": lambda m: m.register_forward_hook(print),
    "train": lambda m: m.train(False), "requires_grad_": lambda m: m.requires_grad_(False),
    "apply": lambda m: m.apply(lambda _: None), "device": lambda m: m.device,
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_opens_it_once(use: str, ar: AutoRound, opened: list[str], tmp_path: Path) -> None:
    model, _ = ar.quantize_and_save(tmp_path / "out")
    USES[use](model)
    USES[use](model)
    assert len(opened) == 1 and isinstance(model, LlamaForCausalLM)


@pytest.mark.parametrize("more", [{}, {"model_free": True, "iters": None, "disable_opt_rtn": None}], ids=["", "free"])
def test_several_formats_give_a_list(
    more: dict[str, Any], packable_folder: Callable[..., str], opened: list[str], tmp_path: Path
) -> None:
    ar = AutoRound(packable_folder("llama"), **{**RTN, **more})
    model, folders = ar.quantize_and_save(tmp_path / "out", "auto_gptq,fake")
    assert folders == [str(tmp_path / "out" / name) for name in ("auto-gptq", "fake")]
    assert torch.isfinite(logits(model)).all() and opened == [folders[-1]] and ar.model is model


def test_a_gguf_file_is_opened_too(gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    model, folder = AutoRound(gguf_folder("llama"), iters=0, disable_opt_rtn=True).quantize_and_save(
        tmp_path / "out", "gguf:q8_0"
    )
    assert folder == str(tmp_path / "out") and torch.isfinite(logits(model)).all()


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be opened with Transformers"):
        SavedModel(str(tmp_path)).eval()


def test_save_quantized_returns_what_it_made(ar: AutoRound, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="call quantize"):
        ar.save_quantized(tmp_path / "out")
    quantized, _ = ar.quantize()
    assert ar.save_quantized(tmp_path / "one") is quantized is ar.model and packed(quantized)
    assert ar.save_quantized(tmp_path / "two", return_folders=True) == (quantized, str(tmp_path / "two"))
    model, folders = ar.save_quantized(str(tmp_path / "three"), "auto_round,fake", False, True)
    assert folders == [str(tmp_path / "three" / name) for name in ("auto-round", "fake")]


@pytest.mark.parametrize("save", ["save_quantized", "quantize_and_save"])
def test_arguments_that_saving_does_not_have(save: str, ar: AutoRound, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safe_serialization=False is not supported: it writes pickles"):
        getattr(ar, save)(tmp_path / "out", safe_serialization=False)
    with pytest.raises(ConfigError, match="unknown argument 'in_place' of saving; did you mean 'inplace'"):
        getattr(ar, save)(tmp_path / "out", in_place=True)
    assert not (tmp_path / "out").exists()


def test_an_object_ends_with_packed_layers(of_object: Any, tmp_path: Path) -> None:
    ar, own = of_object()
    model, folder = ar.quantize_and_save(tmp_path / "out", inplace=True)
    assert model is own is ar.model and packed(own) == 14
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    assert torch.allclose(logits(own), wanted, atol=1e-4)


@pytest.mark.parametrize("formats", ["fake", "auto_round,auto_gptq"])
def test_an_object_without_packed_layers_holds_rounded_weights(formats: str, of_object: Any, tmp_path: Path) -> None:
    ar, own = of_object()
    before = logits(own)
    model, _ = ar.quantize_and_save(tmp_path / "out", formats)
    assert model is own and not packed(own) and not torch.equal(logits(own), before)


def test_not_in_place_leaves_the_object_as_it_was(of_object: Any, opened: list[str], tmp_path: Path) -> None:
    ar, own = of_object()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    model, folder = ar.quantize_and_save(tmp_path / "out", inplace=False)
    after = own.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not opened and packed(model) == 14 and opened == [folder]
    again, _ = ar.quantize_and_save(tmp_path / "again", "fake", inplace=False)  # it can be done again
    assert (tmp_path / "again" / "config.json").is_file() and again is not own


def test_a_quantized_object_is_saved_more_than_once(of_object: Any, tmp_path: Path) -> None:
    ar, own = of_object()
    ar.quantize()
    rounded = logits(own)
    model = ar.save_quantized(tmp_path / "one", "auto_round")
    assert model is own and packed(own) == 14 and torch.allclose(logits(own), rounded, atol=1e-4)
    other = ar.save_quantized(tmp_path / "two", "auto_gptq", inplace=False)
    assert other is not own and packed(other) == 14 and not packed(own)
    assert ar.save_quantized(tmp_path / "three", "fake") is own
    for name in ("one", "two", "three"):
        found = logits(SavedModel(str(tmp_path / name)))
        assert torch.allclose(found, rounded, atol=1e-4), name


def test_layers_tell_their_scheme(packable_folder: Any, token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    """Packed or dense, a layer of the opened model has the attributes that scripts read."""
    config = {"k_proj": {"bits": 16}, "v_proj": {"bits": 8}}
    ar = AutoRound(packable_folder("llama"), dataset=token_ids, layer_config=config, **RTN)
    for fmt in ("auto_round", "fake"):
        model, _ = ar.quantize_and_save(tmp_path / fmt, fmt)
        attention = copy.deepcopy(model).model.layers[1].self_attn
        assert [getattr(attention, f"{n}_proj").bits for n in "qkvo"] == [4, 16, 8, 4]
        assert attention.o_proj.group_size == 32 and attention.o_proj.act_bits == 16
        assert not hasattr(pickle.loads(pickle.dumps(model)).model.layers[0].self_attn.k_proj, "sym")
    assert ar.model.model.layers[0].self_attn.q_proj.sym


@pytest.mark.parametrize("step", ["at once", "twice"])
def test_layers_of_an_object_tell_their_scheme(step: str, of_object: Any, tmp_path: Path) -> None:
    ar, model = of_object(layer_config={"k_proj": {"bits": 16}})
    if step == "twice":
        ar.quantize()
        ar.save_quantized(tmp_path / "out", "auto_round")
    else:
        ar.quantize_and_save(tmp_path / "out", "auto_round")
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.bits == 16 and attention.q_proj.bits == 4 and packed(model)
    assert ar.layer_config["model.layers.0.self_attn.k_proj"]["bits"] == 16
