"""Pretrained weights into a model, unit by unit: rank 0 reads each tensor once and sends it to the others.

Names and layouts of older checkpoints are translated by transformers' own conversion code (for example Mixtral's
separate experts into one tensor). Whether everything fits is known from the files' headers, on every rank, before the
first weight is read.
"""

import copy
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from dstrain.errors import UserError
from dstrain.models.config import hub_is_reachable, one_line
from dstrain.models.units import Places, Unit, allocate, units

_SHOWN = 8
# Names of types in safetensors' headers.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass
class Checkpoint:
    """The safetensors files of a folder or hub name, each opened once; reads on demand, without mapping into memory."""

    name: str
    files: list[str]
    _slices: dict[str, Any] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def open(self) -> None:
        """Read the headers. Raises UserError for a broken file."""
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt", device="cpu", backend="pread")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} cannot be read ({one_line(error)}): copy or download it again") from None
            self._handles.append(handle)
            self._slices.update({key: handle.get_slice(key) for key in handle.keys()})  # noqa: SIM118

    def close(self) -> None:
        for handle in self._handles:
            handle.__exit__(None, None, None)

    def names(self) -> list[str]:
        return list(self._slices)

    def slices(self, keys: list[str]) -> dict[str, Any]:
        return {key: self._slices[key] for key in keys}

    def shapes(self) -> dict[str, torch.Tensor]:
        """Every tensor without its data."""
        return {
            key: torch.empty(s.get_shape(), dtype=_DTYPES.get(s.get_dtype(), torch.float32), device="meta")
            for key, s in self._slices.items()
        }


def find_checkpoint(name: str) -> Checkpoint:
    """The weight files of a folder or hub name; downloads them where they are missing. Raises UserError."""
    local = Path(name).is_dir() or not hub_is_reachable()
    options = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
        if index is None:
            single = cached_file(name, SAFE_WEIGHTS_NAME, **options)
            if single is not None:
                return Checkpoint(name, [single])
            raise UserError(_no_safetensors(name))
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = {shard: cached_file(name, shard, **options) for shard in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the weights of {name} cannot be found: {one_line(error)}") from None
    missing = [shard for shard, file in files.items() if file is None]
    if missing:
        raise UserError(f"{name} lacks {len(missing)} of {len(shards)} shards of its index: {_shown(missing)}")
    return Checkpoint(name, list(files.values()))


def _no_safetensors(name: str) -> str:
    pickled = Path(name).is_dir() and any(Path(name).glob("*.bin"))
    if pickled:
        return (
            f"{name} has pickled weights (*.bin), which can run code: where you trust it, load it with transformers "
            "and write it again with save_pretrained, as safetensors"
        )
    return f"{name} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: name a folder with weights"


def _shown(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class _Loader:
    """Translates the checkpoint's names into the model's, and loads the part of the checkpoint that a unit needs."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype):
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self.places = Places(model)
        self.mapping = get_model_conversion_mapping(model)
        self.expected = model.state_dict()
        self.keys_of = self._group_keys()
        self.conversions: list[Any] = []

    def _rename(self, key: str) -> str:
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        renamed, _ = rename_source_key(key, renamings, converters, prefix, self.expected)
        if renamed not in self.expected and key in self.expected:
            return key
        return renamed

    def _group_keys(self) -> dict[str, list[str]]:
        """First name of each of the model's tensors -> the checkpoint's keys that it is made from."""
        by_name: dict[str, list[str]] = {}
        for key in self.checkpoint.names():
            by_name.setdefault(self._rename(key), []).append(key)
        groups: dict[str, list[str]] = {}
        for name, keys in by_name.items():
            first = self.places.first_name.get(name, name)
            # Of a tied parameter that is stored under both names one copy is read: `check` has compared them.
            if name == first or first not in by_name:
                groups.setdefault(first, keys)
        return groups

    def convert(self, model: PreTrainedModel, tensors: dict[str, Any], device: str) -> Any:
        """transformers' conversion of some of the checkpoint's tensors into parameters of `model`."""
        config = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self.mapping, device_map={"": device})
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        return info

    def check(self) -> None:
        """Compare names and shapes, without reading weights. Raises UserError that names what does not fit."""
        skeleton = copy.deepcopy(self.model)
        info = self.convert(skeleton, self.checkpoint.shapes(), "meta")
        self.conversions = skeleton._weight_conversions
        self.model._adjust_missing_and_unexpected_keys(info)
        present = {self.places.first_name.get(key, key) for key in self.expected.keys() - info.missing_keys}
        missing = {key for key in info.missing_keys if self.places.first_name.get(key, key) not in present}
        name, problems = self.checkpoint.name, []
        if missing:
            problems.append(f"{name} lacks weights of the model: {_shown(missing)}")
        if info.unexpected_keys:
            problems.append(f"{name} has weights that the model does not: {_shown(info.unexpected_keys)}")
        for key, stored, wanted in sorted(info.mismatched_keys):
            problems.append(f"{name}: {key} has shape {list(stored)}, the model wants {list(wanted)}")
        for key, text in info.conversion_errors.items():
            problems.append(f"{name}: {key} cannot be converted: {one_line(ValueError(str(text).splitlines()[-1]))}")
        if problems:
            hint = ": name the folder whose config.json and weights belong together"
            raise UserError([problem + hint for problem in problems])

    def check_ties(self) -> None:
        """Refuse a parameter that is tied by the configuration and stored twice with different values."""
        by_first: dict[str, list[str]] = {}
        for key in self.checkpoint.names():
            by_first.setdefault(self.places.first_name.get(self._rename(key), ""), []).append(key)
        for name in {first for full, first in self.places.first_name.items() if full != first}:
            keys = by_first.get(name, [])
            tensors = [self.checkpoint.slices([key])[key][...] for key in keys] if len(keys) == 2 else []
            if tensors and not torch.equal(*tensors):
                raise UserError(
                    f"{self.checkpoint.name}: {' and '.join(keys)} differ, but its config.json ties them: "
                    "set tie_word_embeddings to false there"
                )

    def read(self, unit: Unit) -> None:
        """Read a unit's weights in place."""
        first_names = {self.places.first_name.get(name, name) for name in unit.tensor_names()}
        keys = [key for name in first_names for key in self.keys_of.pop(name, [])]
        wanted = [(name, first) for name, first in self.places.first_name.items() if first in first_names]
        olds = {first: p for _, first in wanted if (p := self.model.get_parameter(first)).is_meta}
        self.convert(self.model, self.checkpoint.slices(keys), "cpu")
        for name, first in wanted:
            parameter = self.model.get_parameter(name)
            if first in olds and not parameter.is_meta:
                self.places.replace(olds.pop(first), parameter)


def load(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    partition: Callable[[Unit], None] | None,
    quantize: Callable[[Unit], Unit] | None = None,
) -> None:
    """Fill a model whose parameters are on the meta device, in `dtype`; a collective where there is a process group.

    partition: under ZeRO-3, partitions a unit whose whole weights are right on rank 0, before the next is read. Raises
    UserError, on every rank.
    """
    checkpoint.open()
    try:
        loader = _Loader(model, checkpoint, dtype)
        loader.check()
        reads = not dist.is_initialized() or dist.get_rank() == 0
        _on_rank_0(loader.check_ties if reads else None, checkpoint.name)
        sent: dict[int, weakref.ref] = {}
        for unit in units(model):
            _on_rank_0(partial(loader.read, unit) if reads else None, checkpoint.name)
            for new in allocate(unit):
                loader.places.replace(new.old, new.parameter)
            _send_buffers(unit)
            if partition is None or quantize is not None:
                _send_parameters(unit, sent)
            if quantize is not None:
                unit = quantize(unit)
            if partition is not None:
                partition(unit)
    finally:
        checkpoint.close()
    # For save_pretrained, which writes the layout that was read.
    model._weight_conversions = loader.conversions
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.__dict__.pop("_is_hf_initialized", None)


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _on_rank_0(work: Callable[[], None] | None, name: str) -> None:
    """Do `work` on the rank that has it; a mistake of the user's that it finds is raised on every rank."""
    problem: list[Any] = [None]
    if work is not None:
        try:
            work()
        except UserError as error:
            problem = [error.problems]
        except (OSError, SafetensorError) as error:
            problem = [[f"the weights of {name} cannot be read ({one_line(error)}): copy or download them again"]]
    if _is_distributed():
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def _send_buffers(unit: Unit) -> None:
    """Only rank 0 has read the buffers that are stored with the weights."""
    if _is_distributed():
        for _, module in unit.modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    dist.broadcast(buffer, src=0)


def _send_parameters(unit: Unit, sent: dict[int, weakref.ref]) -> None:
    """sent: by id, those of the units before; quantizing ends many, whose ids go to others."""
    if _is_distributed():
        for _, _, parameter in unit.parameters():
            known = sent.get(id(parameter))
            if known is None or known() is not parameter:
                sent[id(parameter)] = weakref.ref(parameter)
                dist.broadcast(parameter.data, src=0)
