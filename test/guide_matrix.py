"""The user guide's table of formats and the presets that each takes."""

from __future__ import annotations

_INT = ("W4A16", "W2A16", "W3A16", "W8A16", "W2A16G64", "W2A16G32")
_MX = ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL")
_MLX = ("W2A16", "W2A16G64", "W2A16G32", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16", "BF16")
_GGUF = (
    "Q4_K_M", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q5_K_S", "Q5_K_M", "Q6_K", "Q4_0", "Q4_1", "Q5_0",
    "Q5_1", "Q8_0",
)  # fmt: skip
ALL_SCHEMES = ("all",)

GUIDE_MATRIX: dict[str, tuple[str, ...]] = {
    "auto_round": (*_INT, "W4A16_MIXED", *_MX, "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "BF16", "MXINT4"),
    "auto_round:auto_gptq": (*_INT, "W4A16_MIXED", "BF16"),
    "auto_round:auto_awq": ("W4A16", "BF16"),
    "auto_round:gptqmodel": (*_INT, "W4A16_MIXED", "BF16"),
    "auto_round:llm_compressor": ("NVFP4", "MXFP4", "MXFP8", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "INT8", "INT8_W8A8"),
    "auto_round:fp8": ("FP8_BLOCK",),
    "auto_round:mlx": _MLX,
    "auto_gptq": (*_INT, "W4A16_MIXED", "BF16"),
    "gptqmodel": (*_INT, "W4A16_MIXED", "BF16"),
    "auto_awq": ("W4A16", "BF16"),
    "llm_compressor": ("NVFP4", "MXFP4", "MXFP8", "FPW8A16", "FP8_STATIC", "FP8_BLOCK", "INT8", "INT8_W8A8", *_INT),
    "mlx": _MLX,
    "fp8": ("FP8_BLOCK",),
    **{f"gguf:{q.lower()}": (f"GGUF:{q}",) for q in _GGUF},
    "fake": ALL_SCHEMES,
}


def formats_for_preset(scheme_name: str) -> list[str]:
    """Formats of the guide's table that take the preset `scheme_name`, in the table's order."""
    return [name for name, schemes in GUIDE_MATRIX.items() if schemes is ALL_SCHEMES or scheme_name.upper() in schemes]
