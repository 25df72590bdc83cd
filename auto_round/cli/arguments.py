"""All flags of the command line as data: names, kind and meaning.

`dest` is the keyword of `AutoRound` (or of the verb) that the flag sets: the verbs pass all given values on, so that no
flag is parsed and ignored. Underscores and dashes are equal in all names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One setting.

    Attributes:
        dest: name of the value; also the first spelling.
        help: one line.
        kind: "str", "int", "float", "switch" (no value), "size" (int or "rows,columns"), "list" (may be repeated).
        aliases: other spellings.
        off: spellings that set the opposite of a switch.
        on_value: what a switch sets; its opposite is what `off` sets.
        metavar: name of the value in the help.
        choices: allowed values.
        hidden: left out of the help (accepted for old scripts).
    """

    dest: str
    help: str
    kind: str = "str"
    aliases: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    on_value: bool = True
    metavar: str = ""
    choices: tuple[str, ...] = ()
    hidden: bool = False


@dataclass(frozen=True)
class Group:
    """Flags under one heading of the help."""

    title: str
    flags: tuple[Flag, ...]


def _switch(dest: str, help: str, *aliases: str, off: tuple[str, ...] = (), **kw: Any) -> Flag:
    return Flag(dest, help, "switch", aliases, off, **kw)


DTYPES = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")

MODEL = Flag(
    "model",
    "folder or hub id of the model; may also be given without a flag",
    aliases=("model_name", "model_name_or_path"),
)
DEVICE = Flag(
    "device_map",
    'where to compute: "0", "0,1", "cpu", "cuda:0", "auto" (default 0: the first accelerator, else the CPU)',
    aliases=("device", "devices"),
)
TRUST = _switch(
    "trust_remote_code", "allow the model's own Python files to run (default: no)", off=("disable_trust_remote_code",)
)
PICKLE = _switch(
    "allow_pickle", "read pytorch_model.bin where there is no safetensors (default: no)", off=("disable_allow_pickle",)
)
SEED = Flag("seed", "seed of every random choice (default 42)", "int")
PLATFORM = Flag("platform", "where models named by id come from (default hf)", choices=("hf", "model_scope"))

PLUGINS = Flag(
    "plugins",
    "Python file that registers data types, formats, datasets and the like; may be repeated",
    "list",
    aliases=("plugin",),
    metavar="FILE",
)

MODEL_GROUP = Group(
    "model",
    (
        MODEL,
        Flag("model_dtype", "dtype to read the model in; default: the one it was saved in", choices=DTYPES),
        PLATFORM,
        TRUST,
        PICKLE,
        PLUGINS,
    ),
)

SCHEME_GROUP = Group(
    "quantization scheme",
    (
        Flag("scheme", 'named scheme, see "auto-round list scheme" (default W4A16)', aliases=("schemes",)),
        Flag("bits", "bits per weight, instead of the scheme's", "int", aliases=("bit",)),
        Flag("group_size", "weights per scale, -1 per channel, 0 per tensor, or ROWS,COLUMNS", "size"),
        _switch("sym", "symmetric around zero", off=("asym",)),
        Flag("super_bits", "bits of the scales themselves, for GGUF's K types", "int"),
        Flag("super_group_size", "scales that share one of their own, for GGUF's K types", "int"),
        Flag("data_type", "weight data type, instead of the scheme's", aliases=("dtype",)),
        Flag("act_bits", "bits of the activations, instead of the scheme's; 16 leaves them alone", "int"),
        Flag("act_group_size", "activations per scale: -1 a token's, 0 all, or that many of a token", "int"),
        _switch("act_sym", "activations symmetric around zero", off=("act_asym",)),
        Flag("act_data_type", "activation data type, instead of the weights'", aliases=("act_dtype",)),
        _switch(
            "act_dynamic",
            "activation scales from each input (default), not fixed ones from calibration data",
            off=("disable_act_dynamic",),
        ),
        Flag(
            "scale_dtype",
            "dtype of the stored scales (default fp16)",
            choices=("fp16", "float16", "bf16", "bfloat16", "fp32", "float32"),
        ),
        Flag("layer_config", 'settings of some layers, by full name, part of it or regex: "{k_proj:{bits:8}}"'),
        Flag("ignore_layers", "layers to leave unquantized, comma separated", aliases=("fp_layers",)),
        _switch("quant_lm_head", "quantize lm_head too", off=("no_quant_lm_head",)),
        Flag("to_quant_block_names", "quantize only the blocks under these names, comma separated"),
    ),
)

_FP8 = ("fp8", "float8_e4m3fn")
_GRANULARITIES = ("tensor", "head")
CACHE_GROUP = Group(
    "scales for a key-value cache in FP8",
    (
        Flag("static_kv_dtype", "save k_scale and v_scale for a cache in this type", choices=_FP8),
        Flag("static_kv_granularity", "one scale per tensor (default) or per head", choices=_GRANULARITIES),
        Flag("static_attention_dtype", "save q_scale too, for attention in this type", choices=_FP8),
        Flag("static_attention_granularity", "the same for q_scale", choices=_GRANULARITIES),
    ),
)

GGUF_GROUP = Group(
    "GGUF files",
    (
        Flag("imatrix", "weigh inputs by an importance file of llama.cpp's instead of calibration data"),
        Flag("save_imatrix", "write what calibration saw as such a file"),
    ),
)

DATA_GROUP = Group(
    "calibration data",
    (
        Flag(
            "dataset", 'names or files: "a.json,NeelNanda/pile-10k:num=64:concat=True", see "auto-round list dataset"'
        ),
        Flag("nsamples", "samples (default 128)", "int", aliases=("nsample",)),
        Flag("seqlen", "tokens per sample (default 2048)", "int", aliases=("seq_len",)),
        Flag("batch_size", "samples per tuning step (default 8)", "int", aliases=("bs", "train_bs")),
        SEED,
    ),
)

TUNING_GROUP = Group(
    "tuning",
    (
        Flag(
            "algorithm",
            "auto_round (tuned rounding), gptq (error feedback, alone or before tuning) or rtn (same as --iters 0)",
            aliases=("algorithms", "alg", "algs", "alg_config", "alg_configs"),
        ),
        Flag("iters", "tuning steps per block, 0 for none (default 200)", "int", aliases=("iter",)),
        Flag("lr", "step size of rounding; default: from the number of steps", "float"),
        Flag("minmax_lr", "step size of scales; default: lr", "float"),
        Flag("momentum", "momentum of the sign updates (default 0)", "float"),
        Flag("gradient_accumulate_steps", "batches per step (default 1)", "int"),
        _switch("enable_adam", "AdamW instead of sign gradient descent", "adam", off=("no_enable_adam",)),
        _switch(
            "enable_minmax_tuning",
            "tune the scales too (default)",
            off=("disable_minmax_tuning", "no_enable_minmax_tuning"),
        ),
        _switch(
            "enable_quanted_input",
            "feed each block the output of the quantized blocks before it (default)",
            off=("disable_quanted_input", "no_enable_quanted_input"),
        ),
        _switch(
            "not_use_best_mse", "keep the last step's result rather than the best one's", off=("no_not_use_best_mse",)
        ),
        _switch("disable_opt_rtn", "scales from minimum and maximum only, no weighted search", off=("enable_opt_rtn",)),
    ),
)

RUN_GROUP = Group(
    "how it runs",
    (
        DEVICE,
        _switch(
            "enable_torch_compile", "compile the tuning step; default: where it helps", off=("disable_torch_compile",)
        ),
        _switch("amp", "mixed precision in the tuning forward pass (default)", off=("disable_amp",)),
        _switch(
            "low_gpu_mem_usage",
            "keep calibration activations in RAM, not on the GPU",
            off=("disable_low_gpu_mem_usage",),
        ),
        Flag(
            "on_nan",
            "a layer with NaN or Inf in weights, calibration or tuning: fail (default), rtn (rounded to nearest), keep "
            "(left unquantized)",
            choices=("fail", "rtn", "keep"),
        ),
        Flag("max_memory", 'what may be held: "4GB" of RAM, or "cpu=4GB,0=10GB"; activations go to files where needed'),
        _switch("low_cpu_mem_usage", "one block in RAM at a time (default)", off=("disable_low_cpu_mem_usage",)),
        _switch(
            "enable_deterministic_algorithms",
            "only deterministic GPU kernels",
            off=("disable_deterministic_algorithms",),
        ),
    ),
)

MODEL_FREE_GROUP = Group(
    "model-free mode",
    (
        _switch(
            "model_free",
            "round tensor by tensor, without a model; rounding only takes it by itself where it can",
            off=("disable_model_free",),
        ),
        Flag("parallelism", "tensors that are worked on at a time (default: one for each core, 8 at most)", "int"),
    ),
)

OUTPUT_GROUP = Group(
    "output",
    (
        Flag(
            "format",
            'formats, comma separated, see "auto-round list format" (default auto_round)',
            aliases=("formats",),
        ),
        Flag("output_dir", "folder to write to (default ./tmp_autoround)"),
        Flag("max_shard_size", 'largest file, such as "5GB"'),
        _switch("overwrite", "replace the contents of the output folder"),
        _switch("resume", "keep a journal, and resume a stopped run of the same command (default)", off=("no_resume",)),
        _switch("verify", "reopen the saved files and verify them (default)", off=("no_verify", "disable_verify")),
        _switch("dry_run", "print the plan and stop"),
        _switch(
            "strict",
            "a layer name or pattern that matches nothing is an error (default with --dry_run), not a warning",
            off=("no_strict",),
        ),
    ),
)

RECIPE_GROUP = Group(
    "recipe files",
    (
        Flag("recipe", "take all settings from this file, or from a saved model's folder; flags beside it override it"),
        Flag("save_recipe", "write the settings to this file; with --dry_run that is all", metavar="FILE.yaml"),
    ),
)

_EVAL_DTYPE_HELP = "dtype to evaluate in; default: the model's, or float32 on a CPU that is slow in it"

BACKEND = Flag("backend", "what runs quantized layers; see auto-round list backend (default: the best that can)")

EVAL_AFTER_GROUP = Group(
    "evaluation",
    (
        _switch("eval", "evaluate the saved model (last format); alone: only evaluate the model"),
        Flag("reference", "full-precision model to compare with (after quantizing: the model itself)", metavar="MODEL"),
        Flag(
            "eval_text",
            "text file to measure on; default: a part of the bundled text",
            aliases=("eval_dataset",),
            metavar="FILE",
        ),
        Flag("eval_seqlen", "tokens per window (default 512)", "int"),
        Flag("eval_bs", "windows per forward pass (default 1)", "int"),
        Flag("max_windows", "windows at most (default 64)", "int"),
        Flag("eval_model_dtype", _EVAL_DTYPE_HELP, choices=DTYPES),
        BACKEND,
        _switch(
            "add_bos_token", "start every window with BOS; default: if the tokenizer does", off=("no_add_bos_token",)
        ),
        Flag("eval_output", "also write the results to this file", metavar="JSON"),
        Flag("eval_backend", "what runs the model: hf", choices=("hf",), hidden=True),
    ),
)

QUANTIZE_GROUPS = (
    MODEL_GROUP, SCHEME_GROUP, CACHE_GROUP, GGUF_GROUP, DATA_GROUP, TUNING_GROUP, RUN_GROUP, MODEL_FREE_GROUP,
    OUTPUT_GROUP, RECIPE_GROUP,
    EVAL_AFTER_GROUP,
)  # fmt: skip

_EVAL_FLAGS = {f.dest: f for f in EVAL_AFTER_GROUP.flags}
EVAL_GROUPS = (
    Group("model", (MODEL, _EVAL_FLAGS["reference"], PLATFORM, TRUST, PLUGINS)),
    Group(
        "measuring",
        (
            _EVAL_FLAGS["eval_text"],
            Flag("eval_seqlen", "tokens per window (default 512)", "int", aliases=("seqlen", "seq_len")),
            Flag("eval_bs", "windows per forward pass (default 1)", "int", aliases=("bs", "batch_size")),
            _EVAL_FLAGS["max_windows"],
            _EVAL_FLAGS["add_bos_token"],
        ),
    ),
    Group(
        "how it runs",
        (
            DEVICE,
            Flag("eval_model_dtype", _EVAL_DTYPE_HELP, aliases=("model_dtype",), choices=DTYPES),
            BACKEND,
            _EVAL_FLAGS["eval_output"],
            _EVAL_FLAGS["eval_backend"],
            _switch("eval", "the verb's old spelling", hidden=True),
        ),
    ),
)

GENERATE_GROUPS = (
    Group("model", (MODEL, PLATFORM, TRUST, PLUGINS)),
    Group(
        "text",
        (
            Flag("prompt", "the text to continue"),
            Flag("max_new_tokens", "tokens to generate at most (default 64)", "int"),
            _switch("chat", "put the prompt into the model's chat template (default: if it has one)", off=("no_chat",)),
            _switch("do_sample", "draw tokens at random (default: always the likeliest)"),
            Flag("temperature", "of the random draw, above 0 (default: the model's); implies --do_sample", "float"),
            SEED,
        ),
    ),
    Group(
        "how it runs",
        (
            DEVICE,
            Flag("model_dtype", _EVAL_DTYPE_HELP.replace("evaluate", "compute"), aliases=("eval_model_dtype",),
                 choices=DTYPES),
            BACKEND,
        ),
    ),
)  # fmt: skip


def spellings(groups: tuple[Group, ...]) -> dict[str, Flag]:
    """Every spelling (with underscores, without dashes in front) of the flags in `groups`."""
    return {name: f for g in groups for f in g.flags for name in (f.dest, *f.aliases, *f.off)}
