"""Tuning a mixture of experts against a dense model with the same active products and the same weights to round.

    python bench/moe.py [--steps 50 --peer_python /path/to/peer-venv/bin/python] [--out bench/results/moe.json]

Two random models of one block width: Qwen3-MoE with `--experts` experts of which `--active` see each token, and a dense
Qwen3 whose MLP is as wide as the active experts together. The dense model has fewer weights to round; what rounding
the rest costs (steps of their learnables, without any product) is measured by itself and added. The peer, with
`--peer_python`, tunes the same two models; it is timed as a whole process, and so are we for that comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from programs import run, variables
from vs_peer import machine

HERE = Path(__file__).parent


def save_models(a: argparse.Namespace, folder: Path) -> dict[str, Path]:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = dict(
        hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        vocab_size=512, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common,
            num_experts=a.experts,
            num_experts_per_tok=a.active,
            moe_intermediate_size=a.expert_width,
            intermediate_size=a.expert_width,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
        )  # fmt: skip
    )
    dense = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=a.active * a.expert_width))
    paths = {}
    for name, model in (("moe", moe), ("dense", dense)):
        paths[name] = folder / name
        model.to(torch.bfloat16).save_pretrained(paths[name])
        _save_tokenizer(paths[name])
    return paths


def _save_tokenizer(folder: Path) -> None:
    """Of bytes; the samples are ids, but the peer asks for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def tune(path: Path, a: argparse.Namespace, out: Path) -> float:
    """Seconds spent in the blocks."""
    from auto_round import AutoRound

    samples = torch.randint(3, 500, (a.samples, a.seqlen), generator=torch.Generator().manual_seed(1))
    ar = AutoRound(
        str(path), scheme="W4A16", group_size=64, dataset=list(samples[:, None]), nsamples=a.samples, seqlen=a.seqlen,
        iters=a.steps, batch_size=8, verify=False,
    )  # fmt: skip
    ar.quantize_and_save(str(out))
    report = json.loads((out / "report.json").read_text())
    return sum(block["seconds"] for block in report["blocks"])


def rounding(a: argparse.Namespace) -> float:
    """Seconds for searching, stepping and refreshing the weights that only the mixture has, all blocks and steps."""
    from auto_round.algorithms.base import LayerTask
    from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup
    from auto_round.schemes import QuantizationScheme

    extra = a.experts - a.active
    scheme = QuantizationScheme(4, 64)
    shapes = [(2 * extra * a.expert_width, a.hidden), (extra * a.hidden, a.expert_width)]
    total = 0.0
    for shape in shapes:
        task = LayerTask("extra", torch.nn.Identity(), torch.randn(shape) * 0.02, scheme)
        start = time.monotonic()
        group = LearnableGroup([task], [task.start(True, torch.float16)], torch.float32)
        total += time.monotonic() - start
        group.gradient.normal_()
        start = time.monotonic()
        for _ in range(10):
            group._with_gradient.add(0)
            group.step(1e-3, 1e-3)
        total += (time.monotonic() - start) / 10 * a.steps
        start = time.monotonic()
        group.finish()
        total += time.monotonic() - start
    return total * a.layers


def peer(path: Path, a: argparse.Namespace, out: Path) -> float:
    """Wall seconds of the peer's process."""
    code = (
        "import sys, torch\nfrom auto_round import AutoRound\n"
        "if __name__ == '__main__':\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        f"    ids = torch.randint(3, 500, ({a.samples}, {a.seqlen}), generator=torch.Generator().manual_seed(1))\n"
        "    data = [{'input_ids': i[None], 'attention_mask': torch.ones_like(i[None])} for i in ids]\n"
        "    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "    ar = AutoRound(model, tokenizer, scheme='W4A16', group_size=64, dataset=data,\n"
        f"        nsamples={a.samples}, seqlen={a.seqlen}, iters={a.steps}, batch_size=8, amp=False,\n"
        "        device_map='cpu')\n"
        "    ar.quantize_and_save(sys.argv[2], format='auto_round')\n"
    )
    script = out.parent / f"peer-{out.name}.py"
    script.write_text(code)
    _, cost = run([a.peer_python, str(script), str(path), str(out)], "the peer", variables(own=False))
    return cost["wall"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("steps", 50), ("hidden", 256), ("layers", 2), ("experts", 32), ("active", 4),
                        ("expert_width", 256), ("samples", 16), ("seqlen", 256)):  # fmt: skip
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--peer_python", help="python of a venv with auto-round==0.16.1")
    p.add_argument("--out")
    a = p.parse_args()
    print(machine())
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        paths = save_models(a, folder)
        for name in ("dense", "moe"):
            result[name] = tune(paths[name], a, folder / f"ours-{name}")
            print(f"ours  {name:<6}{result[name]:>8.1f} s in the blocks")
        result["rounding"] = rounding(a)
        result["ratio"] = result["moe"] / (result["dense"] + result["rounding"])
        print(f"rounding the weights that only the mixture has: {result['rounding']:.1f} s")
        print(f"mixture / (dense + rounding): {result['ratio']:.2f}")
        if a.peer_python:
            for name in ("dense", "moe"):
                result[f"peer_{name}"] = peer(paths[name], a, folder / f"peer-{name}")
                print(f"peer  {name:<6}{result[f'peer_{name}']:>8.1f} s, the whole process")
            print(f"peer, mixture / dense: {result['peer_moe'] / result['peer_dense']:.2f}")
    if a.out:
        settings = {k: v for k, v in vars(a).items() if k not in ("out", "peer_python")}
        record = {"machine": machine(), "settings": settings, "seconds": result}
        Path(a.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
