"""What is checked of each tiny family: quantized in every way, named as in the source, opened again, same logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import Family, sample_ids

PACKED = ("qweight", "qzeros", "scales", "g_idx")
OK = "yes"


@dataclass
class Tensors:
    """The tensors of a folder, by name, as shape, dtype and bytes."""

    found: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path) -> Tensors:
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        return cls(found)


def options(**more: Any) -> dict[str, Any]:
    """Arguments of a short W4A16 run."""
    given = dict(
        scheme="W4A16", group_size=32, iters=2, nsamples=4, seqlen=16, batch_size=2, dataset=sample_ids(4, 16),
        device_map="cpu",
    )  # fmt: skip
    return given | more


def quantize(source: str | Path, out: Path, **more: Any) -> Path:
    """A run of the whole job; the output folder."""
    from auto_round import AutoRound

    AutoRound(str(source), **options(**more)).quantize_and_save(out, format="auto_round")
    return out


def wrong_names(source: Path, out: Path) -> list[str]:
    """What is not as in the source: plain tensors that are not there or differ, and names that the source has not."""
    before, after = Tensors.of(source).found, Tensors.of(out).found
    stems = {name.rpartition(".")[0] for name in after if name.endswith(".qweight")}
    faults = []
    for name, tensor in before.items():
        if name in after:
            same = after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
            if not same or bytes_of(after[name]) != bytes_of(tensor):
                faults.append(f"{name} differs")
        elif not _is_quantized(name, stems):
            faults.append(f"{name} is missing")
    known = {name.rpartition(".")[0] for name in before}
    for name in after:
        stem, _, leaf = name.rpartition(".")
        if name not in before and not (leaf in PACKED and (stem in known or _of_fused(stem, before))):
            faults.append(f"{name} is not in the source")
    return faults


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_quantized(name: str, stems: set[str]) -> bool:
    """Whether a tensor of the source is held packed: by its own name, or as experts of a fused tensor."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight" and stem in stems:
        return True
    return any(found.startswith(f"{stem}.") and found[len(stem) + 1 :].split(".")[0].isdigit() for found in stems)


def _of_fused(stem: str, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether a packed layer is one expert of a tensor that the source holds fused."""
    parts = stem.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    if not places:
        return False
    experts = ".".join(parts[: places[-1]]) + "."
    return any(name.startswith(experts) and tensor.dim() == 3 for name, tensor in before.items())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of two fixed samples, in float32, without a cache."""
    return model(input_ids=torch.stack(sample_ids(2, 16, seed=11)), use_cache=False).logits.float()


def reopen(folder: Path) -> Any:
    """The model of a folder through Transformers. Raises ValueError where weights were missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lost = {key: sorted(info[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if lost:
        raise ValueError(f"reopening: {lost}")
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def packed_layers(folder: Path) -> int:
    return sum(name.endswith(".qweight") for name in Tensors.of(folder).found)


COLUMNS = ("plan", "tuned", "RTN", "model-free", "names", "reopened", "logits")


def check_family(family: Family, work: Path) -> dict[str, str]:
    """{column: "yes", "refused: why" or "fails: why"}; "-" where an earlier column is why it was not tried."""
    from auto_round import AutoRound
    from auto_round.errors import AutoRoundError

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

    column("plan", lambda: AutoRound(str(source), **options()).plan().render() and None)
    tuned = column("tuned", lambda: quantize(source, work / "tuned"))
    rounded = column("RTN", lambda: quantize(source, work / "rtn", iters=0, disable_opt_rtn=True))
    free = column("model-free", lambda: quantize(source, work / "free", iters=0, model_free=True))
    made = {"tuned": tuned, "RTN": rounded, "model-free": free}
    made = {name: folder for name, folder in made.items() if folder is not None}
    if not made:
        return found

    def names() -> str | None:
        faults = {name: wrong_names(source, folder) for name, folder in made.items()}
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
    from auto_round import AutoRound

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
    return (lines[0] if lines else type(error).__name__)[:300]


def read_results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
