"""Count the functions that one weight passes in the main job, from the checkpoint to the shard.

    python tools/weight_walk.py            the functions in the order in which the weight first reaches them, and counts
    python tools/weight_walk.py --depth 3  also those that pass on what holds the weight

A tiny model is tuned and saved as W4A16 with verification. A function counts when it takes or returns the weight of one
layer, its codes, scales or packed words: tensors whose shapes no other layer has. With `--depth`, also tuples, lists,
dicts and dataclasses that hold them, up to this depth, and methods of such objects. Comprehensions are parts of their
function. What verifies the saved model comes after the shard and is counted apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent / "auto_round"
OUT, IN, GROUP = 64, 160, 32
LAYER = "model.layers.0.mlp.down_proj"
# The weight, its codes, rows of scales and zero points, packed words; alone, stacked with others, or in groups.
SHAPES = {(OUT, IN), (OUT, IN // GROUP), (IN // GROUP, OUT), (IN // 8, OUT), (OUT, IN // GROUP, GROUP)}


def tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors in a value, inside containers too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in list(dict.values(value)) if isinstance(value, dict) else ():
            yield from tensors(part, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from tensors(part, depth - 1)


def holds_weight(value: Any, depth: int) -> bool:
    """Whether the value is a tensor of the layer, or holds one."""
    for tensor in tensors(value, depth):
        shape = tuple(tensor.shape)
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        if shape in SHAPES and not tensor.is_meta:
            return True
    return False


class Walk:
    """The functions of the package that held the weight, by (file, function), with the number of calls."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.calls: Counter[tuple[str, str]] = Counter()

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<")
        if event not in ("call", "return") or not ours:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        held = [arg] if event == "return" else [frame.f_locals.get(name) for name in names]
        if any(holds_weight(value, self.depth) for value in held):
            file = str(Path(code.co_filename).relative_to(ROOT))
            self.calls[file, getattr(code, "co_qualname", code.co_name)] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=0, help="depth of containers to look into")
    depth = parser.parse_args().depth

    from auto_round import AutoRound

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=OUT, intermediate_size=IN, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    walk = Walk(depth)
    with tempfile.TemporaryDirectory() as work:
        LlamaForCausalLM(config).save_pretrained(f"{work}/model")
        data = [torch.randint(0, 128, (32,)) for _ in range(8)]
        job = AutoRound(
            f"{work}/model", scheme="W4A16", group_size=GROUP, iters=2, nsamples=8, seqlen=32, dataset=data,
            ignore_layers="layers.1", device_map="cpu",
        )  # fmt: skip
        threading.setprofile(walk.profile)
        sys.setprofile(walk.profile)
        try:
            job.quantize_and_save(f"{work}/out")
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    for (file, name), count in walk.calls.items():
        print(f"{file:55} {name:50} {count}")
    names = list(walk.calls)
    shard = 1 + max(index for index, (_, name) in enumerate(names) if name.startswith("ShardWriter."))
    for what, part in (("to the shard", names[:shard]), ("afterwards, only there", names[shard:])):
        print(f"{what}: {len(part)} functions in {len({file for file, _ in part})} files")


if __name__ == "__main__":
    main()
