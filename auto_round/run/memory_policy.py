"""Choose where calibration activations are stored (device, RAM or disk) so that a run stays within max_memory."""

from __future__ import annotations

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calibration.expert_rows import routed_experts
from auto_round.envs import work_space
from auto_round.errors import ConfigError, OutputError
from auto_round.formats.base import OutputFormat
from auto_round.modeling.partial_loading import expert_of
from auto_round.output.folders import free_bytes
from auto_round.report.memory import format_bytes
from auto_round.run.memory import MemoryInputs, plan_memory
from auto_round.run.plan import MemoryPlan
from auto_round.run.settings import MemoryBudget

_TOLERANCE = 1.02  # what libraries hold differs by this much from one start to the next


def choose_storage(
    inputs: MemoryInputs, formats: tuple[OutputFormat, ...] = (), per_expert: bool | None = None
) -> MemoryPlan:
    """The fastest storage of hidden states within the budget: on the device, in RAM, in a file; then the same with the
    experts of a block read one at a time.

    Args:
        per_expert: how an interrupted run tunes experts, one at a time (True) or with their block (False). The same way
            is chosen if it keeps the budget within 2%. None without such a run.

    Raises ConfigError when none fits; the message gives the limit, the need, and options that lower it.
    """
    settings = inputs.settings
    on_device = settings.device.type != "cpu" and not settings.low_gpu_mem_usage
    storages = [*(["device"] if on_device else []), "ram", *(["file"] if inputs.streams else [])]
    budget = settings.max_memory
    has_experts = inputs.source.lazy and any(map(expert_of, inputs.layers))
    streamable = has_experts and per_expert_unsupported_reason(inputs) is None
    options = [(storage, alone) for alone in ((False, True) if streamable else (False,)) for storage in storages]
    if settings.tunes and per_expert is not None:
        options.sort(key=lambda option: option[1] != per_expert)
    if budget is None:
        return plan_memory(inputs, *options[0])
    plans = [plan_memory(inputs, *option) for option in options]
    for plan in plans:
        slack = _TOLERANCE if settings.tunes and plan.streams_experts == per_expert else 1.0
        if plan.ram <= slack * (budget.ram or plan.ram) and plan.vram <= slack * (budget.device or plan.vram):
            return plan
    raise _insufficient_memory(min(plans, key=lambda plan: (plan.vram, plan.ram)), budget, inputs)


def per_expert_unsupported_reason(inputs: MemoryInputs) -> str | None:
    """Why the experts of a block cannot be tuned one at a time, or None. Rounding one at a time is always possible."""
    if not inputs.settings.tunes:
        return None
    if inputs.settings.on_nan != "fail":
        return f"on_nan={inputs.settings.on_nan} needs them together; use on_nan=fail"
    for block in inputs.source.blocks:
        experts = {e for name in inputs.layers if name.startswith(f"{block}.") and (e := expert_of(name))}
        if not experts:
            continue
        found = list(routed_experts(inputs.source.model.get_submodule(block)))
        if len(found) != 1 or any(e.rpartition(".")[0] != f"{block}.{found[0]}" for e in experts):
            return f"this model runs the experts of {block} in an unsupported way"
    return None


def _insufficient_memory(plan: MemoryPlan, budget: MemoryBudget, inputs: MemoryInputs) -> ConfigError:
    """The error that gives the limit, the need, and options that lower it, most helpful first."""
    wrong, settings, given = [], inputs.settings, inputs.settings.algorithm
    if plan.ram > (budget.ram or plan.ram):
        most = max(plan.phases, key=lambda name: plan.phases[name])
        wrong.append(
            f"{format_bytes(budget.ram or 0)} of RAM was given and {_round_up_size(plan.ram)} is needed (most "
            f"in: {most})"
        )
    if plan.vram > (budget.device or plan.vram):
        wrong.append(
            f"{format_bytes(budget.device or 0)} of {settings.device} was given, {_round_up_size(plan.vram)} is needed"
        )
    advice = "model_free=True with disable_opt_rtn=True (--model_free), which reads single tensors"
    if isinstance(given, SignRoundConfig):
        options = [f"lower seqlen ({settings.seqlen})"]
        if given.batch_size > 1:
            total = given.batch_size * given.gradient_accumulate_steps
            options.append(f"batch_size=1 with gradient_accumulate_steps={total}")
        if settings.device.type != "cpu" and not settings.low_gpu_mem_usage:
            options.append("low_gpu_mem_usage=True")
        options.append("iters=0, which does not tune")
        advice = f"{', '.join(options)}; activations are in a file already, so nsamples does not matter"
        if plan.streams_experts:
            advice += "; experts are tuned one at a time already"
        elif any(map(expert_of, inputs.layers)):
            reason = per_expert_unsupported_reason(inputs) or "the model is in memory already"
            advice += f"; experts cannot be tuned one at a time: {reason}"
    return ConfigError(f"max_memory: {'; '.join(wrong)}. Give that much, or {advice}")


def _round_up_size(size: int) -> str:
    """`size` rounded up, as text that max_memory accepts."""
    return f"{-(-size // 10_000_000) / 100:.2f}GB"


def check_work_space(plan: MemoryPlan) -> None:
    """Raise OutputError when the disk of the work space is too small for activations and codes of experts."""
    free, needed = free_bytes(work_space()), plan.spilled + plan.codes
    if free < needed:
        what = "activations and codes" if plan.codes else "activations"
        raise OutputError(
            f"{format_bytes(needed)} of {what} are stored in {work_space()} (AR_WORK_SPACE), whose disk has "
            f"{format_bytes(free)} free; free some space, set AR_WORK_SPACE to another disk, give more max_memory, or "
            "lower nsamples or seqlen"
        )
