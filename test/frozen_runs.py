"""Digests of what whole runs write, to tell whether a change of the code changes a byte.

    python test/frozen_runs.py --save before.json        # on the code before the change
    python test/frozen_runs.py --compare before.json     # after it, on the same machine

Runs that only round weights to the nearest code use elementwise arithmetic and give the same bytes on every machine:
their digests are committed (`frozen_runs.json`) and compared by `test_cpu/run/test_frozen_runs.py`. Runs that
use forward passes, searches or tuning depend on the CPU's matrix products, so they are compared on one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # float32 products, as in the tests

import numpy as np
import torch

RECORD = Path(__file__).with_suffix(".json")
_IGNORED_KEYS = ("autoround_version", "transformers_version", "version")
_WIDE: dict[str, Any] = dict(
    vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _WIDE | dict(tie_word_embeddings=False)),
    "tied": ("LlamaConfig", _WIDE | dict(tie_word_embeddings=True)),
    "experts": (
        "Qwen3MoeConfig",
        _WIDE | dict(
            head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
    "gguf": ("LlamaConfig", _WIDE | dict(hidden_size=256, intermediate_size=256, tie_word_embeddings=False)),
}  # fmt: skip


@dataclass(frozen=True)
class FrozenRun:
    """One run whose output is frozen.

    Attributes:
        model: a key of MODELS.
        format: what `quantize_and_save` is given.
        options: arguments of `AutoRound` beside the model.
        exact: True when the bytes do not depend on the machine.
    """

    model: str
    format: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True


def _rounded(**options: Any) -> dict[str, Any]:
    return {"iters": 0, "disable_opt_rtn": True, **options}


def _tuned(**options: Any) -> dict[str, Any]:
    return {"iters": 12, **options}


_INT = {"scheme": "W4A16", "group_size": 32}
RUNS: dict[str, FrozenRun] = {
    "rtn-auto_round": FrozenRun("llama", "auto_round", _rounded(**_INT)),
    "rtn-auto_round-w3": FrozenRun("llama", "auto_round", _rounded(scheme="W3A16", group_size=32)),
    "rtn-auto_round-w2-asym": FrozenRun("llama", "auto_round", _rounded(scheme="W2A16", group_size=32, sym=False)),
    "rtn-auto_round-head": FrozenRun("llama", "auto_round", _rounded(**_INT, quant_lm_head=True)),
    "rtn-auto_round-mixed": FrozenRun(
        "llama", "auto_round", _rounded(**_INT, layer_config={"k_proj": {"bits": 8}, "down_proj": {"bits": 16}})
    ),
    "rtn-auto_gptq": FrozenRun("llama", "auto_gptq", _rounded(**_INT)),
    "rtn-auto_gptq-asym": FrozenRun("llama", "auto_gptq", _rounded(**_INT, sym=False)),
    "rtn-auto_awq": FrozenRun("llama", "auto_awq", _rounded(**_INT, sym=False)),
    "rtn-auto_round-awq": FrozenRun("llama", "auto_round:auto_awq", _rounded(**_INT, sym=False)),
    "rtn-llm_compressor": FrozenRun("llama", "llm_compressor", _rounded(**_INT)),
    "rtn-llm_compressor-int8": FrozenRun("llama", "llm_compressor", _rounded(scheme="INT8")),
    "rtn-mlx": FrozenRun("llama", "mlx", _rounded(**_INT, sym=False)),
    "rtn-fake": FrozenRun("tied", "fake", _rounded(**_INT)),
    "rtn-fp8_block": FrozenRun("gguf", "fp8", _rounded(scheme="FP8_BLOCK")),
    "rtn-mxfp4": FrozenRun("llama", "auto_round", _rounded(scheme="MXFP4")),
    "rtn-mxfp8-llm_compressor": FrozenRun("llama", "llm_compressor", _rounded(scheme="MXFP8")),
    "rtn-mxint4": FrozenRun("llama", "auto_round", _rounded(scheme="MXINT4")),
    "rtn-experts": FrozenRun("experts", "auto_round", _rounded(**_INT)),
    "rtn-experts-mxfp4": FrozenRun("experts", "llm_compressor", _rounded(scheme="MXFP4")),
    "rtn-gguf-q4_0": FrozenRun("gguf", "gguf:q4_0", _rounded()),
    "rtn-gguf-q8_0": FrozenRun("gguf", "gguf:q8_0", _rounded()),
    "rtn-gguf-q4_k_m": FrozenRun("gguf", "gguf:q4_k_m", _rounded(), exact=False),
    "rtn-gguf-q2_k_s": FrozenRun("gguf", "gguf:q2_k_s", _rounded(), exact=False),
    "free-auto_round": FrozenRun("llama", "auto_round", {**_INT, "model_free": True}),
    "free-mxfp4": FrozenRun("tied", "llm_compressor", {"scheme": "MXFP4", "model_free": True}),
    "free-experts": FrozenRun("experts", "auto_round", {**_INT, "model_free": True}),
    "search-auto_round": FrozenRun("llama", "auto_round", {**_INT, "iters": 0}, exact=False),
    "search-w2-asym": FrozenRun("llama", "auto_round", {"scheme": "W2A16G32", "sym": False, "iters": 0}, exact=False),
    "search-mxfp4": FrozenRun("llama", "auto_round", {"scheme": "MXFP4", "iters": 0}, exact=False),
    "search-experts": FrozenRun("experts", "auto_round", {**_INT, "iters": 0}, exact=False),
    "search-gguf-q4_k_m": FrozenRun("gguf", "gguf:q4_k_m", {"iters": 0}, exact=False),
    "search-gguf-q2_k_s": FrozenRun("gguf", "gguf:q2_k_s", {"iters": 0}, exact=False),
    "search-gguf-q5_1": FrozenRun("gguf", "gguf:q5_1", {"iters": 0}, exact=False),
    "tuned-auto_round": FrozenRun("llama", "auto_round", _tuned(**_INT), exact=False),
    "tuned-w2-asym": FrozenRun("tied", "auto_round", _tuned(scheme="W2A16G32", sym=False), exact=False),
    "tuned-head": FrozenRun("llama", "auto_gptq", _tuned(**_INT, quant_lm_head=True), exact=False),
    "tuned-adam": FrozenRun("llama", "auto_round", _tuned(**_INT, enable_adam=True), exact=False),
    "tuned-mxfp4": FrozenRun("llama", "auto_round", _tuned(scheme="MXFP4"), exact=False),
    "tuned-nvfp4": FrozenRun("llama", "llm_compressor", _tuned(scheme="NVFP4"), exact=False),
    "tuned-fp8_static": FrozenRun("llama", "llm_compressor", _tuned(scheme="FP8_STATIC"), exact=False),
    "tuned-int8": FrozenRun("llama", "llm_compressor", _tuned(scheme="INT8"), exact=False),
    "tuned-kv-cache": FrozenRun("llama", "auto_round", _tuned(**_INT, static_kv_dtype="fp8"), exact=False),
    "tuned-experts": FrozenRun("experts", "auto_round", _tuned(**_INT), exact=False),
    "tuned-experts-mxfp4": FrozenRun("experts", "llm_compressor", _tuned(scheme="MXFP4"), exact=False),
    "tuned-gguf-q4_k_m": FrozenRun("gguf", "gguf:q4_k_m", _tuned(), exact=False),
    "tuned-gguf-q4_0": FrozenRun("gguf", "gguf:q4_0", {"iters": 40, "lr": 0.05}, exact=False),
}


def save_model(name: str, folder: Path) -> Path:
    """Save a model of MODELS whose weights are whole multiples of 1/4096 from NumPy's generator, so that they are the
    same everywhere; with a byte tokenizer. The folder's name ends up in GGUF files. Returns the folder."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kind, values = MODELS[name]
    config = getattr(transformers, kind)(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = np.random.Generator(np.random.PCG64(5))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            codes = generator.integers(-400, 401, (3, *parameter.shape)).sum(0)
            offset = 0.75 if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.from_numpy(codes).float() / 4096 + offset)
    model.to(torch.bfloat16).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<bos>", "<eos>", "<pad>"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def samples() -> list[torch.Tensor]:
    """Eight samples of 24 token ids."""
    generator = np.random.Generator(np.random.PCG64(7))
    return [torch.from_numpy(generator.integers(3, 250, 24)) for _ in range(8)]


def run(name: str, model: Path, out: Path) -> dict[str, str]:
    """Quantize, save, and return a digest by tensor (or GGUF file), and of what the configuration says."""
    from auto_round import AutoRound

    frozen = RUNS[name]
    options = {"nsamples": 8, "seqlen": 24, "batch_size": 4, "seed": 42, **frozen.options}
    if not options.get("model_free"):
        options["dataset"] = samples()
    AutoRound(str(model), device_map="cpu", **options).quantize_and_save(str(out), format=frozen.format)
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 by tensor of all safetensors files below `out`, by GGUF file, and of config.json without versions."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in sorted(out.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(key)
                head = f"{tensor.dtype}{list(tensor.shape)}".encode()
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[key] = hashlib.sha256(head + data).hexdigest()[:16]
    for file in sorted(out.rglob("*.gguf")):
        found[file.suffix] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    for file in sorted(out.rglob("config.json")):
        text = json.dumps(_without_versions(json.loads(file.read_text(encoding="utf-8"))), sort_keys=True)
        found["config.json"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _without_versions(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_versions(v) for k, v in value.items() if k not in _IGNORED_KEYS}
    return [_without_versions(v) for v in value] if isinstance(value, list) else value


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose digests differ, or that only one of the two has."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the digests of all runs here")
    parser.add_argument("--compare", type=Path, help="compare with the digests saved there")
    parser.add_argument("--freeze", action="store_true", help="write those that are the same everywhere to the record")
    parser.add_argument("-k", dest="only", default="", help="only runs whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        for name, frozen in RUNS.items():
            if args.only in name:
                if frozen.model not in made:
                    made[frozen.model] = save_model(frozen.model, Path(folder) / frozen.model)
                found[name] = run(name, made[frozen.model], Path(folder) / "out" / name)
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.freeze:
        exact = {name: digest for name, digest in found.items() if RUNS[name].exact}
        RECORD.write_text(json.dumps(exact, indent=1) + "\n", encoding="utf-8")
    wrong = {}
    if args.compare:
        before = json.loads(args.compare.read_text(encoding="utf-8"))
        wrong = {name: d for name in found if (d := differences(before.get(name, {}), found[name]))}
        for name, names in wrong.items():
            print(f"{name}: {len(names)} of {len(found[name])} differ: {', '.join(names[:4])}")
        print(f"{len(found) - len(wrong)} of {len(found)} runs are equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
