"""Estimate peak memory of each phase of a run from shapes alone, and store activations so that it keeps max_memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import is_evaluation_step, micro_batch_size
from auto_round.calibration.observers import hessian_bytes
from auto_round.errors import ConfigError
from auto_round.modeling.config import largest, read_value, text_config
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.partial_loading import expert_of
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import format_bytes, rss_bytes
from auto_round.run.plan import LayerPlan, MemoryPlan
from auto_round.run.settings import MemoryBudget, Settings
from auto_round.run.streams import samples_in_pass

_LIBRARY_GROWTH = 30_000_000  # code and threads that libraries load when the first block runs
_DEVICE_BUFFERS = 400_000_000  # elementwise passes on a device work on chunks of 16 M weights
_SMOKE_TOKENS = 64
_STREAM_COUNT = ("hc_mult", "altup_num_inputs")  # config keys of models with parallel streams of hidden states
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")
_FUNCTION_BYTES = 40  # per weight that is tuned through a registered function, with its autograd graph


class BudgetError(ConfigError):
    """`max_memory` is too low for every way to run. `needed`: a sufficient value of it."""

    def __init__(self, text: str, needed: str) -> None:
        super().__init__(text)
        self.needed = needed


class BlockBytes(NamedTuple):
    """Bytes of a block when loaded, and its peaks while it is run in full precision, quantized, and run again."""

    read: int = 0
    full: int = 0
    tuned: int = 0
    after: int = 0


class TuningBytes(NamedTuple):
    """Bytes of learnable parameters: while a block is tuned, more during an optimizer step, and for the codes."""

    held: int
    step: int
    finished: int


class MemoryModel:
    """Memory of a run, from its settings and the shapes of a model. `compute`: dtype of the matrix products."""

    def __init__(
        self, settings: Settings, source: ModelSource, layers: Mapping[str, LayerPlan], compute: torch.dtype,
        layers_kept_in_memory: bool = False,
    ) -> None:  # fmt: skip
        self.settings, self.source, self.layers, self.compute = settings, source, layers, compute
        self._keeps_layers, self._device = layers_kept_in_memory, settings.device
        self._config = text_config(source.config)
        # Hidden states with all parallel streams of the model.
        self._width = largest(self._config, "hidden_size") * largest(self._config, *_STREAM_COUNT, default=1)
        self._tokens = settings.seqlen if settings.needs_data else min(_SMOKE_TOKENS, settings.seqlen)
        # Copies of the hidden states of all samples: full-precision outputs, and inputs from quantized blocks.
        self._streams = 2 if settings.tunes else int(settings.needs_data)
        self._batch = getattr(settings.algorithm, "batch_size", 8)
        self._chosen_experts = largest(self._config, *_TOP_K, default=1)

    def choose_storage(self, tolerance: float = 1.0) -> MemoryPlan:
        """The fastest storage of hidden states within the budget: on the device, in RAM, in a file; without tuning then
        the same with the experts of a block read one at a time. `tolerance`: factor by which the budget may be
        exceeded. Raises BudgetError when none fits."""
        settings, budget = self.settings, self.settings.max_memory
        on_device = self._device.type != "cpu" and not settings.low_gpu_mem_usage
        storages = [*(["device"] if on_device else []), "ram", *(["file"] if self._streams else [])]
        streamable = not settings.tunes and self.source.streams_experts_of(self.layers)
        options = [(storage, alone) for alone in ((False, True) if streamable else (False,)) for storage in storages]
        if budget is None:
            return self.plan(*options[0])
        plans = [self.plan(*option) for option in options]
        for plan in plans:
            ram, vram = budget.ram or plan.ram, budget.device or plan.vram
            if plan.ram <= tolerance * ram and plan.vram <= tolerance * vram:
                return plan
        raise self._budget_error(min(plans, key=lambda plan: (plan.vram, plan.ram)), budget)

    def _budget_error(self, plan: MemoryPlan, budget: MemoryBudget) -> BudgetError:
        """The error that gives the limit, the need, and options that lower it, most helpful first."""
        wrong, settings, given = [], self.settings, self.settings.algorithm
        ram, vram = (f"{-(-size // 10_000_000) / 100:.2f}GB" for size in (plan.ram, plan.vram))  # rounded up
        if plan.ram > (budget.ram or plan.ram):
            needed = f"{ram} is needed (most in: {plan.largest_phase})"
            wrong.append(f"{format_bytes(budget.ram or 0)} of RAM was given and {needed}")
        if plan.vram > (budget.device or plan.vram):
            wrong.append(f"{format_bytes(budget.device or 0)} of {self._device} was given, {vram} is needed")
        advice = "model_free=True with disable_opt_rtn=True (--model_free), which reads single tensors"
        if isinstance(given, SignRoundConfig) or settings.asked_algorithm:
            options = [f"lower seqlen ({settings.seqlen})"]
            if isinstance(given, SignRoundConfig) and given.batch_size > 1:
                total = given.batch_size * given.gradient_accumulate_steps
                options.append(f"batch_size=1 with gradient_accumulate_steps={total}")
            if self._device.type != "cpu" and not settings.low_gpu_mem_usage:
                options.append("low_gpu_mem_usage=True")
            options.append("iters=0, which does not tune")
            advice = f"{', '.join(options)}; activations are in a file already, so nsamples does not matter"
            if settings.asked_algorithm:
                advice += "; experts are read one at a time already, without tuning"
            elif any(map(expert_of, self.layers)):
                advice += "; experts cannot be read one at a time: the model is in memory already"
        text = f"max_memory: {'; '.join(wrong)}. Give that much, or {advice}"
        return BudgetError(text, ram if self._device.type == "cpu" else f"cpu={ram},{self._device.index or 0}={vram}")

    def plan(self, streams: str, streams_experts: bool = False) -> MemoryPlan:
        """Estimate peaks with the hidden states in "ram", on the "device" or in a "file"."""
        settings = self.settings
        held = self._streams * settings.nsamples * settings.seqlen * self._width * self.compute.itemsize
        sizes = [self._block(block, streams_experts) for block in self.source.blocks] or [BlockBytes()]
        read, full, tuned, after = map(max, zip(*sizes, strict=True))
        embedding, outside = self._outside_blocks()
        phases = {
            "capture": embedding + read,
            "block, full precision": full,
            "block, quantized": tuned,
            "block, afterwards": after,
            "outside the blocks": outside,
        }
        vram = 0
        if self._device.type != "cpu":
            vram = max(phases.values()) + held * (streams == "device") + _DEVICE_BUFFERS
            phases = {"block": max((self.source.dtype.itemsize * p.weights for p in self.layers.values()), default=0)}
        codes = _weights(_quantized(list(self.layers.values()))) if self._keeps_layers else 0
        ram = {name: size + codes + held * (streams == "ram") for name, size in phases.items()}
        ram["saving"] = outside + codes
        libraries = rss_bytes() + _LIBRARY_GROWTH
        ram = {name: libraries + size for name, size in ram.items()}
        spilled = held if streams == "file" else 0
        return MemoryPlan(max(ram.values()), vram, spilled, ram, streams, streams_experts)

    def module_bytes(self, name: str) -> int:
        """Bytes of all tensors of a module when loaded."""
        found = (self.source.tensor_meta(n) for n in self.source.tensor_names() if n.startswith(f"{name}."))
        return sum(prod(shape) * dtype.itemsize for shape, dtype in found)

    def _cast(self, size: int) -> int:
        """Bytes of copies in the compute dtype of tensors of `size` bytes; none if that is the model's dtype."""
        own = self.source.dtype
        return 0 if self.compute == own else size // own.itemsize * self.compute.itemsize

    def _loaded(self, plans: Sequence[LayerPlan], own: int) -> BlockBytes:
        """Memory of these layers of a block, which are in memory together with all that is loaded, `own` bytes."""
        chosen, settings = _quantized(plans), self.settings
        weights, cast = _weights(chosen), self._cast(own)
        dropped = weights * self.compute.itemsize if cast else 0
        widest = max((p.weights for p in chosen), default=0)
        codes = int(weights * 1.06)
        samples = settings.nsamples if settings.needs_data else 1  # one: the check's
        forward = self._forward(plans, min(samples, samples_in_pass(self._batch, self._tokens, self._device)))
        runs = settings.needs_data or settings.verify
        if settings.tunes:
            learned = self.tuning(chosen)
            tuned = max(learned.held + max(learned.step, self._backward(plans)), learned.finished + codes)
        else:
            tuned = codes + 9 * widest  # rounding works on chunks; the codes of a layer are concatenated
        hessians = self._hessians(chosen)
        tuned += 2 * hessians  # with their factors
        full = own + cast + forward + hessians if settings.needs_data else own + (cast if runs else 0)
        # Layers are dequantized in float32 one by one, and then the block is run.
        after = own + codes + (cast + max(forward, 4 * widest) if runs else 8 * widest)
        return BlockBytes(own, full, own + cast - dropped + tuned, after)

    def _block(self, block: str, streams_experts: bool) -> BlockBytes:
        """Memory of one block, loaded as a whole or with one of its experts in memory at a time."""
        plans = [plan for name, plan in self.layers.items() if name.startswith(f"{block}.")]
        loaded = self.module_bytes(block)
        experts = {expert for plan in plans if (expert := expert_of(plan.name))}
        if not (streams_experts and experts):
            return self._loaded(plans, loaded)
        sizes = [self.module_bytes(expert) for expert in experts]
        others, around = [plan for plan in plans if expert_of(plan.name) is None], loaded - sum(sizes)
        rest = self._loaded(others, around)
        # An expert when loaded, and in the compute dtype or with its codes.
        one = int(max(sizes) * (1 + max(1.0, self.compute.itemsize / self.source.dtype.itemsize)))
        elsewhere = [plan for name, plan in self.layers.items() if expert_of(name) is None]
        forward = self._forward(list(self.layers.values()), 1) - self._forward(elsewhere, 1)
        more = one + max(0, forward) + self._hessians(plans) - self._hessians(others)
        return BlockBytes(around + one, rest.full + more, rest.tuned + more, rest.after + more)

    def _hessians(self, plans: Sequence[LayerPlan]) -> int:
        """Hessians of the inputs of the layers among these that error feedback quantizes."""
        settings, asked = self.settings, self.settings.gptq is not None
        if not asked and (settings.imatrix is not None or not (settings.optimized_start and settings.needs_data)):
            return 0
        return hessian_bytes([plan.in_features for plan in _quantized(plans) if plan.codec.uses_feedback(asked)])

    def tuning(self, chosen: Sequence[LayerPlan]) -> TuningBytes:
        algorithm, compute, model = self.settings.algorithm, self.compute, self.source.dtype
        assert isinstance(algorithm, SignRoundConfig)
        groups: dict[object, list[LayerPlan]] = defaultdict(list)
        for index, plan in enumerate(chosen):
            alone = index if plan.scheme.group_size == 0 else None
            groups[plan.scheme, plan.ggml, plan.in_features, alone].append(plan)
        # Optimizer state per weight, and the temporary gradient and update.
        state, moment = (8, 8) if algorithm.enable_adam else (4, 8) if algorithm.momentum > 0 else (0, 0)
        copied = any(is_evaluation_step(done, algorithm.iters) for done in range(1, algorithm.iters))
        held = step = finished = 0.0
        for members in groups.values():
            first, count = members[0], _weights(members)
            learned = first.codec.tuned(first.in_features)
            if learned is None:
                held, finished = held + _FUNCTION_BYTES * count, finished + _FUNCTION_BYTES * count
                continue
            size = learned.group
            width = -(-first.in_features // size) * size
            count = count // first.in_features * width
            shared = len(members) == 1 and width == first.in_features and (compute in (torch.float32, model))
            # Stacked weights, in the model's dtype if products are float32.
            stacked = 0 if shared else model.itemsize if compute == torch.float32 else compute.itemsize
            # Dequantized weights, gradient, rounding deltas, and scales.
            plain = stacked + 2 * compute.itemsize + 4 + 4 * learned.numbers / size
            best = (learned.snapshot + 8 / size) if copied else 0  # codes, or deltas
            if self._hessians(members):
                plain += 4  # initial rounding deltas from the Hessians
            held += count * (plain + best + state)
            step = max(step, count * (moment + 12 / size))
            finished += count * (plain + state)
        return TuningBytes(int(held), int(step), int(finished))

    def _features(self, plans: Sequence[LayerPlan]) -> tuple[float, float]:
        """(total inputs and outputs of all linear layers that process a token, widest of them)."""
        experts = [m.num_experts for m in self.source.model.modules() if isinstance(m, LinearExperts)]
        share = min(1.0, self._chosen_experts / max(experts)) if experts else 1.0
        total = widest = 0.0
        for plan in plans:
            part = share if ".experts." in plan.name else 1.0
            total += part * (plan.in_features + plan.out_features)
            times = self._chosen_experts if part < 1 else 1
            widest = max(widest, times * max(plan.in_features, plan.out_features))
        return total, widest

    def _attention(self) -> int:
        """Scores of one sample; fused kernels do not store them."""
        if read_value(self._config, "_attn_implementation") != "eager":
            return 0
        return largest(self._config, "num_attention_heads", default=1) * self._tokens**2 * self.compute.itemsize

    def _forward(self, plans: Sequence[LayerPlan], samples: int) -> int:
        """One pass without gradients: four tensors of the MLP's width and four of the model's."""
        values = samples * self._tokens * (4 * self._features(plans)[1] + 4 * self._width)
        return int(values * self.compute.itemsize) + 3 * samples * self._attention()

    def _backward(self, plans: Sequence[LayerPlan]) -> int:
        """One pass with gradients: inputs and outputs of the layers, sixteen other tensors, and four gradients in
        flight of the widest layer."""
        samples = micro_batch_size(self._batch, self._tokens, len(_quantized(plans)), self._device)
        total, widest = self._features(plans)
        values = samples * self._tokens * (total + 16 * self._width + 4 * widest)
        return int(values * self.compute.itemsize) + 4 * samples * self._attention()

    def _outside_blocks(self) -> tuple[int, int]:
        """Bytes of the embedding, and the peak of quantizing layers outside the blocks, of saving and verifying."""
        source, settings = self.source, self.settings
        blocks, tied = tuple(f"{block}." for block in source.blocks), source.tied()
        metas = {n: source.tensor_meta(n) for n in source.tensor_names() if not n.startswith(blocks) and n not in tied}
        sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in metas.items()}
        most = max(sizes.values(), default=0)
        embedding = max((size for name, size in sizes.items() if "embed" in name or "wte" in name), default=0) or most
        logits = _SMOKE_TOKENS * largest(self._config, "vocab_size") * (source.dtype.itemsize + 4)
        peak = most * 2  # loaded, and in the output dtype
        for plan in _quantized(list(self.layers.values())):
            if not f"{plan.name}.".startswith(blocks):
                # The weight, codes of two candidates, and rounding deltas of one of them.
                work = 8 if settings.tunes else 3 + source.dtype.itemsize
                peak = max(peak, plan.weights * work + 4 * plan.in_features**2)
                logits += plan.weights * 5  # codes and the dequantized weight
        return embedding, max(peak, sum(sizes.values()) + logits if settings.verify else 0)


def _quantized(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    return [plan for plan in plans if plan.quantized]


def _weights(plans: Sequence[LayerPlan]) -> int:
    return sum(plan.weights for plan in plans)
