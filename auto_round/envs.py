"""Environment variables: name, type, default and meaning of each, as one table, which docs/environments.md shows too.

`envs.AR_LOG_LEVEL` reads the variable at each access, so a value set later in the process counts.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, nearest

LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
# The values of each kind but "choice", as words.
_ALLOWED = {
    "path": "a folder", "text": "any text", "bool": "1/0, true/false, yes/no, on/off",
    "int": "a whole number of 1 or more", "count": "a whole number of 0 or more", "float": "a number of 0 or more",
}  # fmt: skip


@dataclass(frozen=True)
class EnvVar:
    """One variable."""

    name: str
    kind: str  # "choice" (any case), "path" (kept exactly as written), or another of `_ALLOWED`
    default: Any  # also where the variable is empty
    doc: str
    choices: tuple[str, ...] = ()  # of a "choice", in upper case
    idle: str = ""  # why the variable has no effect in this version

    def allowed(self) -> str:
        """Description of the allowed values."""
        return ", ".join(self.choices) or _ALLOWED[self.kind]

    def parse(self, text: str) -> Any:
        """The typed value of `text`. Raises ConfigError when it is not one of the allowed values."""
        word = text.strip()
        if self.kind in ("path", "text"):
            return text if self.kind == "path" else word
        if word.upper() in self.choices:
            return word.upper()
        if self.kind == "bool" and word.lower() in _TRUE + _FALSE:
            return word.lower() in _TRUE
        if self.kind in ("int", "count") and word.isdecimal() and int(word) >= (self.kind == "int"):
            return int(word)
        with contextlib.suppress(ValueError):
            if self.kind == "float" and 0 <= float(word) < float("inf"):
                return float(word)
        hint = nearest(word, self.choices)
        raise ConfigError(f"environment variable {self.name}={text!r} is not allowed; use {self.allowed()}{hint}")


def _idle(name: str, kind: str, default: Any, reason: str) -> EnvVar:
    return EnvVar(name, kind, default, f"No effect: {reason}.", idle=reason)


_NO_AUTO_SCHEME = "AutoScheme is not available in this version"
_NO_LLAMA_CPP = "GGUF files are written without llama.cpp's scripts"
_TRIM = "the C library's heap is trimmed when a run has freed enough memory"
# Variables of AutoRound 0.x that this version accepts without effect.
_IDLE: tuple[EnvVar, ...] = (
    _idle("AR_DISK_STREAM_MODEL", "bool", False, "a model given by path is always read from its files block by block"),
    _idle("AR_DISABLE_OFFLOAD", "bool", False, "no weights are moved to files and back; blocks are read when needed"),
    _idle("AR_ENABLE_COMPILE_PACKING", "bool", False, "packing is vectorised and needs no compiler"),
    _idle("AR_DISABLE_DATASET_SUBPROCESS", "bool", False, "calibration data are always prepared in this process"),
    _idle("AR_DISABLE_COPY_MTP_WEIGHTS", "bool", False,
          "weights that no module reads are copied, since the checkpoint's config refers to them"),
    _idle("AR_CALIB_STREAM_DEVICE", "text", None, "calibration runs on the device of device_map"),
    _idle("AR_ACT_SCALE", "float", 1.0, "the range of activations is not scaled"),
    _idle("AR_ENABLE_ACT_MINMAX_TUNING", "bool", False, "the range of activations is not tuned"),
    _idle("AR_SEARCH_SCALE_RATIO", "float", None, "the scale search uses a fixed range (docs/tuning.md)"),
    _idle("AR_DYNAMO_CACHE_SIZE_LIMIT", "int", 16, "PyTorch's own limits are not changed"),
    _idle("AR_FUSE_ONLINE_ROTATION", "bool", False, "rotation is not available in this version"),
    _idle("AR_FORCE_MOE_ROUTING_ALL_EXPERTS", "bool", False,
          "calibration routes as the model does; experts that few tokens reach are reported"),
    _idle("AR_NVFP4_E5M3_CACHE_HP_WEIGHT", "bool", False, "there is no NVFP4_E5M3 layer to cache a weight for"),
    _idle("AR_AUTO_SCHEME_NSAMPLES", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_BATCH_SIZE", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_SEQLEN", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_CACHE", "path", None, _NO_AUTO_SCHEME),
    _idle("AR_ENABLE_AUTO_SCHEME_PARALLEL", "bool", True, _NO_AUTO_SCHEME),
    _idle("AR_MLLM_DATASET_CACHE_SIZE", "count", 0, "multimodal models are not available in this version"),
    _idle("AR_ENABLE_MALLOC_TRIM", "bool", True, _TRIM),
    _idle("AR_MALLOC_TRIM_EVERY", "count", 0, _TRIM),
    _idle("AUTO_ROUND_CACHE", "path", None, _NO_LLAMA_CPP),
    _idle("AUTO_ROUND_GGUF_AUTO_UPDATE", "bool", False, _NO_LLAMA_CPP),
    _idle("LLAMA_CPP_ROOT", "path", None, _NO_LLAMA_CPP),
)  # fmt: skip

VARIABLES: tuple[EnvVar, ...] = (
    EnvVar("AR_LOG_LEVEL", "choice", "INFO",
           "How much is logged. DEBUG also prints the traceback of an unexpected error; TRACE adds one line per layer.",
           LOG_LEVELS),
    EnvVar("AR_WORK_SPACE", "path", "ar_work_space",
           "Folder for files that are not results, such as the traceback of an unexpected error. "
           "Upper and lower case are kept. Created when something is first written to it."),
    EnvVar("AR_USE_MODELSCOPE", "bool", False,
           "Fetch models named by id from ModelScope instead of the Hugging Face hub; "
           'the same as `--platform model_scope`. Needs `pip install "auto-round[modelscope]"`.'),
    EnvVar("AR_OMP_NUM_THREADS", "int", None,
           "CPU threads of the command line's process. Unset: PyTorch decides. "
           "From Python, call `torch.set_num_threads` yourself: a library does not change it."),
    EnvVar("AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE", "bool", True,
           "NVFP4: layers that runtimes fuse (q, k and v; gate and up) get one global scale for their weights and one "
           "for their inputs, as those runtimes expect. Off: each layer its own."),
    EnvVar("AR_ENABLE_UNIFY_MOE_INPUT_SCALE", "bool", False,
           "All routed experts of a block share one static input scale (static FP8, global scale of NVFP4)."),
    EnvVar("AR_GGUF_PRE_TOKENIZER", "text", None,
           "GGUF: llama.cpp's name of the pre-tokenizer (`tokenizer.ggml.pre`), such as `qwen2`. "
           "Unset: found from the tokenizer itself."),
    EnvVar("AR_PLUGINS", "text", None,
           "Files of Python code to load as plugins, as `--plugin` does; several are separated as in PATH. "
           "Also read when Transformers opens a quantized model."),
    EnvVar("AR_RESUME_DIR", "path", None,
           "Folder for the journals from which interrupted runs resume. Unset: a folder in AR_WORK_SPACE."),
    EnvVar("AR_MODEL_FREE_SHARD_PARALLELISM", "int", None,
           "Model-free mode: tensors processed at a time, unless `parallelism` is given. "
           "Unset: one for each core, 8 at most."),
    *_IDLE,
)  # fmt: skip


_BY_NAME = {v.name: v for v in VARIABLES}


def _variable(name: str) -> EnvVar:
    if name not in _BY_NAME:
        raise ConfigError(
            f"unknown environment variable {name!r}{nearest(name, _BY_NAME)} Known: {', '.join(_BY_NAME)}"
        )
    return _BY_NAME[name]


def get(name: str) -> Any:
    """The typed value of a variable. Raises ConfigError for an unknown name or a wrong value."""
    variable = _variable(name)
    text = os.environ.get(name, "")
    return variable.parse(text) if text.strip() else variable.default


def is_set(name: str) -> bool:
    """Whether the variable is set to something. Raises ConfigError for an unknown name."""
    return bool(os.environ.get(_variable(name).name, "").strip())


def set_config(**values: Any) -> None:
    """Set variables for this process and its children; None unsets one. Raises ConfigError for an unknown name or a
    wrong value before any is set."""
    for name, value in values.items():
        variable = _variable(name)
        if value is not None:
            variable.parse(str(value))
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = str(value)


def unknown() -> list[str]:
    """Names of set variables that start with AR_ but are unknown to this version, sorted."""
    return sorted(n for n in os.environ if n.startswith("AR_") and n not in _BY_NAME and not n.startswith("AR_TEST_"))


def without_effect() -> list[str]:
    """One sentence for each variable that is set and known but has no effect, sorted."""
    return sorted(f"{v.name} is set and has no effect: {v.idle}" for v in VARIABLES if v.idle and is_set(v.name))


def resume_folder() -> Path:
    """The folder that holds the journals of runs: AR_RESUME_DIR, or AR_WORK_SPACE."""
    given = get("AR_RESUME_DIR")
    return work_space() if given is None else Path(given).expanduser()


def work_space() -> Path:
    """AR_WORK_SPACE as a path; the folder may not exist yet."""
    return Path(get("AR_WORK_SPACE")).expanduser()


def __getattr__(name: str) -> Any:
    if name in _BY_NAME:
        return get(name)
    hint = nearest(name, _BY_NAME) if name.startswith("AR") else ""
    raise AttributeError(f"module 'auto_round.envs' has no variable {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_BY_NAME})
