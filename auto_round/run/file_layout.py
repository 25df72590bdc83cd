"""Map model tensors to the tensors of the output files: names, shapes, stacked experts, reversed conversions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.formats.base import ModelRules, OutputFormat, TensorSpecs
from auto_round.modeling.experts import ExpertPiece, LinearExperts
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.source import ModelSource
from auto_round.modeling.tensor_map import Origin, TensorPlan, conversions_of, run_converter
from auto_round.run.plan import LayerPlan


@dataclass(frozen=True)
class FusedTarget:
    """The stored tensor that a model tensor becomes, or of whose `parts` it is one, at `piece`, if not just renamed."""

    name: str
    shape: tuple[int, ...]
    parts: int
    piece: ExpertPiece | None


@dataclass(frozen=True)
class Reversal:
    """Model tensors (`needed`, experts stacked) that are converted back to checkpoint tensors (`stored`, shape by
    name), by the inverse of the conversion that read them."""

    origin: Origin
    needed: tuple[str, ...]
    stored: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FileLayout:
    """Tensors in the files of one format, without static scales of the cache, and how model tensors map to them.

    Attributes:
        targets: by model name, the stored tensor; a tensor without an entry keeps its name.
        reversals: by name of a model tensor (experts stacked), the reversed conversion that it is part of.
        copies: by model name, the checkpoint tensors that are copied in its place; `spare`: those of no module.
    """

    tensors: TensorSpecs
    targets: Mapping[str, FusedTarget] = field(default_factory=dict)
    reversals: Mapping[str, Reversal] = field(default_factory=dict)
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spare: tuple[str, ...] = ()

    def stored_names(self, tensor: str) -> tuple[str, ...]:
        """Stored names of the tensors that a model tensor becomes, or is a part of."""
        if tensor in self.copies:
            return self.copies[tensor]
        target = self.targets.get(tensor)
        whole = tensor if target is None else target.name
        reversal = self.reversals.get(whole)
        return (whole,) if reversal is None else tuple(reversal.stored)


def separate_tensors(fmt: OutputFormat, layers: Mapping[str, LayerPlan], source: ModelSource) -> TensorSpecs:
    """Model name, shape and dtype of every tensor that is written, before tensors are renamed or stacked."""
    specs: TensorSpecs = {}
    replaced: set[str] = set()
    for name, plan in layers.items():
        if plan.scheme.quantizes_weights:
            specs |= fmt.tensor_specs(
                name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype,
                model_dtype=source.dtype, transposed=plan.transposed,
            )  # fmt: skip
            replaced |= {f"{name}.weight", f"{name}.bias"}
    tied = source.tied()
    for tensor in source.tensor_names():
        # An alias of a quantized tensor is stored too: it holds the original.
        if tensor not in replaced and (tensor not in tied or tied[tensor] in replaced):
            specs[tensor] = source.unquantized_meta(tensor)
    return specs


def plan_files(fmt: OutputFormat, layers: Mapping[str, LayerPlan], source: ModelSource) -> FileLayout:
    """The layout of a format's files. Raises UnsupportedError when tensors that it stacks differ, or when Transformers
    would fuse the tensors of packed experts because of their names."""
    specs = separate_tensors(fmt, layers, source)
    if fmt.checkpoint_names:
        return _Planner(fmt, layers, source, specs).layout()
    rules = fmt.rules(str(getattr(source.config, "model_type", "")))
    targets = stacked_targets(specs, rules) if rules.renames or rules.experts else _fused_targets(source.model, specs)
    tensors: TensorSpecs = {}
    for name, (shape, dtype) in specs.items():
        target = targets.get(name)
        tensors[name if target is None else target.name] = (shape if target is None else target.shape, dtype)
    return FileLayout(tensors, targets)


class _Planner:
    """Lays out the files of a format that uses the checkpoint's names."""

    def __init__(
        self, fmt: OutputFormat, layers: Mapping[str, LayerPlan], source: ModelSource, specs: TensorSpecs
    ) -> None:
        self.fmt, self.source, self.specs = fmt, source, specs
        self.names = source.checkpoint_naming()
        self.quantized = {name for name, plan in layers.items() if plan.scheme.quantizes_weights}
        self.split: set[str] = set()  # modules of experts that are packed
        self.tensors: TensorSpecs = {}
        self.targets: dict[str, FusedTarget] = {}
        self.reversals: dict[str, Reversal] = {}
        self.copies: dict[str, tuple[str, ...]] = {}

    def layout(self) -> FileLayout:
        dense: dict[Origin, dict[str, TensorPlan]] = {}
        packed: dict[str, list[str]] = defaultdict(list)
        for name in self.specs:
            owner, _, leaf = name.rpartition(".")
            plan = self._plan_of(name)
            stored_bias = leaf == "bias" and plan is not None and plan.key is not None
            if owner in self.quantized and not self.fmt.casts_to_model_dtype and not stored_bias:
                packed[owner].append(leaf)
            elif plan is None:  # a buffer that the checkpoint leaves at its initial value
                self._rename(name, f"{self.names.module(owner)}.{leaf}" if owner else leaf)
            else:
                dense.setdefault(plan.origin, {})[name] = plan
        for owner, leaves in packed.items():
            if self.fmt.rejects_fused_layers and self.names.would_be_fused(owner, leaves):
                raise UnsupportedError(
                    f"format {self.fmt.name!r} cannot hold this model in this scheme: Transformers fuses the experts "
                    f"of {self.source.config.model_type} when their tensors are called weight, as those of {owner} "
                    "would be; use format llm_compressor, auto_round:llm_compressor or fake"
                )
            stored = self.names.packed_layer(owner, leaves, loadable_here=self.fmt.loadable_here)
            for leaf in leaves:
                self._rename(f"{owner}.{leaf}", f"{stored}.{leaf}")
        self.split = {found for owner in packed if (found := self.names.experts_of(owner)) is not None}
        members: dict[Origin, set[str]] = defaultdict(set)
        tied = self.source.tied()
        for name in self.source.tensor_names():
            plan = self.source.tensor_plan(name)
            if plan is not None and name not in tied:
                members[plan.origin].add(name)
        for origin, plans in dense.items():
            self._dense(origin, plans, members[origin])
        # Tensors that no module reads, without copies of quantized tied weights.
        own = (self.source.own_plan(f"{layer}.weight") for layer in self.quantized)
        replaced = {key for plan in own if plan is not None for key in plan.origin.stored}
        spare = tuple(key for key in self.source.unused_tensors if key not in replaced and key not in self.tensors)
        self.tensors |= {key: self.source.stored_meta(key) for key in spare}
        return FileLayout(self.tensors, self.targets, self.reversals, self.copies, spare)

    def _plan_of(self, name: str) -> TensorPlan | None:
        """How the checkpoint stores a tensor; None when it does not, or when it is tied to a quantized one."""
        plan, tied = self.source.own_plan(name), self.source.tied()
        if plan is None or plan.origin.name == name or name not in {*tied, *tied.values()}:
            return plan
        owners = {tensor.rpartition(".")[0] for tensor in (name, plan.origin.name)}
        return None if owners & self.quantized else plan

    def _dense(self, origin: Origin, plans: Mapping[str, TensorPlan], members: set[str]) -> None:
        """Lay out the dense tensors of one origin, which has these `members`; some may be dequantized weights."""
        # Transformers would fuse a dense expert's tensor, under the checkpoint's name, with packed experts.
        fused = (
            self.fmt.loadable_here and self.names.experts_of(name) in self.split
            and not self.names.loads(origin.stored[0], name) for name in plans
        )  # fmt: skip
        if any(fused):
            for name in plans:
                self._rename(name, self.names.unfused_name(name))
            return
        made = any(n.endswith(".weight") and n.rpartition(".")[0] in self.quantized for n in plans)
        whole = members <= plans.keys()
        if not made and self.source.lazy and whole:
            self.copies |= dict.fromkeys(plans, origin.stored)
            self.tensors |= {key: self.source.stored_meta(key) for key in origin.stored}
            return
        for name, plan in plans.items():
            if plan.key is not None:
                self._rename(name, plan.key)
            elif not whole:
                self._rename(name, self.names.unfused_name(name))
        if whole and any(plan.key is None for plan in plans.values()):
            self._restack(origin, plans)

    def _restack(self, origin: Origin, plans: Mapping[str, TensorPlan]) -> None:
        """Stack experts as in the checkpoint, and reverse its conversion."""
        shapes: dict[str, tuple[int, ...]] = {}  # of the stacked model tensors
        pieces: dict[str, tuple[str, ExpertPiece]] = {}  # stacked name and position of each expert's tensor
        for name, plan in plans.items():
            if plan.piece is None:
                shapes[name] = self.specs[name][0]
                continue
            experts = self.source.model.get_submodule(plan.name.removesuffix(f".{plan.piece.param}"))
            assert isinstance(experts, LinearExperts)
            shapes[plan.name] = experts.fused_shapes[plan.piece.param]
            pieces[name] = (plan.name, plan.piece)
        parts = Counter(fused for fused, _ in pieces.values())
        for name, (fused, piece) in pieces.items():
            self.targets[name] = FusedTarget(fused, shapes[fused], parts[fused], piece)
        dtype = self.source.dtype
        if origin.converter is None:
            (key,) = origin.stored
            self.targets |= {name: replace(self.targets[name], name=key) for name in pieces}
            self.tensors[key] = (next(iter(shapes.values())), dtype)
            return
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        stored = {}
        with suppress(Exception):  # third-party operations without an inverse, or one that needs data
            made = reverse_conversion(origin, empty, self.source.model)
            stored = {name: tuple(tensor.shape) for name, tensor in made.items()}
        if set(stored) == set(origin.stored):
            self.reversals |= dict.fromkeys(shapes, Reversal(origin, tuple(shapes), stored))
        else:  # no inverse: the model's own names are used, which Transformers reads too
            stored = shapes
        self.tensors |= {name: (shape, dtype) for name, shape in stored.items()}

    def _rename(self, name: str, stored: str) -> None:
        self.tensors[stored] = self.specs[name]
        if stored != name:
            self.targets[name] = FusedTarget(stored, self.specs[name][0], 1, None)


def reverse_conversion(
    origin: Origin, tensors: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """Convert model tensors (experts stacked) back to the checkpoint tensors of an origin: inverse of `read_origin`."""
    inverse = origin.converter.reverse_transform()
    renamed = {name: inverse.rename_source_key(name) for name in tensors}
    first = next(iter(renamed.values()))[0]
    parts = [(name, str(renamed[name][1]), tensor) for name, tensor in tensors.items()]
    made = run_converter(inverse, first, parts, model)
    names = conversions_of(model, legacy=False).inverse()
    return {names.renamed(name): tensor for name, tensor in made.items()}


def _fused_targets(model: nn.Module, specs: TensorSpecs) -> dict[str, FusedTarget]:
    """Targets of experts' tensors, for every experts module of `model` whose tensors are all written dense."""
    found = {name for name, (_, dtype) in specs.items() if dtype.is_floating_point and dtype.itemsize > 1}
    targets: dict[str, FusedTarget] = {}
    for prefix, experts in model.named_modules():
        pieces = experts.pieces() if isinstance(experts, LinearExperts) else {}
        if isinstance(experts, LinearExperts) and all(f"{prefix}.{leaf}" in found for leaf in pieces):
            parts = Counter(piece.param for piece in pieces.values())
            for leaf, piece in pieces.items():
                shape = experts.fused_shapes[piece.param]
                targets[f"{prefix}.{leaf}"] = FusedTarget(f"{prefix}.{piece.param}", shape, parts[piece.param], piece)
    return targets


def stacked_targets(specs: TensorSpecs, rules: ModelRules) -> dict[str, FusedTarget]:
    """Targets by tensor name of the tensors that `rules` stack or rename."""
    moved: dict[str, FusedTarget] = {}
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for tensor, (shape, _) in specs.items():
        name, index = rules.stored_as(tensor)
        if index is not None:
            stacks[name][index] = tensor
            module = name.rpartition(".")[0].rpartition(".")[0]
            sizes[module] = max(sizes[module], index + 1)
        elif name != tensor:
            moved[tensor] = FusedTarget(name, shape, 1, None)
    for name, parts in stacks.items():
        count = sizes[name.rpartition(".")[0].rpartition(".")[0]]
        kinds = {specs[tensor] for tensor in parts.values()}
        if len(parts) != count or len(kinds) != 1:
            raise UnsupportedError(
                f"the format stacks the {count} experts of a block in {name}, but they have different schemes; give "
                "all experts of a block the same bits, group size and symmetry for each projection"
            )
        shape = (count, *next(iter(kinds))[0])
        for index, tensor in parts.items():
            moved[tensor] = FusedTarget(name, shape, count, ExpertPiece(name, index, "all", False, False))
    return moved


def read_model_tensors(files: TensorFiles, names: Collection[str], layout: FileLayout) -> dict[str, torch.Tensor]:
    """Read tensors by model name from files in which some are stacked or renamed."""
    found = {}
    for name in names:
        target = layout.targets.get(name)
        piece = None if target is None else target.piece
        (stored,) = layout.stored_names(name)
        if piece is not None and piece.rows:  # experts concatenated along the rows of a matrix
            found[name] = piece.slot(files.read(stored))
        else:
            found[name] = files.read(stored, None if piece is None else piece.expert)
    return found


class TensorAssembler:
    """Collects model tensors until the stored tensor that they are part of is complete."""

    def __init__(self, layout: FileLayout, model: nn.Module) -> None:
        self.layout, self._model = layout, model
        self._open: dict[str, tuple[torch.Tensor, int]] = {}
        self._whole: dict[str, torch.Tensor] = {}

    def state(self) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """Number of missing parts of every incomplete tensor, and copies of the tensors."""
        missing = {name: parts for name, (_, parts) in self._open.items()} | dict.fromkeys(self._whole, 0)
        tensors = {name: whole for name, (whole, _) in self._open.items()} | self._whole
        return missing, {f"open.{name}": tensor.clone() for name, tensor in tensors.items()}

    def restore(self, missing: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue with a `state`."""
        for name, parts in missing.items():
            if parts:
                self._open[name] = tensors[f"open.{name}"], parts
            else:
                self._whole[name] = tensors[f"open.{name}"]

    def add(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Stored name and data of every tensor that is complete with this one."""
        target = self.layout.targets.get(name)
        if target is not None and target.piece is not None:
            whole, missing = self._open.pop(target.name, (None, target.parts))
            if whole is None:
                spec = self.layout.tensors.get(target.name)
                whole = torch.empty(target.shape, dtype=tensor.dtype if spec is None else spec[1])
            target.piece.paste(target.piece.slot(whole), tensor)
            if missing > 1:
                self._open[target.name] = (whole, missing - 1)
                return
            tensor = whole
        name = name if target is None else target.name
        reversal = self.layout.reversals.get(name)
        if reversal is None:
            yield name, tensor
            return
        self._whole[name] = tensor
        if all(needed in self._whole for needed in reversal.needed):
            parts = {needed: self._whole.pop(needed) for needed in reversal.needed}
            for stored, made in reverse_conversion(reversal.origin, parts, self._model).items():
                yield stored, made.contiguous()
