from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.calibration.capture import capture_inputs
from auto_round.modeling.source import open_source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["path", "live"])
@pytest.mark.parametrize("store", ["cpu", "cuda"])
def test_walk_on_the_gpu_equals_the_cpu(kind: str, store: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = small_llama()
    samples = [{"input_ids": torch.randint(3, 96, (11,)), "attention_mask": torch.ones(11).long()} for _ in range(3)]
    samples[1]["attention_mask"][:4] = 0
    batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
    with torch.no_grad():
        wanted = model(**batch).logits
    given: Any = model
    if kind == "path":
        given = tmp_path_factory.mktemp("model")
        model.save_pretrained(given)
    source = open_source(given)
    captured = capture_inputs(source, samples, device="cuda", store_device=store)
    assert captured.hidden.device.type == store
    hidden = captured.hidden.cuda()
    with torch.no_grad():
        for i, name in enumerate(source.blocks):
            block = source.load(name, "cuda")
            assert all(p.is_cuda for p in block.parameters())
            hidden = captured.run(i, block, hidden, [0, 1, 2])
            source.release(name)
        logits = captured.run_head(source, hidden, [0, 1, 2])
    kept = captured.loss_mask
    torch.testing.assert_close(logits.cpu()[kept], wanted[kept], rtol=1e-3, atol=1e-3)
    assert {p.device.type for p in source.model.parameters()} == {"meta" if kind == "path" else "cpu"}
    if kind == "live":
        assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
