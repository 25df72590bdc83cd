"""Estimate peak RAM and device memory of each phase of a run, from shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import keeps_best_copy, micro_batch_size
from auto_round.calibration.expert_rows import max_tokens_per_expert, routed_experts
from auto_round.calibration.observers import hessian_bytes
from auto_round.modeling.config import largest, read_value, text_config
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.partial_loading import expert_of
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import rss_bytes
from auto_round.run.expert_layers import stored_bytes
from auto_round.run.plan import LayerPlan, MemoryPlan
from auto_round.run.settings import Settings
from auto_round.run.streams import samples_in_pass

_LIBRARY_GROWTH = 30_000_000  # code and threads that libraries load when the first block runs
_DEVICE_BUFFERS = 400_000_000  # elementwise passes on a device work on chunks of 16 M weights
_SMOKE_TOKENS = 64
_STREAM_COUNT = ("hc_mult", "altup_num_inputs")  # config keys of models with parallel streams of hidden states
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")
_FUNCTION_BYTES = 40  # per weight that is tuned through a registered function, with its autograd graph


@dataclass(frozen=True)
class MemoryInputs:
    """The model and settings that memory is estimated from."""

    settings: Settings
    source: ModelSource
    layers: Mapping[str, LayerPlan]
    compute: torch.dtype
    layers_kept_in_memory: bool = False

    @property
    def config(self) -> object:
        return text_config(self.source.config)

    @property
    def width(self) -> int:
        """Width of the hidden states, with all parallel streams of the model."""
        return largest(self.config, "hidden_size") * largest(self.config, *_STREAM_COUNT, default=1)

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.settings.seqlen if self.settings.needs_data else min(_SMOKE_TOKENS, self.settings.seqlen)

    @property
    def streams(self) -> int:
        """Copies of the hidden states of all samples: full-precision outputs, and inputs from quantized blocks."""
        return 2 if self.settings.tunes else int(self.settings.needs_data)

    @property
    def batch(self) -> int:
        algorithm = self.settings.algorithm
        return algorithm.batch_size if isinstance(algorithm, SignRoundConfig) else 8

    def cast(self, size: int) -> int:
        """Bytes of copies in the compute dtype of tensors of `size` bytes; none if that is the model's dtype."""
        own = self.source.dtype
        return 0 if self.compute == own else size // own.itemsize * self.compute.itemsize


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block when loaded, and its peaks, without hidden states, while it is run in full precision,
    quantized, and run again."""

    read: int
    full: int
    tuned: int
    after: int


def plan_memory(inputs: MemoryInputs, streams: str, streams_experts: bool = False) -> MemoryPlan:
    """Estimate peaks with the hidden states in "ram", on the "device" or in a "file", and the experts of a block all in
    memory or one at a time."""
    settings, source = inputs.settings, inputs.source
    on_device = settings.device.type != "cpu"
    one = settings.nsamples * settings.seqlen * inputs.width * inputs.compute.itemsize if inputs.streams else 0
    held = one * inputs.streams
    alone = streams_experts and settings.tunes
    if alone:
        held += max((rows_bytes(inputs, block).buffers for block in source.blocks), default=0)
    sizes = [block_bytes(inputs, block, streams_experts) for block in source.blocks]
    full, tuned, after = (max((getattr(s, n) for s in sizes), default=0) for n in ("full", "tuned", "after"))
    matrices = non_block_bytes(inputs)
    phases = {
        "capture": matrices.embedding + max((size.read for size in sizes), default=0),
        "block, full precision": full,
        "block, quantized": tuned,
        "block, afterwards": after,
        "outside the blocks": matrices.non_block,
    }
    codes = weight_count(quantized(inputs.layers.values())) if inputs.layers_kept_in_memory else 0
    if not on_device:
        ram = {name: size + codes + held * (streams == "ram") for name, size in phases.items()}
        ram["saving"] = matrices.saving + codes
        vram = 0
    else:
        staged = max(
            (source.dtype.itemsize * p.out_features * p.in_features for p in inputs.layers.values()), default=0
        )
        ram = {"block": staged + codes + held * (streams == "ram"), "saving": matrices.saving + codes}
        vram = max(phases.values()) + held * (streams == "device") + _DEVICE_BUFFERS
    libraries = rss_bytes() + _LIBRARY_GROWTH
    ram = {name: libraries + size for name, size in ram.items()}
    spilled = held if streams == "file" else 0
    stored = 0  # codes and scales of the experts of a block
    for block in source.blocks if alone else ():
        experts = chain(*_block_layers(inputs, block)[1].values())
        stored = max(stored, sum(stored_bytes(plan) for plan in quantized(experts)))
    return MemoryPlan(max(ram.values()), vram, spilled, ram, one, streams, streams_experts, stored)


def quantized(plans: Iterable[LayerPlan]) -> list[LayerPlan]:
    """The quantized ones of these layers."""
    return [plan for plan in plans if plan.scheme.quantizes_weights]


def weight_count(plans: Iterable[LayerPlan]) -> int:
    """Weights of these layers."""
    return sum(plan.out_features * plan.in_features for plan in plans)


def tensor_bytes(source: ModelSource, prefix: str) -> int:
    """Bytes of all tensors of a module when loaded."""
    found = (source.tensor_meta(n) for n in source.tensor_names() if n.startswith(f"{prefix}."))
    return sum(prod(shape) * dtype.itemsize for shape, dtype in found)


def block_bytes(inputs: MemoryInputs, block: str, streams_experts: bool = False) -> BlockBytes:
    """Memory of one block, loaded as a whole or with one of its experts in memory at a time."""
    others, experts = _block_layers(inputs, block)
    loaded = tensor_bytes(inputs.source, block)
    if not experts or not streams_experts:
        return _loaded_bytes(inputs, [*others, *chain(*experts.values())], loaded)
    sizes = {expert: tensor_bytes(inputs.source, expert) for expert in experts}
    around = loaded - sum(sizes.values())
    if not inputs.settings.tunes:
        return _rounded_alone_bytes(inputs, others, experts, sizes, around)
    return _tuned_alone_bytes(inputs, others, experts, sizes, around, rows_bytes(inputs, block))


def _block_layers(inputs: MemoryInputs, block: str) -> tuple[list[LayerPlan], dict[str, list[LayerPlan]]]:
    """The layers of a block outside its experts, and those of each expert."""
    others: list[LayerPlan] = []
    experts: dict[str, list[LayerPlan]] = defaultdict(list)
    for name, plan in inputs.layers.items():
        if name.startswith(f"{block}."):
            expert = expert_of(name)
            (others if expert is None else experts[expert]).append(plan)
    return others, experts


def _loaded_bytes(inputs: MemoryInputs, plans: Sequence[LayerPlan], own: int) -> BlockBytes:
    """Memory of these layers of a block, which are in memory together with all that is loaded, `own` bytes."""
    chosen, compute = quantized(plans), inputs.compute
    weights = weight_count(chosen)
    cast = inputs.cast(own)
    dropped = weights * compute.itemsize if cast else 0
    largest = max((p.out_features * p.in_features for p in chosen), default=0)
    codes = int(weights * 1.06)
    samples = inputs.settings.nsamples if inputs.settings.needs_data else 1  # one: the check's
    micro_batch = min(samples, samples_in_pass(inputs.batch, inputs.tokens, inputs.settings.device))
    forward = forward_bytes(inputs, plans, micro_batch)
    runs = inputs.settings.needs_data or inputs.settings.verify
    if inputs.settings.tunes:
        learned = tuning_bytes(inputs, chosen)
        tuned = max(learned.held + max(learned.step, backward_bytes(inputs, plans)), learned.finished + codes)
    else:
        tuned = codes + 9 * largest  # rounding works on chunks; the codes of a layer are concatenated
    paired = _pairs(inputs, chosen)
    tuned += 2 * paired  # Hessians and their factors
    full = own + cast + forward + paired if inputs.settings.needs_data else own + (cast if runs else 0)
    # Layers are dequantized in float32 one by one, and then the block is run.
    after = own + codes + (cast + max(forward, 4 * largest) if runs else 8 * largest)
    return BlockBytes(own, full, own + cast - dropped + tuned, after)


def _rounded_alone_bytes(
    inputs: MemoryInputs, others: Sequence[LayerPlan], experts: Mapping[str, Sequence[LayerPlan]],
    sizes: Mapping[str, int], around: int,
) -> BlockBytes:  # fmt: skip
    """Memory of one block that is only rounded. `sizes`: bytes of each expert; `around`: those of the rest."""
    rest = _loaded_bytes(inputs, others, around)
    # An expert when loaded, and in the compute dtype or with its codes.
    one = int(max(sizes.values()) * (1 + max(1.0, inputs.compute.itemsize / inputs.source.dtype.itemsize)))
    elsewhere = [plan for name, plan in inputs.layers.items() if expert_of(name) is None]
    forward = forward_bytes(inputs, list(inputs.layers.values()), 1) - forward_bytes(inputs, elsewhere, 1)
    hessians = _pairs(inputs, quantized([*others, *chain(*experts.values())])) - _pairs(inputs, quantized(others))
    more = one + max(0, forward) + hessians
    return BlockBytes(around + one, rest.full + more, rest.tuned + more, rest.after + more)


def _tuned_alone_bytes(
    inputs: MemoryInputs, others: Sequence[LayerPlan], experts: Mapping[str, Sequence[LayerPlan]],
    sizes: Mapping[str, int], around: int, fed: RowsBytes,
) -> BlockBytes:  # fmt: skip
    """The same of one block whose experts are tuned one at a time, after its other layers."""
    settings, algorithm = inputs.settings, inputs.settings.algorithm
    assert isinstance(algorithm, SignRoundConfig)
    rest = _loaded_bytes(inputs, others, around)
    around += inputs.cast(around)
    largest = max(sizes, key=lambda expert: sizes[expert])
    one, own = sizes[largest], experts[largest]
    # The expert when loaded, and in the compute dtype.
    read = one + max(one, inputs.cast(one))
    micro_batch = min(settings.nsamples, samples_in_pass(inputs.batch, inputs.tokens, settings.device))
    forward = forward_bytes(inputs, [*others, *chain(*experts.values())], micro_batch)
    full = around + read + forward + _pairs(inputs, quantized(others))
    chosen = quantized(own)
    weights, codes = weight_count(chosen), int(1.06 * weight_count(quantized(others)))
    learned = tuning_bytes(inputs, chosen)
    # One pass over sequences of its tokens, without gradients, and with: inputs and outputs of the layers, and
    # gradients in flight.
    widest = max(max(plan.in_features, plan.out_features) for plan in own)
    through = sum(plan.in_features + plan.out_features for plan in own)
    item, width = inputs.compute.itemsize, inputs.width
    pieces = micro_batch_size(algorithm.batch_size, fed.rows, max(1, len(chosen)), settings.device)
    backward = pieces * fed.rows * (through + 4 * width + 4 * widest) * item
    pieces = samples_in_pass(inputs.batch, fed.rows, settings.device)
    target = inputs.cast(one) + pieces * fed.rows * (4 * widest + 4 * width) * item
    steps = max(learned.held + max(learned.step, backward), learned.finished + weights)
    alone = one + max(target, steps) + 2 * _pairs(inputs, chosen)
    each = around + codes + fed.routing + max(alone, fed.sorting - fed.routing + forward)
    # Codes of an expert, its weights in float32, and its loaded weights.
    after = around + codes + one + 5 * weights + forward
    return BlockBytes(around + read, full, max(rest.tuned, each), after)


@dataclass(frozen=True)
class RowsBytes:
    """Memory of the samples of experts that are tuned one at a time.

    Attributes:
        buffers: inputs of all experts and targets of one of them.
        routing, sorting: tokens of each expert, and the peak while they are sorted.
        rows: most tokens of an expert in one sequence.
    """

    buffers: int = 0
    routing: int = 0
    sorting: int = 0
    rows: int = 0


def rows_bytes(inputs: MemoryInputs, block: str) -> RowsBytes:
    """The rows of one block; zeros for a block without experts."""
    module = next(iter(routed_experts(inputs.source.model.get_submodule(block)).values()), None)
    if module is None:
        return RowsBytes()
    tokens, chosen = inputs.settings.nsamples * inputs.settings.seqlen, min(_chosen(inputs), module.num_experts)
    most = max_tokens_per_expert(tokens, chosen, module.num_experts)
    buffers = (tokens + most) * module.hidden_dim * inputs.compute.itemsize
    # Sorted: int32 rows and float32 weights. While sorting: experts and weights as recorded, keys and indices.
    return RowsBytes(buffers, 8 * tokens * chosen, 36 * tokens * chosen, -(-most // inputs.settings.nsamples))


def _pairs(inputs: MemoryInputs, chosen: Sequence[LayerPlan]) -> int:
    """Hessians of the inputs of layers that error feedback quantizes."""
    settings, asked = inputs.settings, inputs.settings.gptq is not None
    if not asked and (settings.imatrix is not None or not (settings.optimized_start and settings.needs_data)):
        return 0
    return hessian_bytes([plan.in_features for plan in chosen if plan.codec.uses_feedback(asked)])


@dataclass(frozen=True)
class TuningBytes:
    """Memory of the learnable parameters of a block: while it is tuned, additionally during an optimizer step of one
    group, and when the codes are computed."""

    held: int
    step: int
    finished: int


def tuning_bytes(inputs: MemoryInputs, chosen: Sequence[LayerPlan]) -> TuningBytes:
    """Memory of tuning these layers of a block."""
    algorithm, compute, model = inputs.settings.algorithm, inputs.compute, inputs.source.dtype
    assert isinstance(algorithm, SignRoundConfig)
    groups: dict[object, list[LayerPlan]] = defaultdict(list)
    for index, plan in enumerate(chosen):
        alone = index if plan.scheme.group_size == 0 else None
        groups[plan.scheme, plan.ggml, plan.in_features, alone].append(plan)
    # Optimizer state per weight, and the temporary gradient and update.
    state, moment = (8, 8) if algorithm.enable_adam else (4, 8) if algorithm.momentum > 0 else (0, 0)
    held = step = finished = 0.0
    for members in groups.values():
        first = members[0]
        count = sum(p.out_features * p.in_features for p in members)
        tuned = first.codec.tuned(first.in_features)
        if tuned is None:
            held, finished = held + _FUNCTION_BYTES * count, finished + _FUNCTION_BYTES * count
            continue
        size = tuned.group
        width = -(-first.in_features // size) * size
        count = count // first.in_features * width
        shared = len(members) == 1 and width == first.in_features and (compute in (torch.float32, model))
        # Stacked weights, in the model's dtype if products are float32.
        stacked = 0 if shared else model.itemsize if compute == torch.float32 else compute.itemsize
        scales = 4 * tuned.numbers / size
        plain = stacked + 2 * compute.itemsize + 4 + scales  # dequantized weights, gradient, rounding deltas
        best = (tuned.snapshot + 8 / size) if keeps_best_copy(algorithm.iters) else 0  # codes, or deltas
        if _pairs(inputs, members):
            plain += 4  # initial rounding deltas from the Hessians
        held += count * (plain + best + state)
        step = max(step, count * (moment + 12 / size))
        finished += count * (plain + state)
    return TuningBytes(int(held), int(step), int(finished))


def _features(inputs: MemoryInputs, plans: Sequence[LayerPlan]) -> tuple[float, float]:
    """(total inputs and outputs of all linear layers that process a token, widest of them)."""
    experts = [m.num_experts for m in inputs.source.model.modules() if isinstance(m, LinearExperts)]
    chosen = _chosen(inputs)
    share = min(1.0, chosen / max(experts)) if experts else 1.0
    total = widest = 0.0
    for plan in plans:
        part = share if ".experts." in plan.name else 1.0
        total += part * (plan.in_features + plan.out_features)
        widest = max(widest, (chosen if part < 1 else 1) * max(plan.in_features, plan.out_features))
    return total, widest


def _chosen(inputs: MemoryInputs) -> int:
    """Experts per token."""
    return largest(inputs.config, *_TOP_K, default=1)


def _attention_bytes(inputs: MemoryInputs) -> int:
    """Attention scores of one sample; fused kernels do not store them."""
    if read_value(inputs.config, "_attn_implementation") != "eager":
        return 0
    heads = largest(inputs.config, "num_attention_heads", default=1)
    return heads * inputs.tokens**2 * inputs.compute.itemsize


def forward_bytes(inputs: MemoryInputs, plans: Sequence[LayerPlan], samples: int) -> int:
    """One pass without gradients: four tensors of the MLP's width and four of the model's."""
    _, widest = _features(inputs, plans)
    values = samples * inputs.tokens * (4 * widest + 4 * inputs.width)
    return int(values * inputs.compute.itemsize) + 3 * samples * _attention_bytes(inputs)


def backward_bytes(inputs: MemoryInputs, plans: Sequence[LayerPlan]) -> int:
    """One pass with gradients: inputs and outputs of the layers, sixteen tensors of norms, residuals, rotations and
    repeated heads, and four gradients in flight of the widest layer."""
    algorithm = inputs.settings.algorithm
    assert isinstance(algorithm, SignRoundConfig)
    layers = len([p for p in plans if p.scheme.quantizes_weights])
    samples = micro_batch_size(algorithm.batch_size, inputs.tokens, layers, inputs.settings.device)
    total, widest = _features(inputs, plans)
    values = samples * inputs.tokens * (total + 16 * inputs.width + 4 * widest)
    return int(values * inputs.compute.itemsize) + 4 * samples * _attention_bytes(inputs)


@dataclass(frozen=True)
class NonBlockBytes:
    """Bytes of the embedding, and peaks of quantizing layers outside the blocks and of saving and verifying."""

    embedding: int
    non_block: int
    saving: int


def non_block_bytes(inputs: MemoryInputs) -> NonBlockBytes:
    """Memory of the tensors outside the blocks."""
    source, settings = inputs.source, inputs.settings
    blocks = tuple(f"{block}." for block in source.blocks)
    tied = source.tied()
    metas = {n: source.tensor_meta(n) for n in source.tensor_names() if not n.startswith(blocks) and n not in tied}
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in metas.items()}
    embedding = max((size for name, size in sizes.items() if "embed" in name or "wte" in name), default=0)
    embedding = embedding or max(sizes.values(), default=0)
    everything = sum(sizes.values())
    vocabulary = largest(inputs.config, "vocab_size")
    logits = _SMOKE_TOKENS * vocabulary * (source.dtype.itemsize + 4) if settings.verify else 0
    non_block = max(sizes.values(), default=0) * 2  # loaded, and in the output dtype
    for plan in quantized(inputs.layers.values()):
        if f"{plan.name}." in blocks or f"{plan.name}.".startswith(blocks):
            continue
        count = plan.out_features * plan.in_features
        # The weight, codes of two candidates, and rounding deltas of one of them.
        work = 8 if settings.tunes else 3 + source.dtype.itemsize
        non_block = max(non_block, count * work + 4 * plan.in_features**2)
        logits += count * 5 if settings.verify else 0  # codes and the dequantized weight
    peak = max(non_block, everything + logits if settings.verify else 0)
    return NonBlockBytes(embedding, peak, peak)
