"""Where the hidden states of the calibration samples are kept, by what a run may hold."""

from __future__ import annotations

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.compressors.budget import MemoryBudget
from auto_round.compressors.memory_plan import Facts, MemoryPlan, plan_memory
from auto_round.compressors.settings import Settings
from auto_round.envs import work_space
from auto_round.errors import ConfigError, OutputError
from auto_round.export.disk import free_bytes
from auto_round.export.formats import OutputFormat
from auto_round.modeling.one_expert import expert_of
from auto_round.report.memory import format_bytes


def place_activations(facts: Facts, formats: tuple[OutputFormat, ...] = ()) -> MemoryPlan:
    """The fastest way that keeps the budget: on the device, in RAM, in a file; and where experts are only rounded, one
    expert of a block at a time.

    Raises ConfigError when none does: what was given, what is needed, and what lowers that.
    """
    settings = facts.settings
    on_device = settings.device.type != "cpu" and not settings.low_gpu_mem_usage
    places = [*(["device"] if on_device else []), "ram", *(["file"] if facts.streams else [])]
    budget = settings.max_memory
    if budget is None:
        return plan_memory(facts, places[0])
    ways = [(place, False) for place in places]
    if facts.source.lazy and not settings.tunes and any(map(expert_of, facts.layers)):
        ways += [(place, True) for place in places]
    plans = [plan_memory(facts, *way) for way in ways]
    for plan in plans:
        if _keeps(plan, budget):
            return plan
    raise _too_little(plans[-1], budget, settings)


def _keeps(plan: MemoryPlan, budget: MemoryBudget) -> bool:
    return plan.ram <= (budget.ram or plan.ram) and plan.vram <= (budget.device or plan.vram)


def _too_little(plan: MemoryPlan, budget: MemoryBudget, settings: Settings) -> ConfigError:
    wrong = []
    if plan.ram > (budget.ram or plan.ram):
        most = max(plan.phases, key=lambda name: plan.phases[name])
        wrong.append(
            f"{format_bytes(budget.ram or 0)} of RAM was given and {_up(plan.ram)} is needed (most in: {most})"
        )
    if plan.vram > (budget.device or plan.vram):
        wrong.append(f"{format_bytes(budget.device or 0)} of {settings.device} was given, {_up(plan.vram)} is needed")
    return ConfigError(f"max_memory: {'; '.join(wrong)}. {_advice(settings)}")


def _up(size: int) -> str:
    """A size as a text that can be given back as a limit: no less than `size`."""
    return f"{-(-size // 10_000_000) / 100:.2f}GB"


def _advice(settings: Settings) -> str:
    """What lowers the need, most helpful first, with the flags."""
    if not isinstance(settings.algorithm, SignRoundConfig):
        return (
            "Give that much, or model_free=True with disable_opt_rtn=True (--model_free), which goes tensor by tensor"
        )
    given = settings.algorithm
    total = given.batch_size * given.gradient_accumulate_steps
    ways = [f"lower seqlen ({settings.seqlen})"]
    if given.batch_size > 1:
        ways.append(f"batch_size=1 with gradient_accumulate_steps={total}")
    if settings.device.type != "cpu" and not settings.low_gpu_mem_usage:
        ways.append("low_gpu_mem_usage=True")
    ways.append("iters=0, which does not tune (and takes one expert at a time)")
    return f"Give that much, or {', '.join(ways)}; activations are in a file already, so nsamples does not matter"


def check_work_space(needed: int) -> None:
    """Raise OutputError when the folder for activations has too little disk."""
    free = free_bytes(work_space())
    if free < needed:
        raise OutputError(
            f"{format_bytes(needed)} of activations go to {work_space()} (AR_WORK_SPACE), whose disk has "
            f"{format_bytes(free)} free; free some space, set AR_WORK_SPACE to another disk, give more max_memory, or "
            "lower nsamples or seqlen"
        )
