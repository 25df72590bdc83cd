"""Features of the user guide that this version lacks, as one table with the error message of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.errors import MissingFeatureError, UnsupportedError


@dataclass(frozen=True)
class Feature:
    """A feature that this version does not have."""

    what: str  # its name in messages
    instead: str  # what to use instead
    names: tuple[str, ...]  # flags and keywords that request it, without leading dashes
    classes: tuple[str, ...]  # of the Python interface

    def sentence(self, spelling: str) -> str:
        """The error message, where `spelling` is what the user wrote."""
        return f"{spelling}: {self.what} is not available in this version; {self.instead}"


def _feature(what: str, instead: str, names: str = "", classes: str = "") -> Feature:
    return Feature(what, instead, tuple(names.split()), tuple(classes.split()))


_TEXT = "text models (causal language models) work"
_TUNED = "the algorithms of this version are auto_round (tuned rounding) and rtn"

AUTO_SCHEME = _feature(
    "AutoScheme (mixed bits chosen automatically)", "give mixed bits by hand with layer_config (--layer_config)",
    "avg_bits target_bits options option shared_layers ignore_scale_zp_bits", "AutoScheme",
)  # fmt: skip
AWQ = _feature(
    "AWQ smoothing", _TUNED,
    "duo_scaling n_grid awq_duo_scaling awq_n_grid awq_seqlen awq_smooth_batch_size awq_apply_clip awq_clip_as_init "
    "apply_smooth smooth_iters apply_clip clip_as_init clip_n_grid clip_max_shrink clip_n_sample_token "
    "smooth_batch_size skip_moe mappings",
    "AWQConfig",
)  # fmt: skip
ROTATION = _feature(
    "rotation", "quantize without rotation",
    "rotation_config rotation_type rotation_hadamard_type rotation_backend rotation_block_size hadamard_type "
    "block_size fuse_online_to_weight allow_online_rotation spinquant",
    "RotationConfig SpinQuantConfig",
)  # fmt: skip
SVDQUANT = _feature(
    "SVDQuant", _TUNED,
    "svdquant_rank enable_svdquant_smooth svdquant_smooth_num_grids svdquant_smooth_max_calibration_calls "
    "svdquant_residual_iters enable_svdquant_residual_early_stop svdquant_low_rank_dtype svdquant_target_modules "
    "svdquant_exclude_modules svdquant_model_adapter",
    "SVDQuantConfig",
)  # fmt: skip
SIGN_ROUND_V2 = _feature(
    "SignRound v2", "tuned rounding block by block works: SignRoundConfig, without enable_alg_ext", "enable_alg_ext"
)
TUNING_VARIANT = _feature(
    "this tuning variant", "tuned rounding block by block, without these options",
    "enable_lfq enable_norm_bias_tuning nblocks dynamic_max_gap lr_scheduler optimizer",
)  # fmt: skip
MULTIMODAL = _feature(
    "quantizing multimodal models", _TEXT, "quant_nontext_module extra_data_dir template processor image_processor"
)
DIFFUSION = _feature(
    "quantizing diffusion models", _TEXT,
    "prompt_file prompt metrics metric image_save_dir guidance_scale num_inference_steps generator_seed "
    "pipeline_call_kwargs",
)  # fmt: skip
TASKS = _feature(
    "evaluation on tasks (lm-eval)",
    "--eval measures perplexity, KL divergence and top-1 agreement on local text (--eval_text, --reference); from "
    "Python, auto_round.eval.evaluation.simple_evaluate calls lm-eval",
    "tasks task limit num_fewshot eval_gen_kwargs fewshot_as_multiturn eval_task_by_task",
)
VLLM = _feature("the vLLM back end of evaluation", "--eval runs the model with Transformers", "vllm_args")
FIRST_LAYERS = _feature(
    "a run on the first layers of a model alone",
    "choose what is quantized with to_quant_block_names (--to_quant_block_names)",
    "num_hidden_layers",
)

FEATURES: tuple[Feature, ...] = (
    AUTO_SCHEME, AWQ, ROTATION, SVDQUANT, SIGN_ROUND_V2, TUNING_VARIANT, MULTIMODAL, DIFFUSION, TASKS, VLLM,
    FIRST_LAYERS,
)  # fmt: skip

# Values, beside None and False, that leave a feature off: the defaults that scripts spell out.
_DEFAULT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "nblocks": (1,), "dynamic_max_gap": (-1,), "guidance_scale": (7.5,), "num_inference_steps": (50,),
    "metrics": ("clip",), "metric": ("clip",), "image_save_dir": ("./tmp_image_save",), "rotation_backend": ("auto",),
    "pipeline_call_kwargs": ({},),
}  # fmt: skip
# Values of known flags that request a missing feature.
VALUES: Mapping[tuple[str, str], Feature] = {("eval_backend", "vllm"): VLLM}
# Algorithms of the guide that this version lacks.
ALGORITHMS: Mapping[str, Feature] = {
    "awq": AWQ, "svdquant": SVDQUANT, "hadamard": ROTATION, "random_hadamard": ROTATION, "quarot_hadamard": ROTATION,
    "quarot": ROTATION, "spinquant": ROTATION, "sign_roundv2": SIGN_ROUND_V2, "signroundv2": SIGN_ROUND_V2,
    "sign_round_v2": SIGN_ROUND_V2,
}  # fmt: skip

_FLOAT_SCHEME = "the small float schemes of this version are MXFP4, MXFP8 and NVFP4"
# Presets of the guide that this version lacks.
SCHEMES: Mapping[str, Feature] = {
    "MXFP6": _feature("MXFP6 (6-bit floats with a shared scale)", _FLOAT_SCHEME),
    "NVFP4_E5M3": _feature("NVFP4 with scales in E5M3", _FLOAT_SCHEME),
}

# By the flags and keywords (underscores, no leading dashes) that request them.
REFUSED: Mapping[str, Feature] = {name: feature for feature in FEATURES for name in feature.names}
_BY_CLASS: Mapping[str, Feature] = {name: feature for feature in FEATURES for name in feature.classes}


def is_default_value(name: str, value: Any) -> bool:
    """Whether `value` of a missing feature's keyword leaves the feature off."""
    return value is None or value is False or value in _DEFAULT_VALUES.get(name, ())


def refuse(feature: Feature | None, spelling: str) -> None:
    """Raise UnsupportedError for what the user wrote, if it requests a missing feature."""
    if feature is not None:
        raise UnsupportedError(feature.sentence(spelling))


def refuse_keyword(name: str, value: Any) -> None:
    """Raise UnsupportedError when the keyword `name` with this value requests a missing feature."""
    if not is_default_value(name, value):
        refuse(REFUSED.get(name), f"{name}={value!r}")


def refuse_algorithm(spelling: str, name: str) -> None:
    """Raise UnsupportedError when `name` is an algorithm of the guide that this version lacks."""
    refuse(ALGORITHMS.get(name.strip().lower().replace("-", "_")), spelling)


def missing_classes(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for `module` that refuses the classes of missing features with MissingFeatureError, which is an
    ImportError."""

    def module_getattr(name: str) -> Any:
        if name in _BY_CLASS:
            raise MissingFeatureError(_BY_CLASS[name].sentence(name))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return module_getattr
