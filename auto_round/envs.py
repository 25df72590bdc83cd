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
        kind: "choice" (any case), "path" (kept exactly as written), "text", "bool" or "int" (positive).
        default: what `envs.NAME` gives when the variable is unset or empty.
        doc: what it does, one or two sentences.
        choices: allowed values of a "choice", in upper case.
    """

    name: str
    kind: str
    default: Any
    doc: str
    choices: tuple[str, ...] = ()

    def allowed(self) -> str:
        """The values this variable takes, as words."""
        if self.kind == "choice":
            return ", ".join(self.choices)
        return {
            "path": "a folder",
            "text": "any text",
            "bool": "1/0, true/false, yes/no, on/off",
            "int": "a whole number of 1 or more",
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
        if self.kind == "int" and word.isdecimal() and int(word) >= 1:
            return int(word)
        hint = nearest(word, self.choices) if self.kind == "choice" else ""
        raise ConfigError(f"environment variable {self.name}={text!r} is not allowed; use {self.allowed()}{hint}")


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
)

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
