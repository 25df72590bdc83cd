"""Where the hidden states of the calibration samples are kept, by what a run may hold."""

from __future__ import annotations

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calibration.expert_rows import experts_inside
from auto_round.compressors.budget import MemoryBudget
from auto_round.compressors.memory_plan import Facts, MemoryPlan, plan_memory
from auto_round.envs import work_space
from auto_round.errors import ConfigError, OutputError
from auto_round.export.disk import free_bytes
from auto_round.export.formats import OutputFormat
from auto_round.modeling.one_expert import expert_of
from auto_round.report.memory import format_bytes

_NEAR = 1.02  # what libraries hold differs by this much from one start to the next


def place_activations(
    facts: Facts, formats: tuple[OutputFormat, ...] = (), tuned_alone: bool | None = None
) -> MemoryPlan:
    """The fastest way that keeps the budget: hidden states on the device, in RAM, in a file; then the same with one
    expert of a block at a time.

    Args:
        tuned_alone: an interrupted run tunes experts one at a time (True) or with their block (False): that way is
            taken if it keeps the budget, or nearly; None: there is no such run.

    Raises ConfigError when none does: what was given, what is needed, and what lowers that.
    """
    settings = facts.settings
    on_device = settings.device.type != "cpu" and not settings.low_gpu_mem_usage
    places = [*(["device"] if on_device else []), "ram", *(["file"] if facts.streams else [])]
    budget = settings.max_memory
    possible = facts.source.lazy and any(map(expert_of, facts.layers)) and why_not_alone(facts) is None
    ways = [(place, alone) for alone in ((False, True) if possible else (False,)) for place in places]
    if settings.tunes and tuned_alone is not None:
        ways.sort(key=lambda way: way[1] != tuned_alone)
    if budget is None:
        return plan_memory(facts, *ways[0])
    plans = [plan_memory(facts, *way) for way in ways]
    for plan in plans:
        if _keeps(plan, budget, _NEAR if settings.tunes and plan.streams_experts == tuned_alone else 1.0):
            return plan
    raise _too_little(min(plans, key=lambda plan: (plan.vram, plan.ram)), budget, facts)


def why_not_alone(facts: Facts) -> str | None:
    """Why the experts of a block cannot be taken one at a time, or None. Rounding always can."""
    if not facts.settings.tunes:
        return None
    if facts.settings.on_nan != "fail":
        return f"on_nan={facts.settings.on_nan} wants them together; use on_nan=fail"
    for block in facts.source.blocks:
        experts = {e for name in facts.layers if name.startswith(f"{block}.") and (e := expert_of(name))}
        if not experts:
            continue
        found = list(experts_inside(facts.source.model.get_submodule(block)))
        if len(found) != 1 or any(e.rpartition(".")[0] != f"{block}.{found[0]}" for e in experts):
            return f"this model runs the experts of {block} in a way of its own"
    return None


def _keeps(plan: MemoryPlan, budget: MemoryBudget, slack: float) -> bool:
    return plan.ram <= slack * (budget.ram or plan.ram) and plan.vram <= slack * (budget.device or plan.vram)


def _too_little(plan: MemoryPlan, budget: MemoryBudget, facts: Facts) -> ConfigError:
    wrong, settings = [], facts.settings
    if plan.ram > (budget.ram or plan.ram):
        most = max(plan.phases, key=lambda name: plan.phases[name])
        wrong.append(
            f"{format_bytes(budget.ram or 0)} of RAM was given and {_up(plan.ram)} is needed (most in: {most})"
        )
    if plan.vram > (budget.device or plan.vram):
        wrong.append(f"{format_bytes(budget.device or 0)} of {settings.device} was given, {_up(plan.vram)} is needed")
    return ConfigError(f"max_memory: {'; '.join(wrong)}. {_advice(facts, plan)}")


def _up(size: int) -> str:
    """A size as a text that can be given back as a limit: no less than `size`."""
    return f"{-(-size // 10_000_000) / 100:.2f}GB"


def _advice(facts: Facts, plan: MemoryPlan) -> str:
    """What lowers the need, most helpful first, with the flags."""
    settings = facts.settings
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
    ways.append("iters=0, which does not tune")
    said = "activations are in a file already, so nsamples does not matter"
    if plan.streams_experts:
        said += "; experts are tuned one at a time already"
    elif any(map(expert_of, facts.layers)):
        said += f"; experts cannot be tuned one at a time: {why_not_alone(facts) or 'the model is in memory already'}"
    return f"Give that much, or {', '.join(ways)}; {said}"


def check_work_space(plan: MemoryPlan) -> None:
    """Raise OutputError when the folder for activations, and codes of experts, has too little disk."""
    free, needed = free_bytes(work_space()), plan.spilled + plan.codes
    if free < needed:
        what = "activations and codes" if plan.codes else "activations"
        raise OutputError(
            f"{format_bytes(needed)} of {what} go to {work_space()} (AR_WORK_SPACE), whose disk has "
            f"{format_bytes(free)} free; free some space, set AR_WORK_SPACE to another disk, give more max_memory, or "
            "lower nsamples or seqlen"
        )
