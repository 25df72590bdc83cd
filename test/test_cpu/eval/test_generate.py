"""A first look at a model: the text is the one that Transformers generates, and the line about it is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_weights import int_format

from auto_round.errors import ConfigError, ModelError
from auto_round.eval.generate import Generation, count_backends, generate
from auto_round.inference.linear import QuantLinear


@pytest.fixture(scope="module")
def model(packable_model: Callable[..., Any]) -> Any:
    return packable_model("llama")


def test_the_likeliest_tokens(model: Any, byte_tokenizer: Any) -> None:
    pieces: list[str] = []
    got = generate(model, byte_tokenizer, "hello", max_new_tokens=9, on_text=pieces.append)
    ids = byte_tokenizer("hello", return_tensors="pt")
    with torch.no_grad():
        want = model.generate(input_ids=ids["input_ids"], max_new_tokens=9, do_sample=False, pad_token_id=0)
    new = want[0, ids["input_ids"].shape[1] :]
    assert got.text == byte_tokenizer.decode(new, skip_special_tokens=True) and got.new_tokens == len(new)
    assert got.prompt_tokens == ids["input_ids"].shape[1] and got.backends == {"dense": 15}
    assert "".join(pieces).rstrip("\ufffd") == got.text.rstrip("\ufffd")
    assert got.prefill_seconds > 0 and got.decode_seconds > 0


def test_samples_follow_the_seed_and_leave_the_random_state(model: Any, byte_tokenizer: Any) -> None:
    def draw(seed: int) -> str:
        return generate(model, byte_tokenizer, "a", max_new_tokens=12, do_sample=True, temperature=2.0, seed=seed).text

    before = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_chat_templates(model: Any, byte_tokenizer: Any) -> None:
    import copy

    chatty = copy.deepcopy(byte_tokenizer)
    chatty.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    plain = generate(model, chatty, "[hello]", max_new_tokens=3, chat=False)
    assert generate(model, chatty, "hello", max_new_tokens=3).text == plain.text
    assert generate(model, byte_tokenizer, "[hello]", max_new_tokens=3).text == plain.text
    with pytest.raises(ConfigError, match="no chat template; leave --chat out"):
        generate(model, byte_tokenizer, "hello", chat=True)


def test_what_makes_no_sense(model: Any, byte_tokenizer: Any, packable_model: Callable[..., Any]) -> None:
    for settings, says in (({"max_new_tokens": 0}, "max_new_tokens=0"), ({"temperature": 0.0}, "temperature=0.0")):
        with pytest.raises(ConfigError, match=says):
            generate(model, byte_tokenizer, "x", **settings)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the model.s own tokenizer"):
        generate(packable_model("llama", vocab_size=64), byte_tokenizer, "xyz")


def test_the_line_about_it(packable_model: Callable[..., Any]) -> None:
    said = Generation("x", 10, 5, 0.5, 2.0, {"ark": 3, "dense": 1}).describe()
    assert said.startswith("prefill 10 tokens in 0.50 s (20.0 tokens/s), decode 4 tokens in 2.00 s (2.0 tokens/s); ")
    assert "layers run with ark (3), dense (1); peak RAM " in said
    assert "decode" not in Generation("x", 10, 1, 0.5, 0.0, {}).describe()
    model = packable_model("llama")
    model.lm_head = QuantLinear(64, 288, int_format(4, 32, True, "gptq"))
    assert count_backends(model) == {"dense": 14, "torch": 1}
