"""What the plan counts is what the code holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from auto_round.algorithms.base import BlockTask
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.run.block_layers import layer_task
from auto_round.run.driver import Run
from auto_round.run.memory import MemoryModel

WIDE: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def run_of(job: Any) -> Run:
    """The run of an AutoRound, for its plans."""
    return Run(job._runs.source, job.settings, job.tokenizer)


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, seen)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name), seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("auto_round"):
        yield from tensors_in(vars(value), seen)


def storage_bytes(*values: Any) -> dict[int, int]:
    seen: set[int] = set()
    found = {}
    for value in values:
        for tensor in tensors_in(value, seen):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scheme": "W4A16"}, {"scheme": "W2A16", "group_size": 32, "sym": False}, {"scheme": "W8A16", "group_size": -1},
        {"scheme": "MXFP4"}, {"scheme": "NVFP4", "group_size": 16}, {"scheme": "GGUF:Q4_K_S"},
        {"scheme": "W4A16", "momentum": 0.9}, {"scheme": "W4A16", "enable_adam": True},
        {"scheme": "W4A16", "alg_configs": "gptq"}, {"scheme": "MXFP4", "alg_configs": "gptq"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("iters", [2, 20])
def test_learnables_hold_what_is_counted(
    kwargs: dict[str, Any], iters: int, make: Callable[..., Any], packable_folder: Callable[..., str]
) -> None:
    given = {"group_size": None, **kwargs, "iters": iters, "model_dtype": "bf16", "amp": False}
    run = run_of(make(packable_folder("llama", **WIDE), **given))
    job = run.plan([])
    block = run.source.blocks[0]
    plans = [p for n, p in job.quantized().items() if n.startswith(block)]
    module = run.source.load(block)
    tasks = [layer_task(run.source, plan) for plan in plans]
    for task in tasks:
        if task.ggml is not None or "alg_configs" in kwargs:  # as calibration gives them
            inputs = torch.randn(64, task.weight.shape[1], generator=torch.Generator().manual_seed(0))
            task.input_hessians = [inputs.T @ inputs]
    own = storage_bytes([[task.weight, task.input_hessians] for task in tasks])
    quantizer = run._quantizer(job)
    assert isinstance(quantizer, SignRoundQuantizer)
    whole = BlockTask(block, module, tasks, lambda hidden, _samples: hidden, torch.float32, 0)
    learnables, _ = quantizer._tunables(whole)
    for group in learnables:
        for index in range(len(group.tasks)):  # type: ignore[union-attr]
            rows, columns = group.tasks[index].weight.shape  # type: ignore[union-attr]
            group.add_weight_gradient(index, torch.ones(1, rows), torch.ones(1, columns))  # type: ignore[union-attr]
        group.step(0.01, 0.01)
    best = [group.snapshot() for group in learnables] if iters > 2 else []
    held = sum(size for where, size in storage_bytes(learnables, best).items() if where not in own)
    counted = MemoryModel(run.settings, run.source, job.layers, torch.float32).tuning(plans)
    assert counted.held == pytest.approx(held, rel=0.06)


def test_a_block_counts_all_its_tensors(make: Callable[..., Any], packable_folder: Callable[..., str]) -> None:
    run = run_of(make(packable_folder("gpt-oss"), iters=0, disable_opt_rtn=True))
    name = run.source.blocks[0]
    module = run.source.load(name)
    held = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert MemoryModel(run.settings, run.source, {}, torch.float32).module_bytes(name) == held


def test_kept_activations_are_counted_where_they_are(make: Callable[..., Any]) -> None:
    run = run_of(make("llama", iters=2, nsamples=500, seqlen=64))
    model = MemoryModel(run.settings, run.source, run.plan([]).layers, torch.float32)
    ram, file = model.plan("ram"), model.plan("file")
    assert file.spilled == 2 * 500 * 64 * 64 * 4 and ram.spilled == 0
    assert abs(ram.phases["block, quantized"] - file.phases["block, quantized"] - file.spilled) < 5_000_000
