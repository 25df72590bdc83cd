"""All flags of the command line as data: those of `AutoRound`'s keywords (`config.py`), and the verbs' own."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from auto_round.config import DTYPES, PARTS


@dataclass(frozen=True)
class Flag:
    """One setting."""

    dest: str  # name of the value; also the first spelling
    help: str
    kind: str = "str"  # or "int", "float", "switch" (no value), "size" (int or "rows,columns"), "list" (repeatable)
    aliases: tuple[str, ...] = ()
    off: tuple[str, ...] = ()  # spellings that set the opposite of a switch
    metavar: str = ""
    choices: tuple[str, ...] = ()
    hidden: bool = False  # left out of the help


@dataclass(frozen=True)
class Group:
    """Flags under one heading of the help."""

    title: str
    flags: tuple[Flag, ...]


def _keyword_flag(keyword: Field[Any], hint: Any) -> Flag:
    """The flag of a keyword: its kind from the keyword's type, its help with the default."""
    types = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    kind = {int: "int", float: "float"}.get(types[0], "str") if len(types) == 1 else "str"
    if any(get_origin(one) is tuple for one in types):
        kind = "size"
    elif bool in types:
        kind = "switch"
    data, text, default = keyword.metadata, keyword.metadata["help"], keyword.default
    if "default" not in text and default is not False and isinstance(default, (str, int, float)):
        shown = f" {default:g}" if isinstance(default, float) else f" {default}"
        text += " (default)" if default is True else f" (default{shown})"
    return Flag(keyword.name, text, kind, data["aliases"], data["off"], choices=data["choices"])


_KEYWORDS = {
    keyword.name: _keyword_flag(keyword, hints[keyword.name])
    for part in PARTS.values()
    for hints in (get_type_hints(part),)
    for keyword in fields(part)
    if keyword.metadata["help"]
}


def _keywords(names: str) -> tuple[Flag, ...]:
    return tuple(_KEYWORDS[name] for name in names.split())


def _switch(dest: str, help: str, off: tuple[str, ...] = (), hidden: bool = False) -> Flag:
    return Flag(dest, help, "switch", off=off, hidden=hidden)


MODEL = Flag(
    "model", "folder or hub id of the model; may also be given without a flag",
    aliases=("model_name", "model_name_or_path"),
)  # fmt: skip
PLUGINS = Flag(
    "plugins", "Python file that registers data types, formats, datasets and the like; may be repeated", "list",
    aliases=("plugin",), metavar="FILE",
)  # fmt: skip
OUTPUT_FLAGS = (
    Flag("output_dir", "folder to write to (default ./tmp_autoround)"),
    _switch("overwrite", "replace the contents of the output folder"),
    _switch("resume", "keep a journal, and resume a stopped run of the same command (default)", ("no_resume",)),
    _switch("dry_run", "print the plan and stop"),
)
RECIPE_FLAGS = (
    Flag("recipe", "take all settings from this file, or from a saved model's folder; flags beside it override it"),
    Flag("save_recipe", "write the settings to this file; with --dry_run that is all", metavar="FILE.yaml"),
)
_EVAL_DTYPE = Flag(
    "eval_model_dtype", "dtype to evaluate in; default: the model's, or float32 on a CPU that is slow in it",
    choices=DTYPES,
)  # fmt: skip
EVAL_FLAGS = (
    _switch("eval", "evaluate the saved model (last format); alone: only evaluate the model"),
    Flag("reference", "full-precision model to compare with (after quantizing: the model itself)", metavar="MODEL"),
    Flag(
        "eval_text", "text file to measure on; default: a part of the bundled text", aliases=("eval_dataset",),
        metavar="FILE",
    ),
    Flag("eval_seqlen", "tokens per window (default 512)", "int"),
    Flag("eval_bs", "windows per forward pass (default 1)", "int"),
    Flag("max_windows", "windows at most (default 64)", "int"),
    _EVAL_DTYPE,
    Flag("backend", "what runs quantized layers; see auto-round list backend (default: the best that can)"),
    _switch("add_bos_token", "start every window with BOS; default: if the tokenizer does", ("no_add_bos_token",)),
    Flag("eval_output", "also write the results to this file", metavar="JSON"),
    Flag("eval_backend", "what runs the model: hf", choices=("hf",), hidden=True),
)  # fmt: skip
_EVAL = {flag.dest: flag for flag in EVAL_FLAGS}
_MODEL_SOURCE = (*_keywords("platform trust_remote_code"), PLUGINS)

QUANTIZE_GROUPS = (
    Group("model", (MODEL, *_keywords("model_dtype platform trust_remote_code allow_pickle"), PLUGINS)),
    Group("quantization scheme", _keywords(
        "scheme bits group_size sym super_bits super_group_size data_type act_bits act_group_size act_sym "
        "act_data_type act_dynamic scale_dtype layer_config ignore_layers quant_lm_head to_quant_block_names"
    )),
    Group("scales for a key-value cache in FP8", _keywords(
        "static_kv_dtype static_kv_granularity static_attention_dtype static_attention_granularity"
    )),
    Group("GGUF files", _keywords("imatrix save_imatrix")),
    Group("calibration data", _keywords("dataset nsamples seqlen batch_size seed")),
    Group("tuning", _keywords(
        "algorithm iters lr minmax_lr momentum gradient_accumulate_steps enable_adam enable_minmax_tuning "
        "enable_quanted_input not_use_best_mse disable_opt_rtn"
    )),
    Group("how it runs", _keywords(
        "device_map enable_torch_compile amp low_gpu_mem_usage on_nan max_memory low_cpu_mem_usage "
        "enable_deterministic_algorithms"
    )),
    Group("model-free mode", _keywords("model_free parallelism")),
    Group("output", (*_keywords("format"), *OUTPUT_FLAGS, *_keywords("max_shard_size verify strict"))),
    Group("recipe files", RECIPE_FLAGS),
    Group("evaluation", EVAL_FLAGS),
)  # fmt: skip
EVAL_GROUPS = (
    Group("model", (MODEL, _EVAL["reference"], *_MODEL_SOURCE)),
    Group("measuring", (
        _EVAL["eval_text"], replace(_EVAL["eval_seqlen"], aliases=("seqlen", "seq_len")),
        replace(_EVAL["eval_bs"], aliases=("bs", "batch_size")), _EVAL["max_windows"], _EVAL["add_bos_token"],
    )),
    Group("how it runs", (
        *_keywords("device_map"), replace(_EVAL_DTYPE, aliases=("model_dtype",)),
        *(_EVAL[name] for name in ("backend", "eval_output", "eval_backend")),
        _switch("eval", "the verb's old spelling", hidden=True),
    )),
)  # fmt: skip
GENERATE_GROUPS = (
    Group("model", (MODEL, *_MODEL_SOURCE)),
    Group("text", (
        Flag("prompt", "the text to continue"),
        Flag("max_new_tokens", "tokens to generate at most (default 64)", "int"),
        _switch("chat", "put the prompt into the model's chat template (default: if it has one)", ("no_chat",)),
        _switch("do_sample", "draw tokens at random (default: always the likeliest)"),
        Flag("temperature", "of the random draw, above 0 (default: the model's); implies --do_sample", "float"),
        *_keywords("seed"),
    )),
    Group("how it runs", (
        *_keywords("device_map"),
        Flag("model_dtype", _EVAL_DTYPE.help.replace("evaluate", "compute"), aliases=("eval_model_dtype",),
             choices=DTYPES),
        _EVAL["backend"],
    )),
)  # fmt: skip


def spellings(groups: tuple[Group, ...]) -> dict[str, Flag]:
    """Every spelling (with underscores, without dashes in front) of the flags in `groups`."""
    return {name: f for g in groups for f in g.flags for name in (f.dest, *f.aliases, *f.off)}
