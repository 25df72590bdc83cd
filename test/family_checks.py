"""What is checked of each tiny family: quantized in every way, named as in the source, opened again, same logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import WITH_IMAGES, Family, sample_ids

from auto_round import AutoRound
from auto_round.errors import AutoRoundError
from auto_round.formats.base import get_format
from auto_round.modeling.source import ModelSource
from auto_round.run.file_layout import plan_files
from auto_round.run.plan import Job

PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
PLANNED = ("auto_round", "llm_compressor", "auto_gptq", "auto_awq", "fake")
OK = "yes"

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Quantized:
    """What a job takes from the source's files.

    Attributes:
        read: names of the tensors that quantized layers are read from.
        whole: of these, what is itself the weight of a layer.
        cut: quantized layers that are cut or made from what the source joins, and have no names of their own there.
        rest: names of dense tensors that the source joins with quantized ones.
        again: modules that share the weights of others, which the source stores once.
    """

    read: frozenset[str]
    whole: frozenset[str]
    cut: frozenset[str]
    rest: frozenset[str]
    again: frozenset[str]

    @classmethod
    def of(cls, made: AutoRound) -> Quantized:
        """Of a job of format auto_round."""
        return cls.by(made.plan("auto_round"), source_of(made))

    @classmethod
    def by(cls, job: Job, source: ModelSource) -> Quantized:
        read: set[str] = set()
        whole: set[str] = set()
        cut: set[str] = set()
        for layer in job.quantized():
            for leaf in ("weight", "bias"):
                plan = source.tensor_plan(f"{layer}.{leaf}")
                if plan is not None and (leaf == "weight" or plan.key is None):
                    read |= set(plan.origin.stored)
                    whole |= {plan.key} if plan.key is not None else set()
                    cut |= {layer} if plan.key is None else set()
        naming = source.checkpoint_naming()
        rest = {
            name
            for tensor in source.tensor_names()
            if (plan := source.own_plan(tensor)) is not None and plan.key is None and read & set(plan.origin.stored)
            for name in (tensor, naming.unfused_name(tensor))
        }
        again = frozenset(naming.module(alias.rpartition(".")[0]) for alias in source.tied())
        return cls(frozenset(read), frozenset(whole), frozenset(cut), frozenset(rest), again)


def options(**more: Any) -> dict[str, Any]:
    """Arguments of a short W4A16 run."""
    given = dict(
        scheme="W4A16", group_size=32, iters=2, nsamples=4, seqlen=16, batch_size=2, dataset=sample_ids(4, 16),
        device_map="cpu",
    )  # fmt: skip
    return given | more


def rounder(source: str | Path) -> AutoRound:
    """A run that only rounds."""
    return AutoRound(str(source), **options(iters=0, disable_opt_rtn=True))


def source_of(made: AutoRound) -> ModelSource:
    """What a run reads."""
    return made._runs.source


def quantize(source: str | Path, out: Path, **more: Any) -> Path:
    """A run of the whole job; the output folder."""
    AutoRound(str(source), **options(**more)).quantize_and_save(out, format="auto_round")
    return out


def specs_of(tensors: Mapping[str, torch.Tensor]) -> Specs:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def wrong_plans(made: AutoRound, before: Specs, formats: Iterable[str] = PLANNED) -> list[str]:
    """What is not as in the source in the files that each format would have."""
    faults = []
    for name in formats:
        try:
            job = made.plan(name)
        except AutoRoundError as error:
            if not re.search("cannot hold this (model|recipe)|no layer is left to quantize", str(error)):
                faults.append(f"{name}: {_line(error)}")
            continue
        layout = plan_files(get_format(name), job.layers, source_of(made))
        found = wrong_specs(before, layout.tensors, Quantized.by(job, source_of(made)), made_anew=name == "fake")
        faults += [f"{name}: {fault}" for fault in found]
    return faults


def wrong_specs(before: Specs, after: Specs, quantized: Quantized, *, made_anew: bool = False) -> list[str]:
    """What is not as in the source: plain tensors that are not there or have another shape or dtype, and names that the
    source has not.

    Args:
        made_anew: quantized weights are written dense, where they lay in the source.
    """
    faults = []
    packed = {name.rpartition(".")[0] for name in after if name.rpartition(".")[2] in PACKED}
    for name, (shape, dtype) in before.items():
        anew = name in quantized.read
        if name in after:
            if after[name][0] != shape or after[name][1] != dtype and not anew:
                faults.append(f"{name} is {after[name]} for {(shape, dtype)}")
        elif made_anew or not anew or name in quantized.whole and packed.isdisjoint((name, name.rpartition(".")[0])):
            faults.append(f"{name} is missing")
    known = {name.rpartition(".")[0] for name in before} | before.keys()
    holders = {holder for name in before for holder in _holders(name)}
    for name in after:
        stem, _, leaf = name.rpartition(".")
        of_packed = stem in packed and (leaf in PACKED or leaf == "bias")
        named = (
            stem in known
            or stem in quantized.again
            or (stem in quantized.cut or bool(quantized.cut) and _holder(stem) in holders)
        )
        expected = not made_anew and (of_packed and named or name in quantized.rest)
        expected = expected or made_anew and leaf == "weight" and stem in quantized.again
        if name not in before and not expected:
            faults.append(f"{name} is not in the source")
    return faults


def _holders(name: str) -> list[str]:
    """All modules around a tensor."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _holder(layer: str) -> str:
    """The module that a layer lies in, of an expert what holds all experts."""
    parent, _, number = layer.rpartition(".")[0].rpartition(".")
    return parent.rpartition(".")[0] if number.isdigit() else f"{parent}.{number}"


def wrong_names(source: Path, out: Path, quantized: Quantized) -> list[str]:
    """What is not as in the source in files of format auto_round that a job wrote."""
    before, after = read_folder(source), read_folder(out)
    faults = wrong_specs(specs_of(before), specs_of(after), quantized)
    same = (n for n, tensor in after.items() if n in before and before[n].shape == tensor.shape)
    return faults + [f"{n} differs" for n in same if bytes_of(after[n]) != bytes_of(before[n])]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of two fixed samples, in float32, without a cache."""
    return model(input_ids=torch.stack(sample_ids(2, 16, seed=11)), use_cache=False).logits.float()


def reopen(folder: Path) -> Any:
    """The model of a folder through Transformers. Raises ValueError where weights were missing or left over."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    images = any(config.architectures == [cls] for _, cls, _ in WITH_IMAGES.values())
    auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lost = {key: sorted(info[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if lost:
        raise ValueError(f"reopening: {lost}")
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# What is refused, in which columns, and in which words.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "blt": (("tuned", "RTN", "model-free"), "several stacks of the same blocks"),
    "dory": (("tuned",), "in a cycle"),
    "hrm_text": (("tuned", "RTN", "model-free"), "several stacks of the same blocks"),
    "llava": (("tuned", "RTN"), "model-free"),
    "mistral3": (("tuned", "RTN"), "model-free"),
    "qwen3_5:images": (("tuned", "RTN"), "model-free"),
    "reformer": (("tuned",), "returns a ReformerOutput of several values"),
    "xlnet": (("tuned", "RTN", "model-free"), "no rule recognises them"),
}

COLUMNS = ("tuned", "RTN", "model-free", "names", "reopened", "logits")


def check_family(family: Family, work: Path) -> dict[str, str]:
    """{column: "yes", "refused: why" or "fails: why"}; "-" where an earlier column is why it was not tried."""
    found = dict.fromkeys(COLUMNS, "-")
    source = family.save(work / "source")

    def column(name: str, check: Callable[[], Any]) -> Any:
        try:
            value = check()
        except AutoRoundError as error:
            kind = "refused" if type(error).__name__ in ("UnsupportedError", "ModelError") else "fails"
            found[name] = f"{kind}: {_line(error)}"
            return None
        except Exception as error:
            found[name] = f"fails: {type(error).__name__}: {_line(error)}"
            return None
        found[name] = OK if not isinstance(value, str) else value
        return value

    tuned = column("tuned", lambda: quantize(source, work / "tuned"))
    rounded = column("RTN", lambda: quantize(source, work / "rtn", iters=0, disable_opt_rtn=True))
    free = column("model-free", lambda: quantize(source, work / "free", iters=0, model_free=True))
    made = {"tuned": tuned, "RTN": rounded, "model-free": free}
    made = {name: folder for name, folder in made.items() if folder is not None}
    if not made:
        return found

    def names() -> str | None:
        free_run = AutoRound(str(source), **options(iters=0, model_free=True)) if rounded is None else None
        rounding = rounder(source) if free_run is None else free_run
        quantized = Quantized.of(rounding)
        faults = {name: wrong_names(source, folder, quantized) for name, folder in made.items()}
        faults["planned"] = wrong_plans(rounding, specs_of(read_folder(source)))
        said = [f"{name}: {len(f)} ({'; '.join(f[:2])})" for name, f in faults.items() if f]
        return f"fails: {', '.join(said)}" if said else None

    column("names", names)
    models: dict[str, Any] = {}

    def opened() -> str | None:
        for name, folder in made.items():
            try:
                models[name] = reopen(folder)
            except Exception as error:
                return f"fails: {name}: {_line(error)}"
        return None

    column("reopened", opened)
    if found["reopened"] == OK:
        column("logits", lambda: _compare(family, models))
    return found


def _compare(family: Family, models: Mapping[str, Any]) -> str:
    original = logits(family.build())
    given = {name: logits(model) for name, model in models.items()}
    for name, values in given.items():
        if not bool(torch.isfinite(values).all()):
            return f"fails: {name}: not finite"
        if (off := relative(values, original)) > 0.9:
            return f"fails: {name}: {off:.2f} from the model"
    if "RTN" not in given:
        return OK
    live, _ = AutoRound(family.build(), **options(iters=0, disable_opt_rtn=True)).quantize()
    off = float((given["RTN"] - logits(live)).abs().max())
    return f"{off:.0e}" if off < 1e-3 else f"fails: {off:.0e} from the model in memory"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:400]
