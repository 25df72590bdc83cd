"""Environment variables: name, type, default and meaning of each, as one table.

`envs.AR_LOG_LEVEL` reads the variable when it is asked for, so a value set later in the process counts. The table
also makes `docs/environments.md` (tools/make_env_docs.py) and `auto-round list env`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, nearest

LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True)
class EnvVar:
    """One variable.

    Attributes:
        name: as the shell knows it.
        kind: "choice" (any case), "path" (kept exactly as written), "text", "bool", "int" (positive), "count" (0 or
            more) or "float" (0 or more).
        default: what `envs.NAME` gives when the variable is unset or empty.
        doc: what it does, one or two sentences.
        choices: allowed values of a "choice", in upper case.
        idle: why the variable has no effect here; empty when it has one.
    """

    name: str
    kind: str
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    idle: str = ""

    def allowed(self) -> str:
        """The values this variable takes, as words."""
        if self.kind == "choice":
            return ", ".join(self.choices)
        return {
            "path": "a folder",
            "text": "any text",
            "bool": "1/0, true/false, yes/no, on/off",
            "int": "a whole number of 1 or more",
            "count": "a whole number of 0 or more",
            "float": "a number of 0 or more",
        }[self.kind]

    def parse(self, text: str) -> Any:
        """The typed value of `text`. Raises ConfigError when it is not one of the allowed values."""
        word = text.strip()
        if self.kind == "path":
            return text
        if self.kind == "text":
            return word
        if self.kind == "choice" and word.upper() in self.choices:
            return word.upper()
        if self.kind == "bool" and word.lower() in _TRUE + _FALSE:
            return word.lower() in _TRUE
        if self.kind in ("int", "count") and word.isdecimal() and int(word) >= (self.kind == "int"):
            return int(word)
        if self.kind == "float" and (number := _number(word)) is not None:
            return number
        hint = nearest(word, self.choices) if self.kind == "choice" else ""
        raise ConfigError(f"environment variable {self.name}={text!r} is not allowed; use {self.allowed()}{hint}")


def _idle(name: str, kind: str, default: Any, reason: str) -> EnvVar:
    return EnvVar(name, kind, default, f"No effect: {reason}.", idle=reason)


_NO_AUTO_SCHEME = "AutoScheme is not available in this version"
# What the incumbent reads and nothing here depends on.
_IDLE: tuple[EnvVar, ...] = (
    _idle("AR_DISK_STREAM_MODEL", "bool", False, "a model given by path is always read from its files block by block"),
    _idle("AR_DISABLE_OFFLOAD", "bool", False, "no weights are moved to files and back; blocks are read when needed"),
    _idle("AR_ENABLE_COMPILE_PACKING", "bool", False, "packing is vectorised and needs no compiler"),
    _idle("AR_DISABLE_DATASET_SUBPROCESS", "bool", False, "calibration data are always prepared in this process"),
    _idle(
        "AR_DISABLE_COPY_MTP_WEIGHTS", "bool", False,
        "weights that no module reads belong to the checkpoint and are copied, as its config promises them",
    ),
    _idle("AR_CALIB_STREAM_DEVICE", "text", None, "calibration runs on the device of device_map"),
    _idle("AR_ACT_SCALE", "float", 1.0, "the range of activations is not scaled"),
    _idle("AR_ENABLE_ACT_MINMAX_TUNING", "bool", False, "the range of activations is not tuned"),
    _idle("AR_SEARCH_SCALE_RATIO", "float", None, "the search of scales has a range of its own (docs/tuning.md)"),
    _idle("AR_DYNAMO_CACHE_SIZE_LIMIT", "int", 16, "PyTorch's own limits are left as they are"),
    _idle("AR_FUSE_ONLINE_ROTATION", "bool", False, "rotation is not available in this version"),
    _idle(
        "AR_FORCE_MOE_ROUTING_ALL_EXPERTS", "bool", False,
        "calibration routes as the model does; experts that few tokens reach are reported",
    ),
    _idle("AR_NVFP4_E5M3_CACHE_HP_WEIGHT", "bool", False, "there is no NVFP4_E5M3 layer to cache a weight for"),
    _idle("AR_AUTO_SCHEME_NSAMPLES", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_BATCH_SIZE", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_SEQLEN", "int", None, _NO_AUTO_SCHEME),
    _idle("AR_AUTO_SCHEME_CACHE", "path", None, _NO_AUTO_SCHEME),
    _idle("AR_ENABLE_AUTO_SCHEME_PARALLEL", "bool", True, _NO_AUTO_SCHEME),
    _idle("AR_MLLM_DATASET_CACHE_SIZE", "count", 0, "multimodal models are not available in this version"),
    _idle("AR_ENABLE_MALLOC_TRIM", "bool", True, "freed memory is given back where that is worth its time"),
    _idle("AR_MALLOC_TRIM_EVERY", "count", 0, "freed memory is given back where that is worth its time"),
    _idle("AUTO_ROUND_CACHE", "path", None, "GGUF files are written without llama.cpp's scripts, so none are kept"),
    _idle("AUTO_ROUND_GGUF_AUTO_UPDATE", "bool", False, "GGUF files are written without llama.cpp's scripts"),
    _idle("LLAMA_CPP_ROOT", "path", None, "GGUF files are written without llama.cpp's scripts"),
)  # fmt: skip

VARIABLES: tuple[EnvVar, ...] = (
    EnvVar(
        "AR_LOG_LEVEL",
        "choice",
        "INFO",
        "How much is logged. DEBUG also prints the traceback of an unexpected error; TRACE adds one line per layer.",
        LOG_LEVELS,
    ),
    EnvVar(
        "AR_WORK_SPACE",
        "path",
        "ar_work_space",
        "Folder for files that are not results, such as the traceback of an unexpected error. "
        "Upper and lower case are kept. Made when something is first written to it.",
    ),
    EnvVar(
        "AR_USE_MODELSCOPE",
        "bool",
        False,
        "Fetch models named by id from ModelScope instead of the Hugging Face hub; "
        'the same as `--platform model_scope`. Needs `pip install "auto-round[modelscope]"`.',
    ),
    EnvVar(
        "AR_OMP_NUM_THREADS",
        "int",
        None,
        "CPU threads of the command line's process. Unset: PyTorch decides. "
        "From Python, call `torch.set_num_threads` yourself: a library does not change it.",
    ),
    EnvVar(
        "AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE",
        "bool",
        True,
        "NVFP4: layers that runtimes join (q, k and v; gate and up) get one global scale for their weights and one for "
        "their inputs, as those runtimes expect. Off: each layer its own.",
    ),
    EnvVar(
        "AR_ENABLE_UNIFY_MOE_INPUT_SCALE",
        "bool",
        False,
        "Input scales that calibration fixes (static FP8, global of NVFP4) are one for all routed experts of a block.",
    ),
    EnvVar(
        "AR_GGUF_PRE_TOKENIZER",
        "text",
        None,
        "GGUF: llama.cpp's name for the way the tokenizer splits text (`tokenizer.ggml.pre`), such as `qwen2`. "
        "Unset: found from the tokenizer itself.",
    ),
    EnvVar(
        "AR_PLUGINS",
        "text",
        None,
        "Files of Python code to load as plugins, as `--plugin` does; several are separated as in PATH. "
        "Also read when Transformers opens a quantized model.",
    ),
    EnvVar(
        "AR_RESUME_DIR",
        "path",
        None,
        "Folder for the journals from which interrupted runs go on. Unset: a folder in AR_WORK_SPACE.",
    ),
    EnvVar(
        "AR_MODEL_FREE_SHARD_PARALLELISM",
        "int",
        None,
        "Model-free mode: tensors that are worked on at a time, where `parallelism` says nothing. "
        "Unset: one for each core, 8 at most.",
    ),
    *_IDLE,
)


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


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
    """Set variables for this process and its children; None unsets one.

    All values are checked before any is set. Raises ConfigError for an unknown name or a wrong value.
    """
    texts = {name: None if value is None else str(value) for name, value in values.items()}
    for name, text in texts.items():
        variable = _variable(name)
        if text is not None:
            variable.parse(text)
    for name, text in texts.items():
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text


def unknown() -> list[str]:
    """Names in the environment that look like ours (AR_...) and mean nothing here, sorted."""
    return sorted(n for n in os.environ if n.startswith("AR_") and n not in _BY_NAME and not n.startswith("AR_TEST_"))


def without_effect() -> list[str]:
    """A sentence on every variable that is set, known, and changes nothing here; sorted."""
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
