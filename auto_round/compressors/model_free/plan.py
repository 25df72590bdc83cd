"""The job of a model-free run: the regular one, with names of what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.model_free.options import ModelFreeOptions
from auto_round.compressors.model_free.units import plan_work
from auto_round.compressors.planning import make_job
from auto_round.compressors.settings import Settings
from auto_round.export.formats import OutputFormat
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.report.memory import format_bytes

_TOWERS = ("vision", "visual", "vision_tower", "vision_model", "audio_tower", "audio_model", "image_newline",
           "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio")  # fmt: skip
_TOWER = "it reads images or sound"


@dataclass(frozen=True)
class ModelFreeJob(Job):
    """A job that needs no model.

    Attributes:
        workers, memory: see `ModelFreeOptions`.
    """

    workers: int = 1
    memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_free": True}

    def render(self) -> str:
        text = super().render()
        head, _, rest = text.partition("\nmemory ")
        how = f"{'model-free':<18} {self.workers} tensors at a time, at most {format_bytes(self.memory)} together"
        lines = [f"{head}\n{how}\nmemory {rest}"] if rest else [text, how]
        return "\n".join(lines)


def model_free_job(
    settings: Settings, source: CheckpointSource, formats: Sequence[OutputFormat], options: ModelFreeOptions,
    output_dir: str | None = None, notes: Sequence[str] = (),
) -> ModelFreeJob:  # fmt: skip
    """The job of `planning.make_job`, with the reasons why layers outside the blocks stay dense, and its real memory.

    Raises what `make_job` raises.
    """
    # The limit is one on the tensors in work here (ModelFreeOptions), and there are no activations.
    job = make_job(replace(settings, max_memory=None), source, formats, output_dir)
    layers = {name: _with_reason(plan, source) for name, plan in job.layers.items()}
    values = {f.name: getattr(job, f.name) for f in fields(Job)}
    values |= {"layers": layers, "notes": (*job.notes, *notes), "journal_bytes": 0, "memory_plan": None}
    made = ModelFreeJob(**values, workers=options.workers, memory=options.memory)
    largest = max((u.memory for fmt in formats for u in plan_work(made, source, fmt).units), default=0)
    return replace(made, peak_ram=max(largest, min(options.memory, options.workers * largest)), peak_vram=0)


def _with_reason(plan: LayerPlan, source: CheckpointSource) -> LayerPlan:
    if plan.scheme.quantizes_weights or plan.reason is not None:
        return plan
    parts = plan.name.split(".")
    if any(part in _TOWERS for part in parts):
        return replace(plan, reason=_TOWER)
    return plan
