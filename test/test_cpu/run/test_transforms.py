"""A transform edits weights before they are quantized: the same in a fresh, a resumed and an in-memory run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.algorithms.transforms.base import TRANSFORMS, BlockView, register_transform
from auto_round.edits import ChannelScale, TensorEdit
from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.files.safetensors import TensorFiles

Make = Callable[..., Any]


def powers(count: int) -> torch.Tensor:
    """Factors that change no mantissa, so that edits are exact in every dtype."""
    return 2.0 ** (torch.arange(count) % 5 - 2).float()


class NormToLinear:
    """Move a factor for each channel from a norm into the linear layers that read it, as AWQ does."""

    needs_data = False
    consumers: Mapping[str, tuple[str, ...]] = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }

    def edits(self, view: BlockView) -> dict[str, TensorEdit]:
        found: dict[str, TensorEdit] = {}
        for norm, layers in self.consumers.items():
            factors = powers(view.block.get_parameter(f"{norm}.weight").numel())
            found[f"{norm}.weight"] = ChannelScale(1 / factors)
            found |= {f"{layer}.weight": ChannelScale(factors, 1) for layer in layers}
        return found


READERS = ("gate.weight", "router.weight", "gate_proj.weight", "up_proj.weight")


class NormToExperts(NormToLinear):
    """The same where the second norm feeds a router and experts."""

    def edits(self, view: BlockView) -> dict[str, TensorEdit]:
        self.consumers = {"input_layernorm": NormToLinear.consumers["input_layernorm"]}
        found = super().edits(view)
        names = [n for n, _ in view.block.named_parameters() if n.startswith("mlp.")]
        factors = powers(view.block.get_parameter("post_attention_layernorm.weight").numel())
        found["post_attention_layernorm.weight"] = ChannelScale(1 / factors)
        readers = [n for n in names if n.endswith(READERS)]
        return found | {name: ChannelScale(factors, 1) for name in readers}


class Observed(NormToLinear):
    """Factors from the calibration data, rounded to powers of two."""

    needs_data = True
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def edits(self, view: BlockView) -> dict[str, TensorEdit]:
        self.seen[view.name] = dict(view.moments)
        found: dict[str, TensorEdit] = {}
        for norm, layers in self.consumers.items():
            moment = view.moments[layers[0]].clamp(min=1e-6)
            factors = 2.0 ** (moment.log2() / 4).round()
            found[f"{norm}.weight"] = ChannelScale(1 / factors)
            found |= {f"{layer}.weight": ChannelScale(factors, 1) for layer in layers}
        return found


class Breaking:
    """Scales a layer and nothing that undoes it."""

    needs_data = True

    def edits(self, view: BlockView) -> dict[str, TensorEdit]:
        return {"mlp.down_proj.weight": ChannelScale(torch.full((64,), 2.0))}


class Misnaming:
    needs_data = False

    def edits(self, view: BlockView) -> dict[str, TensorEdit]:
        return {"mlp.no_such.weight": ChannelScale(torch.ones(64))}


KINDS = {
    "norm_to_linear": NormToLinear, "norm_to_experts": NormToExperts, "observed": Observed, "breaking": Breaking,
    "misnaming": Misnaming,
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, kind in KINDS.items():
        register_transform(name)(kind)
    yield
    for name in KINDS:
        del TRANSFORMS[name]


@pytest.fixture
def scaled_folder(packable_folder: Callable[..., str], tmp_path: Path) -> Callable[[str, Any], str]:
    """`scaled_folder(family, transform)`: the checkpoint with the transform's edits made by hand."""

    def make_folder(family: str, transform: Any) -> str:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = packable_folder(family)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            for index, block in enumerate(model.model.layers):
                for name, edit in transform.edits(BlockView(f"model.layers.{index}", block, {}, {})).items():
                    tensor = block.get_parameter(name)
                    shape = [1] * tensor.dim()
                    shape[edit.dim] = -1
                    tensor.mul_(edit.factors.view(shape))
                for name, tensor in block.named_parameters():  # stacked: [E, 2 I, H], gpt-oss [E, H, 2 I]
                    if name.endswith("experts.gate_up_proj"):
                        factors = powers(64)
                        tensor.mul_(factors[:, None] if family == "gpt-oss" else factors)
        folder = tmp_path / f"scaled-{family}"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return str(folder)

    return make_folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = TensorFiles.open(folder)
    return {name: files.read(name) for name in files}


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "fake"])
def test_files_hold_what_a_checkpoint_scaled_by_hand_gives(
    fmt: str, make: Make, scaled_folder: Callable[..., str], tmp_path: Path
) -> None:
    plain = {"iters": 0, "disable_opt_rtn": True}
    make("llama", algorithm="norm_to_linear", **plain).quantize_and_save(tmp_path / "ours", format=fmt)
    make(scaled_folder("llama", NormToLinear()), **plain).quantize_and_save(tmp_path / "hand", format=fmt)
    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "hand"))


@pytest.mark.parametrize("options", [{"iters": 0}, {"iters": 2}], ids=["search", "tuned"])
def test_tuning_sees_the_edited_block(
    options: dict[str, Any], make: Make, scaled_folder: Callable[..., str], tmp_path: Path
) -> None:
    """Inputs of the edited layers are smaller by the factors, exactly: so are the codes."""
    make("llama", algorithm="norm_to_linear", **options).quantize_and_save(tmp_path / "ours")
    make(scaled_folder("llama", NormToLinear()), **options).quantize_and_save(tmp_path / "hand")
    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "hand"))


def test_a_resumed_run_writes_the_same_bytes(
    make: Make, stop_at: Any, weights_hash: Callable[[Any], str], tmp_path: Path
) -> None:
    given = {"algorithm": "observed,auto_round", "iters": 2}
    make("llama", **given).quantize_and_save(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), stop_at(SignRoundQuantizer, "quantize_block", 2):
        make("llama", **given).quantize_and_save(tmp_path / "resumed")
    make("llama", **given).quantize_and_save(tmp_path / "resumed")
    assert weights_hash(tmp_path / "resumed") == weights_hash(tmp_path / "whole")


def test_the_model_in_memory_is_the_one_in_the_files(
    make: Make, logits: Callable[[Any], torch.Tensor], packable_model: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    given = {"algorithm": "observed", "iters": 0}
    make("llama", **given).quantize_and_save(tmp_path / "files", format="fake")
    in_files = logits(tmp_path / "files")
    in_memory, _ = make("llama", **given).quantize()
    torch.testing.assert_close(logits(in_memory), in_files, rtol=1e-5, atol=1e-5)
    live, _ = make(packable_model("llama"), **given).quantize()
    torch.testing.assert_close(logits(live), in_files, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"iters": 0, "disable_opt_rtn": True}, {"iters": 2}], ids=["rounded", "tuned"])
def test_experts(options: dict[str, Any], make: Make, scaled_folder: Callable[..., str], tmp_path: Path) -> None:
    make("qwen3-moe", algorithm="norm_to_experts", **options).quantize_and_save(tmp_path / "ours")
    make(scaled_folder("qwen3-moe", NormToExperts()), **options).quantize_and_save(tmp_path / "hand")
    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "hand"))


def test_experts_that_are_streamed(
    make: Make, weights_hash: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are read again and again under a limit of memory: each time with the edits."""
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    given = {"algorithm": "norm_to_experts", "iters": 0}
    make("qwen3-moe", **given).quantize_and_save(tmp_path / "whole")
    limit = make("qwen3-moe", **given).plan().peak_ram
    for _ in range(2):  # first activations go to a file
        streamed = make("qwen3-moe", **given, max_memory=limit - 1)
        limit = streamed.plan().peak_ram
    assert streamed.plan().memory_plan.streams_experts
    streamed.quantize_and_save(tmp_path / "streamed")
    assert weights_hash(tmp_path / "streamed") == weights_hash(tmp_path / "whole")


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("fmt", ["auto_round", "fake"])
def test_unquantized_experts_are_edited(
    family: str, fmt: str, make: Make, scaled_folder: Callable[..., str], tmp_path: Path
) -> None:
    """gpt-oss stores all experts in one tensor; those that are left unquantized are written back into it."""
    given = {"iters": 0, "disable_opt_rtn": True, "ignore_layers": "experts"}
    make(family, algorithm="norm_to_experts", **given).quantize_and_save(tmp_path / "ours", format=fmt)
    make(scaled_folder(family, NormToExperts()), **given).quantize_and_save(tmp_path / "hand", format=fmt)
    assert_equal(tensors(tmp_path / "ours"), tensors(tmp_path / "hand"))


def test_moments_are_mean_squares_of_the_inputs(make: Make, tmp_path: Path) -> None:
    make("llama", algorithm="observed", iters=0).quantize()
    first = Observed.seen["model.layers.0"]
    assert set(first) >= {"self_attn.q_proj", "mlp.down_proj"} and first["self_attn.q_proj"].shape == (64,)
    # RMSNorm's output has a mean square near the mean square of its weight
    assert 0.05 < float(first["self_attn.q_proj"].mean()) < 5


def test_what_is_refused(make: Make) -> None:
    with pytest.raises(NumericsError, match="Breaking changes what model.layers.0 computes"):
        make("llama", algorithm="breaking", iters=0).quantize()
    with pytest.raises(ModelError, match="no_such"):
        make("llama", algorithm="misnaming", iters=0).quantize()
    with pytest.raises(ConfigError, match="model_free"):
        make("llama", algorithm="observed", model_free=True)
    source = make("llama-tied")._runs.source
    with pytest.raises(UnsupportedError, match="shares its values"):
        source.apply_edits({"model.embed_tokens.weight": ChannelScale(torch.ones(64), 1)})


def test_names_are_registered_once() -> None:
    with pytest.raises(ConfigError, match="registered already"):
        register_transform("observed")(Breaking)
