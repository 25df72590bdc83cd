"""A stopped run is resumed in its block, and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.errors import ConfigError, ModelError, OutputError, Stopped
from auto_round.output import staging
from auto_round.output.writer import PartialFile, ShardWriter
from auto_round.run import blocks as blockwise
from auto_round.run import driver as run_module
from auto_round.run import finalize as deliver_module
from auto_round.run import folder_output
from auto_round.run import head as head_module

TUNED: dict[str, Any] = {"iters": 2, "bits": 2, "lr": 0.02}
GGUF: dict[str, Any] = {"iters": 0, "group_size": None}
Runner = Callable[..., Path]


@pytest.fixture(autouse=True)
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    return tmp_path / "space"


@pytest.fixture
def run(
    packable_folder: Callable[..., str], gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> Runner:
    """`run(name, family, formats, **kwargs)`: quantize into the folder of this name."""

    def start(
        name: str, family: str = "llama", formats: str = "auto_round", save: dict[str, Any] | None = None,
        model: str | None = None, **kwargs: Any,
    ) -> Path:  # fmt: skip
        folder = model or (gguf_folder if "gguf:" in formats else packable_folder)(family)
        given = {"group_size": 32, "dataset": token_ids, "nsamples": 8, "seqlen": 24, "batch_size": 4, **kwargs}
        AutoRound(folder, **given).quantize_and_save(tmp_path / name, formats, **(save or {}))
        return tmp_path / name

    return start


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the reports, which tell times and memory."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != "report.json"}


def results(folder: Path) -> list[Any]:
    """Of each report, what does not tell of times."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.rglob("report.json"))]
    blocks = [[{k: v for k, v in b.items() if k != "seconds"} for b in r["blocks"]] for r in reports]
    return [(r["layers"], b, r["files"], r["verify"]) for r, b in zip(reports, blocks, strict=True)]


CELLS = {
    "tuned-two-formats": ("llama", "auto_round,auto_gptq", TUNED),
    "opt-rtn-asym": ("llama", "auto_round", {"iters": 0, "sym": False}),
    "gptq": ("llama", "auto_round", {"iters": 0, "alg_configs": "gptq"}),
    "gptq-mxfp4-tuned": (
        "llama", "llm_compressor", {"iters": 2, "alg_configs": "gptq", "scheme": "MXFP4", "group_size": None},
    ),
    "gptq-moe": ("qwen3-moe", "auto_round", {"iters": 0, "alg_configs": "gptq"}),
    "rtn": ("llama", "auto_round", {"iters": 0, "disable_opt_rtn": True}),
    "mxfp4": ("llama", "llm_compressor", {"iters": 2, "scheme": "MXFP4", "group_size": None}),
    "fp8-static-kv": (
        "llama", "llm_compressor",
        {"iters": 0, "scheme": "FP8_STATIC", "group_size": None, "static_kv_dtype": "fp8"},
    ),
    "tuned-head": ("llama", "auto_round", {**TUNED, "quant_lm_head": True}),
    "moe": ("qwen3-moe", "auto_round", TUNED),
    "q4_k_m": ("llama", "gguf:q4_k_m", GGUF),
    "two-files-and-a-folder": ("llama", "gguf:q4_k_m,gguf:q8_0,auto_round", {**GGUF, "group_size": 32}),
}  # fmt: skip


def left_in(space: Path) -> list[str]:
    """What a finished run has left in its work space, but for compiled kernels, which later processes use again."""
    return sorted(path.name for path in space.glob("*") if path.name != "kernels")


@pytest.mark.parametrize("cell", CELLS)
def test_stopped_in_the_last_block(cell: str, run: Runner, stop_at: Any, tmp_path: Path, space: Path) -> None:
    family, formats, kwargs = CELLS[cell]
    whole = run("whole", family, formats, **kwargs)
    calls = 2 if cell != "two-files-and-a-folder" else 4  # the last block of the second of three runs
    with pytest.raises(Stopped, match="stopped in block 2 of 2; run the same command again to resume"):
        with stop_at(blockwise, "_quantize_block", calls):
            run("out", family, formats, **kwargs)
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/*.gguf"))
    assert {path.suffix for path in tmp_path.glob("out/**/.partial/*")} == {".partial"}  # what is finished
    loaded: list[int] = []
    real = blockwise._quantize_block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_quantize_block", lambda index, *rest: loaded.append(index) or real(index, *rest))
        run("out", family, formats, **kwargs)
    assert loaded == ([1] if cell != "two-files-and-a-folder" else [1, 0, 1])
    assert tree(tmp_path / "out") == tree(whole)
    assert results(tmp_path / "out") == results(whole)
    assert not left_in(space)


@pytest.mark.parametrize("kwargs", [TUNED, {"iters": 0, "sym": False}], ids=["tuned", "opt-RTN"])
@pytest.mark.parametrize("ways", [("file", "file"), ("file", "ram"), ("ram", "file"), ("ram", "threads")], ids=" ".join)
def test_stopped_in_one_way_and_resumed_in_another(
    ways: tuple[str, str], kwargs: dict[str, Any], run: Runner, stop_at: Any, packable_folder: Callable[..., str],
    token_ids: list[torch.Tensor], tmp_path: Path, space: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Activations in memory or, where memory is limited, in a file; other threads; a flag that decides no byte."""
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    given = {"group_size": 32, "dataset": token_ids, "nsamples": 8, "seqlen": 24, "batch_size": 4, **kwargs}
    limit = AutoRound(packable_folder("llama"), **given).plan().peak_ram - 1
    threads = torch.get_num_threads()
    options = {"ram": {}, "file": {"max_memory": limit}, "threads": {"low_gpu_mem_usage": True}}
    assert AutoRound(packable_folder("llama"), **given, max_memory=limit).plan().memory_plan.streams == "file"
    whole = run("whole", **kwargs)
    try:
        with pytest.raises(Stopped, match="stopped in block 2 of 2"), stop_at(blockwise, "_quantize_block", 2):
            run("out", **kwargs, **options[ways[0]])
        torch.set_num_threads(2 if "threads" in ways else threads)
        run("out", **kwargs, **options[ways[1]])
    finally:
        torch.set_num_threads(threads)
    assert tree(tmp_path / "out") == tree(whole)
    assert not left_in(space)


PHASES = {
    "data": (run_module, "prepare_calibration", 1), "capture": (run_module, "capture_inputs", 1),
    "first block": (blockwise, "_quantize_block", 1), "outside": (head_module, "write_unit", 1),
    "after the head": (head_module, "smoke_loss", 1), "names": (ShardWriter, "finish", 1),
    "second names": (ShardWriter, "finish", 2),
    "side files": (folder_output, "write_side_files", 1), "config": (folder_output, "write_config", 2),
    "verify": (folder_output, "verify_folder", 1), "second verify": (folder_output, "verify_folder", 2),
    "records": (deliver_module, "write_records", 1), "sync_and_hash": (deliver_module, "sync_and_hash", 2),
    "publish": (run_module.Staging, "publish", 2), "move": (staging, "_move", 3),
    "last move": (staging, "_move", 21), "journal": (run_module.Journal, "finish", 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def head_whole(
    packable_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], list[Any]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    kwargs = {"group_size": 32, "dataset": token_ids, "nsamples": 8, "seqlen": 24, "batch_size": 4}
    AutoRound(packable_folder("llama"), **kwargs, **TUNED, quant_lm_head=True).quantize_and_save(out, "auto_round,fake")
    return tree(out), results(out)


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_in_every_phase(
    phase: str, run: Runner, stop_at: Any, head_whole: Any, tmp_path: Path, space: Path
) -> None:
    place = PHASES[phase]
    kwargs = {**TUNED, "quant_lm_head": True}
    with pytest.raises(KeyboardInterrupt), stop_at(*place):
        run("out", formats="auto_round,fake", **kwargs)
    for folder in (tmp_path / "out").iterdir():  # nothing that opens is there unless it was checked
        opens = (folder / "config.json").exists()
        assert not opens or tree(folder) == {
            name.removeprefix(f"{folder.name}/"): data
            for name, data in head_whole[0].items()
            if name.startswith(f"{folder.name}/")
        }
    run("out", formats="auto_round,fake", **kwargs)
    assert (tree(tmp_path / "out"), results(tmp_path / "out")) == head_whole
    assert not left_in(space)


CHANGES: dict[str, dict[str, Any]] = {
    "iters": {"iters": 3}, "bits": {"bits": 3}, "group_size": {"group_size": 16}, "sym": {"sym": False},
    "seed": {"seed": 7}, "lr": {"lr": 0.03}, "batch_size": {"batch_size": 2}, "seqlen": {"seqlen": 20},
    "nsamples": {"nsamples": 6}, "layers.model.layers.1.mlp.up_proj": {"layer_config": {"1.mlp.up_proj": {"bits": 8}}},
    "formats": {"formats": "auto_gptq"}, "amp": {"amp": False},
    "enable_quanted_input": {"enable_quanted_input": False}, "model_dtype": {"model_dtype": "bf16"},
    "calibration data": {"dataset": [torch.arange(n + 4, n + 28) for n in range(8)]},
    "algorithm": {"enable_adam": True}, "quant_lm_head": {"quant_lm_head": True},
    "max_shard_size": {"save": {"max_shard_size": "50KB"}},
}  # fmt: skip


@pytest.fixture
def interrupted(run: Runner, stop_at: Any) -> dict[str, Any]:
    with pytest.raises(Stopped), stop_at(blockwise, "_quantize_block", 2):
        run("out", **TUNED)
    return TUNED


def test_changed_settings_are_refused_by_name(interrupted: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    before = tree(tmp_path / "space")
    for name, change in CHANGES.items():
        with pytest.raises(ConfigError, match=rf"holds an interrupted run that differs: .*{name}.* then, .* now"):
            run("out", **{**interrupted, **change})
    assert tree(tmp_path / "space") == before  # and nothing of it is lost
    run("out", **interrupted, low_gpu_mem_usage=True)  # decides no byte


def test_versions_are_compared(interrupted: dict[str, Any], run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.run import fingerprint

    monkeypatch.setattr(fingerprint, "__version__", "9.9.9")
    with pytest.raises(ConfigError, match='version of auto_round: ".*" then, "9.9.9" now'):
        run("out", **interrupted)


@pytest.mark.parametrize("save", [{"overwrite": True}, {"resume": False}], ids=repr)
def test_starting_anew(
    save: dict[str, Any], interrupted: dict[str, Any], run: Runner, tmp_path: Path, space: Path
) -> None:
    changed = {**interrupted, "seed": 7}
    assert tree(run("out", save=save, **changed)) == tree(run("whole", **changed))
    assert not left_in(space)


def test_who_removed_the_folder_starts_anew(interrupted: dict[str, Any], run: Runner, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out")
    changed = {**interrupted, "seed": 7}
    assert tree(run("out", **changed)) == tree(run("whole", **changed))


def test_a_copied_model_resumes_and_a_changed_one_does_not(
    run: Runner, stop_at: Any, packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    whole = run("whole", **TUNED)
    copies = [tmp_path / "a" / "llama", tmp_path / "b" / "llama"]
    for copy in copies:
        shutil.copytree(packable_folder("llama"), copy)
        os.utime(copy / "model.safetensors", (1, 1 + copies.index(copy)))
    with pytest.raises(Stopped), stop_at(blockwise, "_quantize_block", 2):
        run("out", model=str(copies[0]), **TUNED)
    weights = load_file(copies[1] / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[0:999] += 0.01
        save_file(changed, copies[1] / "model.safetensors", {"format": "pt"})
        words = "weights of model.layers.0" if "layers" in name else "inputs of the first block"
        with pytest.raises(ConfigError, match=words):
            run("out", model=str(copies[1]), **TUNED)
    save_file(weights, copies[1] / "model.safetensors", {"format": "pt"})
    run("out", model=str(copies[1]), **TUNED)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_another_model_is_refused(interrupted: dict[str, Any], run: Runner) -> None:
    with pytest.raises(ConfigError, match="config.json|weight file"):
        run("out", family="mistral", **interrupted)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
    elif how == "cut":
        data = data[:-3]
    path.write_bytes(data)
    if how == "removed":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "removed"])
def test_a_damaged_journal_is_never_used(how: str, run: Runner, stop_at: Any, tmp_path: Path, space: Path) -> None:
    whole = tree(run("whole", **TUNED))
    with pytest.raises(Stopped), stop_at(blockwise, "_quantize_block", 2):
        run("out", **TUNED)
    (journal,) = (space / "resume").iterdir()
    names = sorted(path.name for path in journal.iterdir())
    kinds = [name.partition("-")[0] for name in names]
    assert kinds == ["full", "manifest.json", "quantized", "run.json", "smoke_sample", "unit"]
    kept, staged = tmp_path / "kept", tmp_path / "staged"
    shutil.copytree(journal, kept)
    shutil.copytree(tmp_path / "out", staged)
    for name in names:
        damage(journal / name, how)
        if how == "removed" and name.endswith(".json"):  # as if nothing had been finished
            run("out", **TUNED)
            assert tree(tmp_path / "out") == whole
            shutil.rmtree(tmp_path / "out")
            shutil.copytree(staged, tmp_path / "out")
        else:
            with pytest.raises(OutputError, match=rf"journal of the interrupted run is damaged: .*{name}.*--overwrite"):
                run("out", **TUNED)
        shutil.rmtree(space, ignore_errors=True)
        shutil.copytree(kept, journal)
    damage(journal / names[0], "flip")
    assert tree(run("out", save={"overwrite": True}, **TUNED)) == whole


@pytest.mark.parametrize("formats", ["auto_round", "gguf:q4_0"])
@pytest.mark.parametrize("how", ["flip", "cut", "removed"])
def test_a_damaged_output_is_never_used(
    how: str, formats: str, run: Runner, stop_at: Any, tmp_path: Path, space: Path
) -> None:
    kwargs = {"iters": 0} | ({"group_size": None} if "gguf" in formats else {})
    whole = tree(run("whole", formats=formats, **kwargs))
    with pytest.raises(Stopped), stop_at(blockwise, "_quantize_block", 2):
        run("out", formats=formats, **kwargs)
    (path,) = (tmp_path / "out" / ".partial").iterdir()
    data = path.read_bytes().rstrip(b"\0")  # a GGUF file has its whole size already
    path.write_bytes(data)
    damage(path, how)
    if how == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(OutputError, match=rf"output of the interrupted run is damaged: .*{path.name}.*--overwrite"):
        run("out", formats=formats, **kwargs)
    assert tree(run("out", formats=formats, save={"overwrite": True}, **kwargs)) == whole
    assert not left_in(space)


def test_a_shard_that_was_renamed_is_continued(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    save = {"max_shard_size": "40KB"}
    whole = tree(run("whole", save=save, **TUNED))
    with pytest.raises(KeyboardInterrupt), stop_at(PartialFile, "seal", 4):
        run("out", save=save, **TUNED)
    assert len(list(tmp_path.glob("out/.partial/*.safetensors"))) == 3
    assert tree(run("out", save=save, **TUNED)) == whole


def test_a_published_folder_that_was_changed_is_named(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    """Of two formats one is published, and then damaged; its unfinished files are no longer there."""
    with pytest.raises(KeyboardInterrupt), stop_at(folder_output, "verify_folder", 2):
        run("out", formats="auto_round,fake", **TUNED)
    damage(tmp_path / "out" / "auto-round" / "model.safetensors", "flip")
    with pytest.raises(OutputError, match="output of the interrupted run is damaged: .*missing.*--overwrite"):
        run("out", formats="auto_round,fake", **TUNED)


def test_a_journal_of_another_version_is_refused(
    interrupted: dict[str, Any], run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("auto_round.run.journal.VERSION", 4)
    with pytest.raises(ConfigError, match="version of the journal: 3 then, 4 now"):
        run("out", **interrupted)


def test_an_error_keeps_the_blocks_too(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    whole = tree(run("whole", **TUNED))
    with pytest.raises(MemoryError), stop_at(blockwise, "_quantize_block", 2, MemoryError):
        run("out", **TUNED)
    assert tree(run("out", **TUNED)) == whole


def test_an_unfinished_folder_does_not_open(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stop_at(staging, "_move", 2):
        run("out", **TUNED)
    (tmp_path / "out" / ".partial").mkdir(exist_ok=True)  # as a kill leaves it
    with pytest.raises(ModelError, match="unfinished quantization; run the same command again"):
        AutoRound(tmp_path / "out")


def test_what_is_overwritten_stays_until_the_new_is_checked(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    old = tree(run("out", **TUNED))
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="not empty: no earlier run wrote mine.txt"):
        run("out", **TUNED, seed=7)
    (tmp_path / "out" / "mine.txt").unlink()
    with pytest.raises(KeyboardInterrupt), stop_at(folder_output, "verify_folder"):
        run("out", **TUNED, seed=7, save={"overwrite": True, "max_shard_size": "50KB"})
    assert {n: data for n, data in tree(tmp_path / "out").items() if not n.startswith(".partial/")} == old
    run("out", **TUNED, seed=7, save={"overwrite": True, "max_shard_size": "50KB"})
    assert tree(tmp_path / "out") == tree(run("whole", **TUNED, seed=7, save={"max_shard_size": "50KB"}))


def test_a_model_object_keeps_no_journal(
    run: Runner, stop_at: Any, packable_model: Any, tmp_path: Path, space: Path
) -> None:
    with pytest.raises(Stopped, match="in block 2 of 2; the same command starts anew"):
        with stop_at(blockwise, "_quantize_block", 2):
            run("out", model=packable_model("llama"), **TUNED)
    assert not left_in(space)


def test_saved_importance_is_that_of_all_blocks(run: Runner, stop_at: Any, tmp_path: Path) -> None:
    files = []
    for name in ("whole", "out"):
        kwargs = {**GGUF, "formats": "gguf:q4_0", "save_imatrix": str(tmp_path / "imatrix.dat")}
        if name == "out":
            with pytest.raises(Stopped), stop_at(blockwise, "_quantize_block", 2):
                run(name, **kwargs)
        run(name, **kwargs)
        files.append((tmp_path / "imatrix.dat").read_bytes())
    assert files[0] == files[1]
