"""LoRA adapters (https://arxiv.org/abs/2106.09685) by peft, put into a finished model from outside.

The base is built, loaded and partitioned as ever; then peft replaces linear layers by ones that hold the old layer and
two small matrices, and only these are trained. Their initial weights are a function of (seed, layer name), so that
every ZeRO stage, pipeline and number of ranks starts from the same.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstrain.adapter import NAME
from dstrain.arguments import ModelArguments
from dstrain.errors import UserError
from dstrain.models.config import one_line
from dstrain.models.initial_weights import unit_seed
from dstrain.models.pretrained import find_checkpoint
from dstrain.models.units import Unit, units

_SAMPLES, _SAMPLE_BYTES = 16, 4096


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer with an adapter; its two matrices are `lora_A[NAME]` and `lora_B[NAME]`."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            yield name, module


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def inject(model: PreTrainedModel, settings: dict[str, Any], base: str | None = None) -> None:
    """Put adapters into `model`, on the meta device, and freeze everything else.

    settings: of `ModelArguments.adapter`. base: name of the model, for those who read the adapters. Raises UserError
    for names that fit no linear layer, and for layers whose adapter would not be trained as it should.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=base, **settings)
    where = "--lora_target_modules or --peft_config"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few or unusual layers: the user named them
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}: name linear layers of {type(model).__name__}") from None
    layers = dict(lora_layers(model))
    if model.get_output_embeddings() in layers.values():
        raise UserError(f"{where} names the output embedding, whose loss is computed without its logits: leave it out")
    for name, layer in layers.items():
        kind = type(layer.get_base_layer())
        if not issubclass(kind, nn.Linear | Conv1D):
            raise UserError(
                f"{where}: {name} is a {kind.__name__}, and adapters are for linear layers: write names of "
                "these, such as --lora_target_modules q_proj"
            )


def _asked(margs: ModelArguments) -> tuple[dict[str, Any], str]:
    """Settings and base; a folder by its whole path, so that it is found from anywhere."""
    base = str(margs.model_name_or_path)
    assert margs.adapter is not None
    return margs.adapter, str(Path(base).resolve()) if Path(base).is_dir() else base


def add_adapters(
    model: PreTrainedModel,
    margs: ModelArguments,
    *,
    seed: int,
    dtype: torch.dtype,
    partition: Callable[[Unit], None] | None = None,
) -> None:
    """Inject the adapters into a model that has its weights, and give them theirs, in `dtype` on the CPU.

    partition: under ZeRO-3, partitions what of a unit is not yet. torch's generator is left as it was.
    """
    inject(model, *_asked(margs))
    initialise(model, seed, dtype)
    if partition is not None:
        for unit in units(model):
            partition(unit)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int, dtype: torch.dtype) -> None:
    """Initial weights as peft makes them (B is zero), in fp32 and then cast, from a generator for each layer."""
    how = model.peft_config[NAME].init_lora_weights
    with torch.random.fork_rng(devices=[]):
        for name, layer in lora_layers(model):
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.to_empty(device="cpu")
            torch.default_generator.manual_seed(unit_seed(seed, name))
            layer.reset_lora_parameters(NAME, how)
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.to(dtype)


def add_stage_adapters(stage: Any, margs: ModelArguments, *, seed: int, dtype: torch.dtype) -> None:
    """The same for a pipeline stage (`PipeStage`), whose model lacks the weights of other stages, and for its `whole`.

    Raises UserError where the stage would have nothing to train, or hands on what an adapter changes.
    """
    model, graph = stage.model, stage.plan.graph
    inject(stage.whole, *_asked(margs))
    inject(model, *_asked(margs))
    for name, layer in lora_layers(model):
        if not isinstance(layer.get_base_layer().weight, nn.Parameter):  # of another stage
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    own = {name for name, _ in lora_layers(model)}
    if not own:
        raise UserError("a pipeline stage has no layer with an adapter: name layers all over the model, or use ZeRO")
    # Hooks that record what travels along were registered on the layers as they were.
    echoes = {module for layer in graph.echoes for echo in layer for module, *_ in echo.places}
    if changed := sorted(own & echoes):
        raise UserError(
            f"pipeline.stages hands on the output of {changed[0]}: leave it out of the layers with adapters"
        )
    initialise(model, seed, dtype)


def adapter_identity(margs: ModelArguments) -> dict[str, Any]:
    """What makes a run with adapters this run: their settings, and the base that they were trained on."""
    adapter = margs.adapter
    if adapter is None:
        return {"adapter": None, "base": None}
    in_4bit = {"load_in_4bit": True} if margs.load_in_4bit else {}
    return {"adapter": {**adapter, **in_4bit}, "base": weights_sha256(str(margs.model_name_or_path))}


def weights_sha256(name: str) -> str:
    """A fingerprint of a model's weight files: size and head of each, and 16 samples of its data.

    Wherever the files lie, and fast however large they are. Raises UserError where there are none.
    """
    digest = hashlib.sha256()
    for file in map(Path, find_checkpoint(name).files):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(file, "rb", buffering=0) as stream:
            head = 8 + int.from_bytes(stream.read(8), "little")  # safetensors: the length of a JSON header
            stream.seek(0)
            digest.update(stream.read(head))
            for i in range(_SAMPLES):
                stream.seek(head + (size - head) * i // _SAMPLES, os.SEEK_SET)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
