"""Open a checkpoint folder as a model source: the model is on the meta device, tensors are read on demand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling import build
from auto_round.modeling.config import QUANTIZATION_KEYS, text_config
from auto_round.modeling.experts import unfuse_experts
from auto_round.modeling.files.dequantized import check_readable, dense_view, quantization_of
from auto_round.modeling.files.safetensors import PickleFiles, TensorFiles, only_pickles
from auto_round.modeling.partial_loading import expert_of
from auto_round.modeling.source import Device, Meta, ModelSource, check_finite, resolve_dtype, state_names
from auto_round.modeling.tensor_map import Origin, plan_tensors, read_origin

# Buffers in old files that modules compute: rotary frequencies, causal masks [1, 1, n, n] and their fill value.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.masked_bias$")
_MASK = re.compile(r"\.(attn|attention|crossattention)\.bias$")


class _Tensor(NamedTuple):
    """Shape and dtype of a model tensor once loaded; `lazy` if it is on meta until then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    lazy: bool


class CheckpointSource(ModelSource):
    """A folder with config.json and weights; only what was loaded and not released is in memory.

    Args:
        dtype, trust_remote_code, allow_pickle: as in `open_source`.
        prepare: called with the meta model after its experts were converted, to insert quantized modules. Then any
            quantized checkpoint is accepted, and persistent buffers on meta (qweight, qzeros, scales, ...) are read in
            their stored dtype. Without it, FP8 and MXFP4 checkpoints are dequantized tensor by tensor.
        files: the opened weights, if they are stored elsewhere.
        kind: the model's class; default: the causal language model of the configuration. Its task is not checked.

    Raises as `open_source`.
    """

    lazy = True
    default_device = torch.device("cpu")
    folder: Path
    files: TensorFiles

    def __init__(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False, prepare: Callable[[nn.Module], object] | None = None,
        name_or_path: str | None = None, allow_pickle: bool = False, files: TensorFiles | None = None,
        kind: type[Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.kind, self._trusted = Path(folder), kind, trust_remote_code
        self.name_or_path = name_or_path or str(folder)
        asked = self._asked = resolve_dtype(dtype)
        self.config = self._read_config()
        declared = quantization_of(self.config)
        if prepare is None:
            check_readable(declared, self.name_or_path)
        self._pickles = allow_pickle and only_pickles(self.folder)
        if files is None:
            files = PickleFiles.open_pickles(self.folder) if self._pickles else TensorFiles.open(self.folder)
        build.check_sizes(self.folder / "config.json", self.config, len(files.tensors))
        if prepare is None:
            dense = dense_view(files, declared, asked or build.config_dtype(self.config))
            for part, key in product((self.config, text_config(self.config)), QUANTIZATION_KEYS):
                if hasattr(part, key):  # the model that is built from it is dense
                    delattr(part, key)
            if dense is not None:
                files, self.stored_as = dense, dense.description
        self.files = files
        self.dtype = asked or build.config_dtype(self.config) or build.dominant_dtype(files)
        self.model = self._build()
        fused_names = dict(self.model.state_dict())
        unfuse_experts(self.model)
        if prepare is not None:
            prepare(self.model)
        self.blocks = self._find_blocks()
        self._names = state_names(self.model)
        self._plans = plan_tensors(files.tensors, self.model, self._names, fused_names)
        self._tied = self._find_tied()
        self._tensors = self._check_tensors()
        for name, info in self._tensors.items():
            if not info.lazy and name in self._plans:  # a persistent buffer with a value: a small table
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = self._fetch(name, {}, check=True)
        used, aliases = set[str](), set[str]()
        for name, plan in self._plans.items():
            (aliases if name in self._tied else used).update(plan.origin.stored)
        self.unused_tensors = tuple(
            key
            for key, stored in files.tensors.items()
            if key not in used and not _COMPUTED.search(key) and not (len(stored.shape) == 4 and _MASK.search(key))
        )
        # Tensors of multi-token prediction or of another version of the model, or damage.
        unread = [key for key in self.unused_tensors if key not in aliases]
        note = (
            f"{self.folder} holds {len(unread)} tensors that {type(self.model).__name__} does not have: "
            f"{', '.join(unread[:3])}; they are copied unquantized into formats that keep the checkpoint's names"
        )
        self.notes = (*files.notes, note) if unread else files.notes

    def _read_config(self) -> Any:
        return build.load_config(self.folder, trust_remote_code=self._trusted, causal=self.kind is None)

    def _build(self) -> nn.Module:
        auto_map = getattr(self.config, "auto_map", None)
        remote_class = self._trusted and isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
        if self.kind is None and not remote_class:
            build.check_towers(self.config, self.files.tensors, self.name_or_path)
        return build.build_on_meta(self.config, self.dtype, self._trusted, self.kind)

    def streams_experts_of(self, layers: Iterable[str]) -> bool:
        return any(map(expert_of, layers))

    def reopen(self) -> CheckpointSource:
        source = CheckpointSource(
            self.folder, dtype=self._asked, trust_remote_code=self._trusted, name_or_path=self.name_or_path,
            allow_pickle=self._pickles, kind=self.kind,
        )  # fmt: skip
        source.checks_finite, source.bounded = self.checks_finite, self.bounded
        source._edits = self._edits
        return source

    def assemble(self, install: Callable[[nn.Module, str], None]) -> nn.Module:
        source = self.reopen()
        for name in [*source.blocks, *source.non_block_module_names()]:
            source.load(name)
            install(source.model, name)
        return source.model.eval()

    def load(self, name: str, device: Device | None = None) -> nn.Module:
        where = torch.device(device or "cpu")
        shared: dict[Origin, dict[str, torch.Tensor]] = {}
        for full, module, leaf, tensor in self._tensors_under(name):
            if tensor.is_meta:
                canonical = self._tied.get(full, full)
                same = (canonical, *(alias for alias, target in self._tied.items() if target == canonical))
                loaded = (self._tensor(other) for other in same if other != full)
                found = next((other for other in loaded if other.device == where), None)
                tensor = self._fetch(full, shared, check=True) if found is None else found
            if tensor.device != where or module._parameters.get(leaf, module._buffers.get(leaf)) is not tensor:
                _set_tensor(module, leaf, tensor.to(where))
        return self._module(name)

    def release(self, name: str) -> None:
        for full, module, leaf, tensor in self._tensors_under(name):
            if leaf in module._parameters or full in self._tensors and self._tensors[full].lazy:
                _set_tensor(module, leaf, torch.empty_like(tensor, device="meta"))
            elif tensor.device.type != "cpu" and not tensor.is_meta:
                _set_tensor(module, leaf, tensor.cpu())

    def release_restores(self, module: nn.Module) -> bool:
        return not module._parameters

    def read(self, tensor_name: str) -> torch.Tensor:
        self.tensor_meta(tensor_name)
        canonical = self._tied.get(tensor_name, tensor_name)
        if canonical not in self._plans:  # a persistent buffer without a checkpoint tensor
            return self.model.get_buffer(canonical).detach().cpu()
        return self._fetch(canonical, {}, check=False)

    def _edited(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for edit in self._edits.get(name, ()):
            tensor = edit.apply(tensor)
        return tensor

    def tensor_meta(self, name: str) -> Meta:
        info = self._tensors.get(self._tied.get(name, name))
        if info is None:
            raise ModelError(f"{self.name_or_path} has no tensor {name!r}")
        return info.shape, info.dtype

    def _check_editable(self, name: str) -> None:
        super()._check_editable(name)
        plan = self.tensor_plan(name)
        if plan is not None and plan.origin.converter is not None:
            raise UnsupportedError(
                f"{name!r} is stored together with other tensors ({', '.join(plan.origin.stored[:2])}), so no "
                "transform may edit it"
            )

    def inputs(self, tensor_name: str) -> tuple[str, ...]:
        """Names in the files of everything that is read for a model tensor, scales included."""
        return tuple(found for key in self.checkpoint_names(tensor_name) for found in self.files.inputs(key))

    def unquantized_meta(self, tensor_name: str) -> Meta:
        plan = self.tensor_plan(tensor_name)
        return self.tensor_meta(tensor_name) if plan is None or plan.key is None else self.stored_meta(plan.key)

    def read_unquantized(self, tensor_name: str) -> torch.Tensor:
        plan = self.tensor_plan(tensor_name)
        return self.read(tensor_name) if plan is None or plan.key is None else self.read_stored(plan.key)

    def stored_meta(self, key: str) -> Meta:
        stored = self.files.tensors[key]
        if self._asked is None or not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
            return stored.shape, stored.dtype
        kept = key in self._float32_keys and key not in self.unused_tensors
        return stored.shape, torch.float32 if kept else self._asked

    @cached_property
    def _float32_keys(self) -> set[str]:
        """Stored tensors that the model holds in float32 regardless of its dtype."""
        names = [name for name, info in self._tensors.items() if info.dtype == torch.float32 and name in self._plans]
        return {key for name in names for key in self._plans[name].origin.stored if self.dtype != torch.float32}

    def read_stored(self, key: str) -> torch.Tensor:
        tensor = self.files.read(key).to(self.stored_meta(key)[1])
        for name in self._edits:
            plan = self._plans[name]
            if key in plan.origin.stored and plan.piece is None:
                tensor = self._edited(name, tensor)
            elif key in plan.origin.stored and plan.piece is not None:
                one = plan.piece.slot(tensor)
                plan.piece.paste(one, self._edited(name, plan.piece.cut(one)))
        return tensor

    def _fetch(self, name: str, shared: dict[Origin, dict[str, torch.Tensor]], *, check: bool) -> torch.Tensor:
        """Read the tensor `name` to the CPU for loading. `shared` caches what several tensors are cut from."""
        canonical = self._tied.get(name, name)
        plan, info = self._plans.get(canonical), self._tensors.get(canonical)
        if plan is None or info is None:
            raise ModelError(f"{self.name_or_path} has no tensor {name!r}")
        origin, piece = plan.origin, plan.piece
        if plan.key is not None:
            tensor = self.files.read(plan.key).to(info.dtype)
        elif origin.converter is None and piece is not None and not piece.rows:
            # Read one expert of a stacked tensor; gate and up may be halves of it.
            row = str(piece.expert)
            if row not in shared.get(origin, {}):
                shared[origin] = {row: self.files.read(origin.keys[0][0], row=piece.expert)}
            tensor = piece.cut(shared[origin][row]).to(info.dtype)
        else:
            if origin not in shared:
                made = read_origin(origin, self.files, self.model)
                shared[origin] = {key: value.to(info.dtype) for key, value in made.items()}
            whole = shared[origin].get(plan.name)
            if whole is None:
                raise ModelError(f"the conversion of {origin.keys[0][0]!r} does not give {plan.name!r}")
            tensor = whole if piece is None else piece.cut(piece.slot(whole))
        if tuple(tensor.shape) != info.shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(tensor.shape)} in {self.folder}; the model needs {list(info.shape)}"
            )
        if check and self.checks_finite:
            check_finite(name, tensor)
        return self._edited(canonical, tensor)

    def _find_tied(self) -> dict[str, str]:
        """Ties that the model declares and the checkpoint agrees with: as in Transformers, it has not different values.

        A checkpoint with the alias only gives its tensor to both.
        """
        declared: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        names, tied = set(self._names), dict[str, str]()
        for alias, canonical in declared.items():
            one, two = self._plans.get(alias), self._plans.get(canonical)
            different = one and two and not self.files.equal(one.origin.keys[0][0], two.origin.keys[0][0])
            if different or not {alias, canonical} <= names:
                continue
            tied[alias] = canonical
            if one and not two:
                self._plans[canonical] = one
        return tied

    def _check_tensors(self) -> dict[str, _Tensor]:
        """Shapes and dtypes of all tensors except aliases. Raises ModelError for a missing one or a wrong shape."""
        full_precision = build.float32_filter(self.model, self.dtype)
        found: dict[str, _Tensor] = {}
        for name in self._names:
            if name in self._tied:
                continue
            tensor, plan = self._tensor(name), self._plans.get(name)
            if plan is None and tensor.is_meta:
                raise ModelError(
                    f"tensor {name!r} of {type(self.model).__name__} is missing from the files in {self.folder}"
                )
            dtype = tensor.dtype
            if plan is not None and plan.key is not None:
                stored = self.files.tensors[plan.key]
                if stored.shape != tuple(tensor.shape):
                    raise ModelError(
                        f"{stored.file}: tensor {plan.key!r} has shape {list(stored.shape)}; "
                        f"the model needs {list(tensor.shape)} (does config.json belong to these weights?)"
                    )
                if tensor.is_meta and not (isinstance(tensor, nn.Parameter) and stored.dtype.is_floating_point):
                    dtype = stored.dtype
            if dtype.is_floating_point and full_precision(name):
                dtype = torch.float32
            found[name] = _Tensor(tuple(tensor.shape), dtype, tensor.is_meta)
        return found


def load_dequantized(
    folder: str | os.PathLike[str], dtype: torch.dtype, device: Device, *, trust_remote_code: bool = False
) -> nn.Module:
    """Load a whole checkpoint to a device, with dense weights cast to `dtype`. Raises as `CheckpointSource`."""
    source = CheckpointSource(folder, trust_remote_code=trust_remote_code)
    for name in [*source.blocks, *source.non_block_module_names()]:
        source.load(name, device)
    for parameter in source.model.parameters():
        if parameter.dtype == source.dtype:
            parameter.data = parameter.data.to(dtype)
    source.model.config.dtype = dtype
    return source.model.to(device).eval()


def _set_tensor(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer of a module."""
    if leaf not in module._parameters:
        module._buffers[leaf] = tensor
    else:
        own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = own
