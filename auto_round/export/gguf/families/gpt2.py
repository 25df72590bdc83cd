"""GPT-2: learned positions, layer norms, biases. (Its weights are stored as [in, out]: see `Conversion.place`.)"""

from __future__ import annotations

from auto_round.export.gguf.families.shared import BLOCKS, CONTEXT, EMBEDDING, HEADS, NORM_EPSILON, activation, without
from auto_round.export.gguf.family import Assumption, Family, Key

GPT2 = Family(
    "gpt2", ("gpt2",),
    (BLOCKS, CONTEXT, EMBEDDING, Key("feed_forward_length", "uint32", lambda s: s.get("n_inner", default=4 * s.hidden)),
     HEADS, NORM_EPSILON),
    assumes=(
        activation("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        without("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        Assumption(lambda s: s.get("scale_attn_weights", default=True), "llama.cpp scales the scores of attention"),
    ),
)  # fmt: skip
