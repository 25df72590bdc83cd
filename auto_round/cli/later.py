"""Flags that the guide names and this version cannot honour: they are refused before any work, never ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auto_round.errors import UnsupportedError


@dataclass(frozen=True)
class Later:
    """A feature that is not here yet: what it is, its flags, and what can be used today."""

    what: str
    flags: tuple[str, ...]
    instead: str


def _later(what: str, flags: str, instead: str) -> Later:
    return Later(what, tuple(flags.split()), instead)


_TEXT = "text models (causal language models) work"
_TUNED = "the algorithms of this version are auto_round (tuned rounding) and rtn"

FEATURES: tuple[Later, ...] = (
    _later(
        "AutoScheme (mixed bits chosen automatically)",
        "avg_bits target_bits options shared_layers ignore_scale_zp_bits",
        "give mixed bits by hand with --layer_config",
    ),
    _later(
        "AWQ smoothing",
        "duo_scaling n_grid awq_duo_scaling awq_n_grid awq_seqlen awq_smooth_batch_size awq_apply_clip "
        "awq_clip_as_init",
        _TUNED,
    ),
    _later(
        "rotation",
        "rotation_config rotation_type rotation_hadamard_type rotation_backend rotation_block_size "
        "fuse_online_to_weight allow_online_rotation spinquant",
        "quantize without rotation",
    ),
    _later(
        "SVDQuant",
        "svdquant_rank enable_svdquant_smooth svdquant_smooth_num_grids svdquant_smooth_max_calibration_calls "
        "svdquant_residual_iters enable_svdquant_residual_early_stop svdquant_low_rank_dtype "
        "svdquant_target_modules svdquant_exclude_modules svdquant_model_adapter",
        _TUNED,
    ),
    _later(
        "this tuning variant",
        "enable_alg_ext enable_lfq enable_norm_bias_tuning nblocks dynamic_max_gap lr_scheduler",
        "tuned rounding block by block, without these options",
    ),
    _later(
        "multimodal models",
        "mllm quant_nontext_module extra_data_dir template",
        _TEXT,
    ),
    _later(
        "diffusion models",
        "prompt_file prompt metrics metric image_save_dir guidance_scale num_inference_steps generator_seed",
        _TEXT,
    ),
    _later(
        "evaluation on tasks (lm-eval)",
        "tasks task limit num_fewshot eval_gen_kwargs fewshot_as_multiturn eval_task_by_task",
        "--eval measures perplexity, KL divergence and top-1 agreement on local text (--eval_text, --reference)",
    ),
    _later(
        "the vLLM back end of evaluation",
        "vllm_args",
        "--eval runs the model with Transformers",
    ),
)

# Flags that exist, with values that do not yet.
VALUES: tuple[tuple[str, str, Later], ...] = (
    ("eval_backend", "vllm", FEATURES[-1]),
)  # fmt: skip

_BY_FLAG: Mapping[str, Later] = {flag: feature for feature in FEATURES for flag in feature.flags}


def refused_names() -> list[str]:
    """Every spelling that is recognised and refused."""
    return sorted(_BY_FLAG)


def refuse(flag: str) -> None:
    """Raise UnsupportedError when `flag` (underscores, no dashes in front) belongs to a feature of a later version."""
    feature = _BY_FLAG.get(flag)
    if feature is not None:
        raise UnsupportedError(f"--{flag}: {feature.what} is not available in this version; {feature.instead}")


def refuse_value(flag: str, value: str) -> None:
    """Raise UnsupportedError when the value of a known flag asks for a feature of a later version."""
    for name, word, feature in VALUES:
        if (flag, value.lower()) == (name, word):
            raise UnsupportedError(
                f"--{flag} {value}: {feature.what} is not available in this version; {feature.instead}"
            )


def algorithm_iters(
    value: str, known_tuned: Sequence[str] = ("auto_round", "autoround", "sign_round", "signround")
) -> int | None:
    """What `--algorithm` means for `iters`: 0 for rtn, None for tuned rounding. UnsupportedError for the others."""
    name = value.strip().lower()
    if name == "rtn":
        return 0
    if name in known_tuned:
        return None
    raise UnsupportedError(f"--algorithm {value} is not available in this version; {_TUNED}")
