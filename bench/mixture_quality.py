"""GPTQ with experts one at a time against rounding and tuning whole blocks, on a mixture that is trained here.

    python bench/mixture_quality.py calib.txt eval_wiki.txt DIR [--save FILE]

A Qwen3-MoE of bytes is trained for a few minutes on one text. Each way quantizes it to W2A16 and W3A16, and the saved
model is compared with the trained one on another text: Kullback-Leibler divergence and nats a byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from vs_peer import machine

from auto_round import AutoRound
from auto_round.eval.measures import token_kl, token_nll

LENGTH = 128
CONFIG: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=3,
    num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=LENGTH, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True,
    router_aux_loss_coef=0.01, output_router_logits=True, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def pieces(file: Path, count: int, seed: int) -> torch.Tensor:
    """uint8 [count, LENGTH] from random places of a text."""
    text = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    starts = torch.randint(0, len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()])


def train(file: Path, steps: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    slower = torch.optim.lr_scheduler.OneCycleLR(rule, 2e-3, total_steps=steps)
    data = pieces(file, 16 * steps, 1).long().view(steps, 16, LENGTH)
    for step, batch in enumerate(data):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        slower.step()
        rule.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)


def ways(folder: Path, given: dict[str, Any]) -> Iterator[tuple[str, AutoRound]]:
    """Named tuners; the limit under which GPTQ replaces tuning is the largest that a tuned block does not keep."""
    yield "rounding", AutoRound(str(folder), **{**given, "iters": 0})
    alone = whole = AutoRound(str(folder), **given)
    while not alone.plan().fallback:
        alone = AutoRound(str(folder), **given, max_memory=alone.plan().peak_ram - 1)
    yield "GPTQ, experts one at a time", alone
    yield "whole blocks", whole


@torch.no_grad()
def measure(folder: Path, test: torch.Tensor, against: list[torch.Tensor] | None) -> tuple[list[torch.Tensor], Any]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = [model(input_ids=part.long()).logits for part in test.split(16)]
    nll = torch.cat([token_nll(y, x.long()).flatten() for y, x in zip(logits, test.split(16), strict=True)])
    result = {"nats a byte": float(nll.double().mean())}
    if against is not None:
        kl = torch.cat([token_kl(a, b).mean(-1) for a, b in zip(against, logits, strict=True)]).double()
        result |= {"kl": float(kl.mean()), "error": float(kl.std() / len(kl) ** 0.5)}
    return logits, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "work"):
        parser.add_argument(name, type=Path)
    for name, value in (("training_steps", 800), ("steps", 100), ("samples", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--save", type=Path)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    folder = a.work / f"mixture-{a.training_steps}"
    if not folder.exists():
        train(a.train, a.training_steps, folder)
    test = pieces(a.test, 128, 3)
    reference, found = measure(folder, test, None)
    rows: list[dict[str, Any]] = [{"way": "not quantized", **found}]
    print(rows[0], flush=True)
    data = list(pieces(a.train, a.samples, 2).long())
    for bits in a.bits:
        given = dict(
            scheme="W4A16", bits=bits, group_size=32, dataset=data, nsamples=a.samples, seqlen=LENGTH, iters=a.steps,
        )  # fmt: skip
        for way, tuner in ways(folder, given):
            out = a.work / "out"
            shutil.rmtree(out, ignore_errors=True)
            started = time.monotonic()
            tuner.quantize_and_save(str(out), overwrite=True)
            seconds = time.monotonic() - started
            rows.append({"bits": bits, "way": way, "seconds": seconds, **measure(out, test, reference)[1]})
            print(rows[-1], flush=True)
    if a.save:
        settings = {"training_steps": a.training_steps, "steps": a.steps, "samples": a.samples, "model": CONFIG}
        a.save.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
