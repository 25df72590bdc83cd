"""Vision-language checkpoints: nothing of them is dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.errors import AutoRoundError, UnsupportedError
from auto_round.modeling.build import tower_tensors
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.files.safetensors import TensorFiles

_TEXT: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
)
_LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", dict(
        text_config=_TEXT | _LINEAR,
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=4,
            num_position_embeddings=16,
        ),
    )),
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", dict(
        text_config=_TEXT | dict(intermediate_size_mlp=128, num_local_experts=2, attn_temperature_tuning=False),
        vision_config=_SMALL | dict(
            intermediate_size=128, projector_input_dim=64, projector_output_dim=64, vision_output_dim=64
        ),
    )),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", dict(
        text_config=_TEXT | dict(model_type="mistral"), vision_config=_SMALL | dict(model_type="pixtral"),
    )),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", dict(
        text_config=_TEXT | dict(model_type="llama"), image_token_index=5,
        vision_config=_SMALL | dict(model_type="clip_vision_model", projection_dim=32),
    )),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", dict(
        text_config=_TEXT | dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
        vision_config=_SMALL, mm_tokens_per_image=4, image_token_index=95, boi_token_index=94, eoi_token_index=93,
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config, kind, options = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, kind)(getattr(transformers, config)(**options)).bfloat16()
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma3"])
def test_tuning_refuses_before_any_work(name: str, vision_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(AutoRoundError, match=r"reads more than text.*model_free=True \(--model_free\)"):
        AutoRound(str(vision_folder(name)), scheme="W4A16", iters=1, dataset=str(tmp_path / "not there.jsonl")).plan()
    if name in ("qwen3_5", "llama4"):
        with pytest.raises(UnsupportedError, match=f"names {MODELS[name][1]}.*ForCausalLM, which is tuned"):
            CheckpointSource(vision_folder(name))


def test_a_causal_class_with_the_tower_is_tuned(vision_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 3's is the whole model: its language layers are tuned, and the tower is copied byte for byte."""
    from transformers import AutoModelForImageTextToText, AutoRoundConfig

    folder, data = vision_folder("gemma3"), [torch.arange(i, i + 24)[None] for i in range(4, 12)]
    ar = AutoRound(
        str(folder), scheme="W4A16", group_size=32, iters=1, dataset=data, nsamples=8, seqlen=24, device_map="cpu"
    )
    ar.quantize_and_save(tmp_path / "out", format="auto_round")
    before, after = TensorFiles.open(folder), TensorFiles.open(tmp_path / "out")
    changed = [n for n in before if n not in after or not torch.equal(before.read(n), after.read(n))]
    assert changed and all(".layers." in n and "language_model" in n for n in changed) and not tower_tensors(changed)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", quantization_config=AutoRoundConfig(), dtype=torch.float32
    )
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    pixels = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=data[0], pixel_values=None).logits).all()
        assert torch.isfinite(model.get_image_features(pixels).pooler_output).all()


@pytest.mark.parametrize("name", MODELS)
def test_model_free_mode_keeps_every_tensor(name: str, vision_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = vision_folder(name)
    ar = AutoRound(str(folder), scheme="W4A16", group_size=32, model_free=True, device_map="cpu")
    ar.quantize_and_save(tmp_path / "out", format="auto_round")
    before, after = TensorFiles.open(folder), TensorFiles.open(tmp_path / "out")
    changed = [n for n in before if n not in after or not torch.equal(before.read(n), after.read(n))]
    assert changed and not tower_tensors(changed)
    assert all(".layers." in n and "language_model" in n for n in changed)
    one, other = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert (
        one["architectures"] == other["architectures"]
        and one["vision_config"].items() <= other["vision_config"].items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_model_free_files_open_with_their_own_class(
    name: str, vision_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Through our loader in Transformers, tower and all: logits of text are those of the rounded weights."""
    from transformers import AutoModelForImageTextToText, AutoRoundConfig

    folder = vision_folder(name)
    for fmt in ("auto_round", "fake"):
        ar = AutoRound(str(folder), scheme="W4A16", group_size=32, model_free=True, device_map="cpu")
        ar.quantize_and_save(tmp_path / fmt, format=fmt)
    options: dict[str, Any] = {"dtype": torch.float32}
    packed = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "auto_round", quantization_config=AutoRoundConfig(), **options
    )
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "fake", **options)
    assert type(packed).__name__ == type(plain).__name__ == MODELS[name][1]
    ids = torch.arange(6, 22)[None]
    # Llama 4's whole class in Transformers 5.24 fails on text alone, quantized or not.
    readers = [model.language_model if name == "llama4" else model for model in (packed, plain)]
    with torch.no_grad():
        one, other = (reader.eval()(input_ids=ids).logits for reader in readers)
    assert torch.isfinite(one).all() and float((one - other).norm() / other.norm()) < 2e-2
    assert any(type(module).__module__.startswith("auto_round") for module in packed.modules())


@pytest.mark.parametrize("named", [["Qwen3_5ForCausalLM"], ["Qwen3_5ForConditionalGeneration"], None])
def test_a_text_only_checkpoint_goes_on(named: Any, vision_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = vision_folder("qwen3_5")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".visual." not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text()) | {"architectures": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(CheckpointSource(tmp_path).blocks) == 2


def test_every_family_whose_causal_class_is_the_text_part() -> None:
    """The names that the tower's tensors have are known, whatever the family."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tried = []
    for model_type, names in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items():
        full = names[0] if isinstance(names, (list, tuple)) else names
        causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        if causal is None or causal == full or model_type not in transformers.CONFIG_MAPPING:
            continue
        if not hasattr(transformers, full):
            continue
        config = transformers.CONFIG_MAPPING[model_type]()
        if model_type == "emu3":
            config.vocabulary_map = {"<image>": 0}
        elif model_type == "qwen4_exp":  # its defaults name no indexer
            text = config.get_text_config()
            text.indexer_budget, text.indexer_compress_ratio = 64, 4
            text.indexer_n_heads, text.indexer_kv_heads, text.indexer_head_dim = 2, 1, 16
        with torch.device("meta"):
            model = getattr(transformers, full)(config)
        assert tower_tensors(model.state_dict()), model_type
        tried.append(model_type)
    assert {"qwen3_5", "qwen3_5_moe", "llama4", "mllama"} <= set(tried)
