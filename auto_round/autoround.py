"""`AutoRound`, the entry point for Python users, and its deprecated names (`AutoRoundLLM` and others)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auto_round import envs
from auto_round.config import QuantConfig, read_recipe
from auto_round.errors import ConfigError, ModelError
from auto_round.files import write_text
from auto_round.formats.base import parse_formats
from auto_round.later import DIFFUSION, refuse
from auto_round.logger import ensure_logging, logger, warn_once
from auto_round.modeling.source import ModelSource, open_source
from auto_round.output.folders import check_file
from auto_round.plugins import load_plugins
from auto_round.run.finalize import recipe_of, recipe_text
from auto_round.run.keywords import resolve_settings
from auto_round.run.model_free.driver import open_model_free
from auto_round.run.planner import check_before_opening
from auto_round.run.saving import Runs, Saving
from auto_round.run.settings import Settings
from auto_round.schemes import QuantizationScheme

if TYPE_CHECKING:
    from auto_round.run.plan import Job


class AutoRound(Saving):
    """Quantizes a causal language model.

    docs/python-api.md has all arguments, and the attributes that tell them with every default filled in.

    Args:
        model: a folder, a hub id, or a Transformers model object. A model given by path is read block by block; an
            object is changed in place.
        tokenizer: read from the model's folder when None.
        scheme: preset name, dict of fields, or QuantizationScheme.
        layer_config: {name, partial name or regular expression: preset name or fields} for layers that differ.
        dataset: a dataset string, list of texts, list of token ids or a DataLoader; None for the default set.
        iters: tuning steps for each block; None means 200, 0 means rounding only.
        device_map: the device to tune on: 0, "cuda:0", "cpu", "auto".
        low_cpu_mem_usage: read a model given by path block by block; False loads it completely.
        alg_configs: an `RTNConfig`, `SignRoundConfig` or `GPTQConfig` instead of the single settings, or a name.
        **kwargs: the fields of the scheme and the other settings of `auto_round.config`.

    Raises ConfigError for an unknown or contradictory argument, and ModelError, DeviceError or UnsupportedError for a
    model, device or combination that is not supported.
    """

    def __init__(
        self, model: str | os.PathLike[str] | torch.nn.Module, tokenizer: Any = None, platform: str = "hf",
        scheme: str | Mapping[str, Any] | QuantizationScheme = "W4A16",
        layer_config: Mapping[str, Any] | str | None = None, dataset: Any = None, iters: int | None = None,
        seqlen: int = 2048, nsamples: int = 128, batch_size: int = 8, gradient_accumulate_steps: int | None = None,
        low_gpu_mem_usage: bool = False, device_map: Any = 0, enable_torch_compile: bool | None = None,
        seed: int = 42, low_cpu_mem_usage: bool = True, alg_configs: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        ensure_logging()
        for sentence in envs.without_effect():
            warn_once("%s", sentence)
        load_plugins(kwargs.get("plugins") or ())
        keywords = {
            "platform": platform, "scheme": scheme, "layer_config": layer_config, "dataset": dataset, "iters": iters,
            "seqlen": seqlen, "nsamples": nsamples, "batch_size": batch_size,
            "gradient_accumulate_steps": gradient_accumulate_steps, "low_gpu_mem_usage": low_gpu_mem_usage,
            "device_map": device_map, "enable_torch_compile": enable_torch_compile, "seed": seed,
            "low_cpu_mem_usage": low_cpu_mem_usage, **kwargs,
        }  # fmt: skip
        self.settings = resolve_settings(keywords, alg_configs)
        formats = self.settings.config.output.format
        self._named_formats = None if formats is None else parse_formats(formats)
        check_before_opening(self.settings, self._named_formats)
        free = open_model_free(model, self.settings)
        self.tokenizer = tokenizer
        if free is not None:
            self._runs = free
            return
        source = _open_model(model, self.settings)
        self.tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(source, self.settings)
        self._runs = Runs(source, self.settings, self.tokenizer)

    @classmethod
    def from_recipe(
        cls, model: str | os.PathLike[str] | torch.nn.Module, recipe: str | os.PathLike[str] | QuantConfig,
        tokenizer: Any = None, **changes: Any,
    ) -> AutoRound:  # fmt: skip
        """An AutoRound with the settings of a recipe: the file (`recipe.yaml` of a saved model, or its folder), or what
        `recipe()` gave. `changes`: keywords that override those of the recipe, or that it could not hold.

        Raises ConfigError for no such recipe, a newer version, an unknown key or a wrong value, or when something is
        missing that it could not hold.
        """
        ensure_logging()
        config = recipe if isinstance(recipe, QuantConfig) else read_recipe(recipe)
        name = "the recipe" if isinstance(recipe, QuantConfig) else f"recipe {os.fspath(recipe)}"
        return cls(model, tokenizer, **config.keywords_with(changes, name))

    def recipe(self, format: str | Sequence[str] | None = None, max_shard_size: int | str | None = None) -> QuantConfig:
        """The recipe of a run: all settings that decide the result, without anything of this machine."""
        formats = [fmt.name for fmt in self._formats(format)]
        return recipe_of(self.settings, self._planned(), formats, self._shard_size(max_shard_size))

    def save_recipe(
        self, path: str | os.PathLike[str], format: str | Sequence[str] | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:  # fmt: skip
        """Write `recipe()` to a file. Raises OutputError when it cannot be written."""
        config, file = self.recipe(format, max_shard_size), Path(path).expanduser()
        for name, what in config.supply.items():
            logger.warning("recipe %s cannot hold %s: %s must be given again beside it", file, what, name)
        check_file(file)
        write_text(file, recipe_text(config, self.settings))

    def plan(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> Job:
        """The plan of a run: layers, bytes on disk, memory, steps. `.render()` returns it as text. Raises ConfigError
        for formats that need several runs, and for names that match no layer, unless `strict=False` was given."""
        jobs = self.plans(format, output_dir)
        if len(jobs) > 1:
            raise ConfigError(f"{format!r} takes {len(jobs)} runs; use plans() for a list, or name fewer formats")
        return jobs[0]

    def plans(self, format: str | Sequence[str] | None = None, output_dir: str | None = None) -> list[Job]:
        """The plans of all runs: one run for each GGUF format, and one for all other formats."""
        return self._runs.plans(self._formats(format), output_dir)


def _load_tokenizer(source: ModelSource, settings: Settings) -> Any:
    folder = getattr(source, "folder", None)
    name = folder if folder is not None else source.name_or_path
    if folder is None and not Path(str(name)).is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # tokenizers raise errors of any type
        dataset = settings.dataset
        if settings.needs_data and (dataset is None or isinstance(dataset, str)):
            raise ModelError(
                f"the tokenizer in {name} cannot be read ({error}); give tokenizer=..., or token ids as dataset"
            ) from error
        logger.warning("the tokenizer in %s cannot be read; continuing without it", name)
        return None


def _open_model(model: Any, settings: Settings) -> ModelSource:
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model).expanduser()
        if (folder / "model_index.json").is_file() and not (folder / "config.json").exists():
            refuse(DIFFUSION, f"{os.fspath(model)} holds a diffusion pipeline")
    elif type(model).__module__.partition(".")[0] == "diffusers":
        refuse(DIFFUSION, f"a model of class {type(model).__name__}")
    source = open_source(
        model, dtype=settings.model_dtype, trust_remote_code=settings.trust_remote_code, platform=settings.platform,
        allow_pickle=settings.allow_pickle,
    )  # fmt: skip
    source.bounded = settings.max_memory is not None
    for note in source.notes:
        logger.warning("%s", note)
    if source.stored_as:
        logger.info("the model is quantized already (%s); it is dequantized while it is read", source.stored_as)
    if settings.config.memory.low_cpu_mem_usage or not source.lazy or source.stored_as:
        return source  # a quantized checkpoint is always read block by block
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=source.dtype, trust_remote_code=settings.trust_remote_code
    )
    return open_source(loaded)


class AutoRoundLLM(AutoRound):
    """`AutoRound` under an older name."""

    _now = "AutoRound"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warn_once("%s is an older name; use %s", type(self).__name__, self._now)
        super().__init__(*args, **kwargs)


class AutoRoundAdam(AutoRoundLLM):
    """`AutoRound` with `enable_adam=True`, under an older name."""

    _now = "AutoRound with enable_adam=True"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"enable_adam": True, **kwargs})


class AutoRoundMLLM(AutoRoundLLM):
    """`AutoRound` under an older name. Multimodal models are refused."""


class AutoRoundDiffusion(AutoRoundLLM):
    """`AutoRound` under an older name. Diffusion models are refused."""
