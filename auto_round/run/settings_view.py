"""Read-only attributes of AutoRound: the settings of the run and what was resolved from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from auto_round.algorithms.gptq import GPTQConfig
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.formats.base import OutputFormat
from auto_round.run.folders import split_runs
from auto_round.run.gguf import scheme_of_type
from auto_round.run.layer_schemes import select_blocks
from auto_round.run.plan import Job, LayerPlan
from auto_round.run.settings import Settings
from auto_round.schemes import GroupSize, QuantizationScheme

if TYPE_CHECKING:
    from auto_round.run.model_free.driver import ModelFree
    from auto_round.run.runs import Runs


def _read(value: str | Callable[[Any], Any]) -> Any:
    """A read-only attribute: the value at this path of the object, or what a function makes of it."""
    return property(attrgetter(value) if isinstance(value, str) else value)


def _resolved(name: str) -> Any:
    """A read-only attribute: a field of the scheme, with the default filled in."""
    return _read(lambda view: resolved_fields(view.scheme)[name])


def _tuning(name: str, without: Any) -> Any:
    """A read-only attribute: a setting of the algorithm, or its value without tuning."""
    return _read(lambda view: getattr(view.settings.algorithm, name, without))


class SettingsView:
    """Parent of `AutoRound`: its attributes, under the names of its arguments.

    `bits` and the other fields of the scheme are those of the format that was named last, because a GGUF format brings
    a scheme of its own.
    """

    settings: Settings
    tokenizer: Any
    _runs: Runs | ModelFree
    _named_formats: Sequence[OutputFormat] | None
    _layers_seen: tuple[tuple[str, ...] | None, dict[str, dict[str, Any]]] | None

    def _planned(self) -> Job:
        """The job of the formats that were named last."""
        return self._runs.plan_for(self._named_formats)

    def post_init(self) -> None:
        """Resolve all settings against the model and raise their errors. Calling it is optional."""
        self._layer_config()

    @property
    def layer_config(self) -> dict[str, dict[str, Any]]:
        """The resolved scheme of every linear layer by name: the scheme's fields with every default filled in,
        `in_blocks`, and for GGUF the type of the tensor (`mostly`). 16 bits: it is left unquantized. For GGUF, the
        embeddings are included."""
        return {name: dict(fields) for name, fields in self._layer_config().items()}

    def _layer_config(self) -> dict[str, dict[str, Any]]:
        formats = None if self._named_formats is None else tuple(fmt.name for fmt in self._named_formats)
        if self._layers_seen is None or self._layers_seen[0] != formats:
            self._layers_seen = formats, job_fields(self._planned(), self.settings)
        return self._layers_seen[1]

    @property
    def formats(self) -> list[str] | None:
        """Names of the formats that were named last; None before any was."""
        return None if self._named_formats is None else [fmt.name for fmt in self._named_formats]

    @property
    def scheme(self) -> QuantizationScheme:
        """The scheme of layers that no exception is made for."""
        if not self._named_formats:
            return self.settings.scheme
        return split_runs(self.settings, self._named_formats, quiet=True)[0][0].scheme

    @property
    def quant_block_list(self) -> list[list[str]]:
        """Names of the blocks that are quantized, in one list inside a list."""
        return [list(select_blocks(self.settings, self._runs.blocks))]

    @property
    def alg_configs(self) -> RTNConfig | SignRoundConfig | GPTQConfig:
        """The settings of the algorithm; with GPTQ before tuning, those of the tuning."""
        settings = self.settings
        return settings.gptq if settings.gptq is not None and not settings.tunes else settings.algorithm

    @property
    def model_free(self) -> bool:
        """Whether tensors are rounded without a model."""
        return self._runs.model_free

    # Of the scheme.
    bits: int = _read("scheme.bits")
    group_size: GroupSize = _read("scheme.group_size")
    sym: bool = _read("scheme.sym")
    data_type: str = _read("scheme.data_type")
    act_bits: int = _resolved("act_bits")
    act_group_size: GroupSize = _resolved("act_group_size")
    act_sym: bool = _resolved("act_sym")
    act_data_type: str = _resolved("act_data_type")
    act_dynamic: bool = _resolved("act_dynamic")
    super_bits: int | None = _read("scheme.super_bits")
    super_group_size: int | None = _read("scheme.super_group_size")

    # Of the algorithm. Without tuning there are no steps, no step sizes and no optimizer.
    iters: int = _tuning("iters", 0)
    lr: float | None = _read(lambda view: view._rates()[0])
    minmax_lr: float | None = _read(lambda view: view._rates()[1])
    momentum: float = _tuning("momentum", 0.0)
    enable_adam: bool = _tuning("enable_adam", False)
    enable_minmax_tuning: bool = _tuning("enable_minmax_tuning", False)
    enable_quanted_input: bool = _tuning("enable_quanted_input", False)
    not_use_best_mse: bool = _tuning("not_use_best_mse", False)
    batch_size: int = _read("settings.config.tuning.batch_size")
    gradient_accumulate_steps: int = _read("settings.config.tuning.gradient_accumulate_steps")

    def _rates(self) -> tuple[float | None, float | None]:
        """Step sizes of rounding, for layers of `bits` bits, and of the scale factors."""
        algorithm = self.settings.algorithm
        return algorithm.learning_rates(self.bits) if isinstance(algorithm, SignRoundConfig) else (None, None)

    @property
    def optimizer(self) -> type[torch.optim.Optimizer] | None:
        """AdamW where it tunes; None for signed gradient descent and without tuning."""
        return torch.optim.AdamW if self.enable_adam else None

    @property
    def disable_opt_rtn(self) -> bool:
        """Whether scales come from minimum and maximum alone."""
        return not self.settings.optimized_start

    # Of the run. `dataset` None is the default set; `device` is the one to tune on, such as "cuda:0".
    seqlen: int = _read("settings.seqlen")
    nsamples: int = _read("settings.nsamples")
    dataset: Any = _read("settings.dataset")
    seed: int = _read("settings.seed")
    amp: bool = _read("settings.amp")
    scale_dtype: torch.dtype = _read("settings.scale_dtype")
    device: str = _read(lambda view: str(view.settings.device))
    platform: str = _read("settings.platform")
    low_gpu_mem_usage: bool = _read("settings.low_gpu_mem_usage")
    low_cpu_mem_usage: bool = _read("settings.config.memory.low_cpu_mem_usage")
    enable_torch_compile: bool = _read("settings.enable_torch_compile")
    enable_deterministic_algorithms: bool = _read("settings.enable_deterministic_algorithms")
    trust_remote_code: bool = _read("settings.trust_remote_code")
    ignore_layers: tuple[str, ...] = _read("settings.ignore_layers")
    quant_lm_head: bool = _read("settings.quant_lm_head")
    to_quant_block_names: tuple[str, ...] = _read("settings.to_quant_block_names")
    static_kv_dtype: str | None = _read("settings.config.weights.static_kv_dtype")
    static_attention_dtype: str | None = _read("settings.config.weights.static_attention_dtype")

    # This version quantizes text models.
    mllm: bool = _read(lambda view: False)
    diffusion: bool = _read(lambda view: False)


def resolved_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """The fields of a scheme with the defaults of its activations filled in."""
    fields = scheme.to_dict()
    own = {
        "act_bits": 16, "act_group_size": scheme.group_size, "act_sym": scheme.sym, "act_dynamic": True,
        "act_data_type": scheme.data_type if scheme.quantizes_activations else "float",
    }  # fmt: skip
    return fields | {name: value for name, value in own.items() if fields[name] is None}


def job_fields(job: Job, settings: Settings) -> dict[str, dict[str, Any]]:
    """`AutoRound.layer_config` of a job."""
    blocks = tuple(f"{block}." for block in job.blocks)
    found = {name: layer_fields(plan, blocks, settings) for name, plan in job.layers.items()}
    if job.gguf is None:
        return found
    for name in job.embeddings:
        kind = job.gguf.type_of(f"{name}.weight") if f"{name}.weight" in job.gguf.places else None
        if kind is not None:
            scheme = scheme_of_type(kind, job.scheme)
            found[name] = resolved_fields(scheme) | {"scale_dtype": settings.scale_dtype, "in_blocks": False}
            found[name] |= {"mostly": f"gguf:{kind.lower()}"} if scheme.quantizes_weights else {}
    return found


def layer_fields(plan: LayerPlan, blocks: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    """The entry of one layer in `AutoRound.layer_config`. `blocks`: prefixes of names inside blocks."""
    fields = resolved_fields(plan.scheme)
    fields |= {"scale_dtype": settings.scale_dtype, "in_blocks": plan.name.startswith(blocks)}
    return fields if plan.ggml is None else fields | {"mostly": f"gguf:{plan.ggml.lower()}"}
