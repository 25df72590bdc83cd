"""Static scales of keys, values and queries, from the run into the files and back into a model."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_round.errors import ConfigError, LibraryError, UnsupportedError

Make = Callable[..., Any]


@pytest.fixture
def uneven(token_ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Eight samples of which the last has the smallest states: one token, over and over."""
    return [*token_ids[:7], torch.full((24,), 7)]


def cache_name(model: Any) -> str:
    """What a whole model calls its cache; that changes with Transformers' version."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation))


def true_scales(model: Any, samples: list[torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(k, v) [heads] by attention name: the maximum over all samples of what Transformers' cache holds, / 448."""
    from transformers import DynamicCache

    largest: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for ids in samples:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[None], **{cache_name(model): cache}, use_cache=True)
        for index, layer in enumerate(cache.layers):
            pair = layer.keys.abs().amax((0, 2, 3)) / 448, layer.values.abs().amax((0, 2, 3)) / 448
            name = f"model.layers.{index}.self_attn"
            old = largest.get(name, pair)
            largest[name] = (torch.maximum(pair[0], old[0]), torch.maximum(pair[1], old[1]))
    return largest


def saved(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {k: t for k, t in tensors.items() if k.endswith(("k_scale", "v_scale", "q_scale"))}


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return values


@pytest.mark.parametrize("format", ["auto_round", "llm_compressor", "auto_round:auto_gptq"])
def test_9_one_scale_is_the_maximum_over_all_samples(
    format: str, make: Make, packable_model: Callable[..., Any], uneven: list[torch.Tensor], tmp_path: Path
) -> None:
    """Not the last batch's: its states are much smaller here."""
    wanted = true_scales(packable_model("llama"), uneven)
    last = true_scales(packable_model("llama"), uneven[-1:])
    make("llama", iters=0, disable_opt_rtn=True, dataset=uneven, static_kv_dtype="fp8").quantize_and_save(
        tmp_path, format=format
    )
    found = saved(tmp_path)
    assert set(found) == {f"{name}.{leaf}_scale" for name in wanted for leaf in "kv"}
    for name, pair in wanted.items():
        for leaf, scales, small in zip("kv", pair, last[name], strict=True):
            scale = found[f"{name}.{leaf}_scale"]
            assert scale.shape == (1,) and scale.dtype == torch.float32
            torch.testing.assert_close(scale, scales.amax().reshape(1), rtol=1e-4, atol=0)
            assert small.amax() < 0.95 * scale


def test_scales_per_head(
    make: Make, packable_model: Callable[..., Any], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    wanted = true_scales(packable_model("llama"), token_ids)
    shapes = {"auto_round": (2,), "llm_compressor": (2, 1, 1)}  # the second is what that library declares
    run = make("llama", iters=0, static_kv_dtype="float8_e4m3fn", static_kv_granularity="head")
    _, folders = run.quantize_and_save(tmp_path, format=list(shapes))
    for folder, shape in zip(folders, shapes.values(), strict=True):
        found = saved(Path(folder))
        for name, pair in wanted.items():
            for leaf, scales in zip("kv", pair, strict=True):
                scale = found[f"{name}.{leaf}_scale"]
                assert scale.shape == shape
                torch.testing.assert_close(scale.reshape(2), scales, rtol=1e-4, atol=0)


def test_scales_do_not_depend_on_tuning_or_batches(make: Make, tmp_path: Path) -> None:
    """They are those of the full-precision model."""
    found = []
    for index, kwargs in enumerate(({"iters": 0, "disable_opt_rtn": True}, {"iters": 2, "batch_size": 3}, {"bits": 2})):
        folder = tmp_path / str(index)
        make("qwen2", **{"iters": 0, "static_attention_dtype": "fp8", **kwargs}).quantize_and_save(folder)
        found.append(saved(folder))
    assert set(found[0]) == {f"model.layers.{i}.self_attn.{leaf}_scale" for i in range(2) for leaf in "kqv"}
    for other in found[1:]:
        for name, scale in found[0].items():
            torch.testing.assert_close(other[name], scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "strategy"),
    [
        ({"static_kv_dtype": "fp8"}, "tensor"),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "head"}, "attn_head"),
        ({"static_attention_dtype": "fp8"}, "tensor"),
        ({"static_attention_dtype": "fp8", "static_attention_granularity": "head"}, "attn_head"),
        ({"static_kv_dtype": "fp8", "static_attention_dtype": "fp8"}, "tensor"),
    ],
)
def test_19_saved_scales_are_declared(kwargs: dict[str, Any], strategy: str, make: Make, tmp_path: Path) -> None:
    make("llama", iters=0, disable_opt_rtn=True, nsamples=2, **kwargs).quantize_and_save(
        tmp_path, format="llm_compressor"
    )
    assert saved(tmp_path)
    assert config_of(tmp_path)["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, "group_size": None,
    }  # fmt: skip


def test_nothing_is_declared_without_scales(make: Make, tmp_path: Path) -> None:
    _, folders = make("llama", iters=0, disable_opt_rtn=True).quantize_and_save(
        tmp_path, format="llm_compressor,auto_round"
    )
    assert config_of(Path(folders[0]))["kv_cache_scheme"] is None
    assert not any(key.startswith("static_") for key in config_of(Path(folders[1])))
    assert not any(saved(Path(folder)) for folder in folders)


def test_queries_may_have_a_granularity_of_their_own(make: Make, tmp_path: Path) -> None:
    kwargs = {"static_kv_dtype": "fp8", "static_attention_dtype": "fp8", "static_attention_granularity": "head"}
    make("llama", iters=0, disable_opt_rtn=True, nsamples=2, **kwargs).quantize_and_save(tmp_path)
    found = saved(tmp_path)
    assert {k.rpartition(".")[2]: tuple(t.shape) for k, t in found.items()} == {
        "k_scale": (1,), "q_scale": (4,), "v_scale": (1,),
    }  # fmt: skip
    declared = config_of(tmp_path)
    assert {k: v for k, v in declared.items() if k.startswith("static_")} == {
        "static_kv_dtype": "fp8", "static_attention_dtype": "fp8", "static_attention_granularity": "head",
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"one granularity for all three; formats that can: auto_round,"):
        make("llama", iters=0, **kwargs).plan("llm_compressor")


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "opt", "gpt-oss"])
def test_transformers_opens_them_without_a_word(
    family: str, make: Make, logits: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loader takes the scales as buffers, keeps their values and dtype, and saves them again."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as theirs

    kwargs: dict[str, Any] = dict(iters=0, disable_opt_rtn=True, nsamples=4)
    make(family, static_kv_dtype="fp8", **kwargs).quantize_and_save(tmp_path / "scales")
    make(family, **kwargs).quantize_and_save(tmp_path / "plain")
    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "scales", dtype=torch.float32)
    finally:
        theirs.disable_propagation()
    assert not [r.message for r in caplog.records if "UNEXPECTED" in r.message or "k_scale" in r.message]
    found = saved(tmp_path / "scales")
    state = model.state_dict()
    assert found and all(torch.equal(state[k], t) and state[k].dtype == torch.float32 for k, t in found.items())
    assert torch.equal(logits(model), logits(tmp_path / "plain")), "they change nothing in Transformers"
    model.save_pretrained(tmp_path / "again")
    again = saved(tmp_path / "again")
    assert set(again) == set(found) and all(torch.equal(again[k], t) for k, t in found.items())


def test_without_local_files_they_are_left_out_quietly(make: Make, tmp_path: Path) -> None:
    """Where the checkpoint's own files cannot be looked at, its config tells."""
    from auto_round.inference.convert_model import register_cache_scales

    model = torch.nn.Module()
    assert register_cache_scales(model, {"static_kv_dtype": "fp8"}, None) == 0
    assert model._keys_to_ignore_on_load_unexpected == [r"\.k_scale$", r"\.q_scale$", r"\.v_scale$"]
    plain = torch.nn.Module()
    assert register_cache_scales(plain, {}, None) == 0 and not hasattr(plain, "_keys_to_ignore_on_load_unexpected")


def test_in_memory_first(make: Make, tmp_path: Path) -> None:
    """`quantize()` finds the scales too, and later saving writes them."""
    kwargs: dict[str, Any] = dict(iters=0, disable_opt_rtn=True, static_kv_dtype="fp8")
    run = make("llama", **kwargs)
    run.quantize()
    run.save_quantized(tmp_path / "later", format="llm_compressor")
    make("llama", **kwargs).quantize_and_save(tmp_path / "once", format="llm_compressor")
    one, other = saved(tmp_path / "later"), saved(tmp_path / "once")
    assert len(one) == 4 and all(torch.equal(one[k], t) for k, t in other.items())


def test_a_model_object(make: Make, packable_model: Callable[..., Any], tmp_path: Path) -> None:
    model = packable_model("llama")
    chosen = model.config._attn_implementation
    make(model, iters=0, disable_opt_rtn=True, static_attention_dtype="fp8").quantize_and_save(tmp_path / "object")
    make("llama", iters=0, disable_opt_rtn=True, static_attention_dtype="fp8").quantize_and_save(tmp_path / "path")
    one, other = saved(tmp_path / "object"), saved(tmp_path / "path")
    assert len(one) == 6 and all(torch.equal(one[k], t) for k, t in other.items())
    assert model.config._attn_implementation == chosen
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_plan_counts_them(make: Make) -> None:
    with_scales = make("llama", iters=0, static_kv_dtype="fp8", static_kv_granularity="head").plan()
    without = make("llama", iters=0).plan()
    assert with_scales.bytes_on_disk["auto_round"] == without.bytes_on_disk["auto_round"] + 2 * 2 * 2 * 4
    assert "fp8 keys and values, one scale per head" in with_scales.render()


@pytest.mark.parametrize("format", ["auto_gptq", "gptqmodel", "auto_awq", "mlx", "auto_round:mlx", "fake"])
def test_formats_that_cannot_hold_them_refuse_before_work(format: str, make: Make, tmp_path: Path) -> None:
    run = make("llama", iters=0, static_kv_dtype="fp8")
    with pytest.raises(UnsupportedError, match="cannot hold fp8 keys and values") as caught:
        run.quantize_and_save(tmp_path / "out", format=format)
    assert "formats that can: auto_round," in str(caught.value) and "llm_compressor" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"static_kv_dtype": "int8"}, "static_kv_dtype='int8' is not allowed; use fp8"),
        ({"static_attention_dtype": "fp4"}, "static_attention_dtype='fp4'"),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "channel"}, "use tensor or head"),
        ({"static_kv_granularity": "head"}, "no effect without static_kv_dtype"),
        (
            {"static_kv_dtype": "fp8", "static_attention_granularity": "head"},
            "no effect without static_attention_dtype",
        ),
    ],
)
def test_bad_values(kwargs: dict[str, Any], says: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=says):
        make("llama", **kwargs)


@pytest.mark.parametrize("dtype", ["float16", "bf16", torch.bfloat16])
def test_a_cache_of_sixteen_bits_needs_no_scales(dtype: Any, make: Make, tmp_path: Path) -> None:
    run = make("llama", iters=0, disable_opt_rtn=True, static_kv_dtype=dtype)
    assert run.static_kv_dtype is None and not run.settings.needs_data
    run.quantize_and_save(tmp_path / "out", format="auto_round")
    assert not [n for n in load_file(tmp_path / "out" / "model.safetensors") if n.endswith("k_scale")]
    with pytest.raises(ConfigError, match="no effect without static_kv_dtype"):
        make("llama", static_kv_dtype=dtype, static_kv_granularity="head")


def test_torch_dtypes_are_taken(make: Make) -> None:
    assert make("llama", static_kv_dtype=torch.float8_e4m3fn).settings.recorded()["static_kv_dtype"] == "fp8"
    assert make("llama", iters=0, disable_opt_rtn=True, static_kv_dtype="fp8").settings.needs_data


def test_attention_that_cannot_be_watched_is_refused(make: Make, tmp_path: Path) -> None:
    """Falcon's chooses its function itself: scales of keys and values are found, those of queries are not."""
    make("falcon-alibi", iters=0, nsamples=2, static_kv_dtype="fp8").quantize_and_save(tmp_path / "kv")
    assert len(saved(tmp_path / "kv")) == 4
    with pytest.raises(UnsupportedError, match="does not use Transformers' table of attention functions"):
        make("falcon-alibi", iters=0, nsamples=2, static_attention_dtype="fp8").quantize_and_save(tmp_path / "q")


def test_attention_whose_cache_nothing_recognises_is_an_error_of_ours(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a renaming that is not known here: not "this model has no attention", and before any work."""
    from auto_round.run import plan as cache

    monkeypatch.setattr(cache, "find_attention", lambda _block: [])
    with pytest.raises(LibraryError, match="LlamaForCausalLM has attention .LlamaAttention.*transformers 5"):
        make("llama", iters=0, nsamples=2, static_kv_dtype="fp8").quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
