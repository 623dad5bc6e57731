"""A Hugging Face causal language model, from scratch or pretrained, partitioned while it is built under ZeRO-3."""

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dstrain.arguments import ModelArguments
from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
from dstrain.models.adapters import add_adapters
from dstrain.models.config import CONFIG_ERRORS, check_block_size, check_vocabulary, load_model_config, one_line
from dstrain.models.initial_weights import initialise
from dstrain.models.pretrained import find_checkpoint, load
from dstrain.models.quantized import Quantizer, check_quantizable
from dstrain.models.tiling import tile_mlps
from dstrain.models.units import Unit, parameters_on_meta, return_freed_memory

__all__ = ["build_model", "check_block_size", "check_vocabulary", "load_model_config"]


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that builds a causal LM of this configuration, imported; None for one with code of its own."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def build_skeleton(margs: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its parameters on the meta device and its buffers (rotary tables, masks) real. Raises UserError."""
    options = {"attn_implementation": margs.attn_implementation} if margs.attn_implementation else {}
    try:
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=margs.trust_remote_code, **options
            )
    except CONFIG_ERRORS as error:
        if margs.attn_implementation and ("attn" in str(error) or isinstance(error, ImportError)):
            raise UserError(
                f"--attn_implementation {margs.attn_implementation} cannot be used here ({one_line(error)}): "
                "write sdpa or eager, or leave it out"
            ) from None
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"no {config.model_type} can be built from its configuration ({reason}): mend it") from None


class _Partitioner:
    """Partitions units as `deepspeed.zero.Init` does, with one swapper and one group of hpZ for all of them."""

    def __init__(self, zero3_config: dict[str, Any]):
        self.config, self.swapper, self.near = zero3_config, None, None

    def __call__(self, unit: Unit) -> None:
        import deepspeed

        holder = nn.Module()
        for _, _, parameter in unit.parameters():
            if not hasattr(parameter, "ds_id"):
                holder.register_parameter(f"p{len(holder._parameters)}", parameter)
        if holder._parameters:
            context = deepspeed.zero.Init(
                holder,
                config_dict_or_path=self.config,
                param_swapper=self.swapper,
                zero_param_parallel_group=self.near,
            )
            self.swapper, self.near = context.param_swapper, context.zero_param_process_group
            # Parts take the holes of whole parameters, so that glibc's heap would otherwise grow to nearly the whole
            # model (0.9 of it measured on 2 ranks).
            return_freed_memory()


def build_model(
    margs: ModelArguments,
    config: PreTrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    zero3_config: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Build the model in training mode, with parameters in `dtype` on `device` (default: CPU).

    From scratch, the weights are a function of (seed, parameter name): equal at every stage and world size. Pretrained,
    rank 0 reads each tensor once and sends it, in 4 bits where that is asked for, and adapters come behind.
    zero3_config: the DeepSpeed configuration when its stage is 3; the parameters are then partitioned unit by unit, so
    that no rank ever holds the whole model. A collective where there is a process group. Raises UserError for what the
    user can mend, on every rank.
    """
    partition = _Partitioner(zero3_config) if zero3_config else None
    if margs.model_name_or_path:
        refuse_quantized(margs, config)
        checkpoint = find_checkpoint(margs.model_name_or_path)
        model = build_skeleton(margs, config, dtype)
        quantize = None
        if margs.load_in_4bit:
            check_quantizable(model)
            quantize = Quantizer(model, dtype, device or torch.device("cpu"))
        load(model, checkpoint, dtype, partition, quantize)
        _take_generation_config(model, margs.model_name_or_path)
        if margs.adapter:
            add_adapters(model, margs, seed=seed, dtype=dtype, partition=partition)
    else:
        model = build_skeleton(margs, config, torch.float32)
        initialise(model, seed, dtype, partition)
    model.config.dtype = dtype
    save_activations(model, margs)
    model.train()
    return _to_device(model, device or torch.device("cpu"), partitioned=partition is not None)


def refuse_quantized(margs: ModelArguments, config: PreTrainedConfig) -> None:
    """Raises UserError for a model that is stored in 4 or 8 bits."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{margs.model_name_or_path} holds quantized weights, which cannot be trained here: name the unquantized "
            "model (with --lora_rank 16 --load_in_4bit it is quantized as it is loaded)"
        )


def save_activations(model: PreTrainedModel, margs: ModelArguments) -> None:
    """What `--gradient_checkpointing` and `--tiled_mlp` ask for. Raises UserError for a model that cannot."""
    if margs.tiled_mlp:
        tile_mlps(model)
    if margs.gradient_checkpointing:
        _enable_checkpointing(model)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{model.config.model_type} has no gradient checkpointing: leave --gradient_checkpointing out")
    # Renamed within transformers 5; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _take_generation_config(model: PreTrainedModel, name: str) -> None:
    """How the model's authors sample from it, where they say so: exports keep it."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        return


def _to_device(model: PreTrainedModel, device: torch.device, *, partitioned: bool) -> PreTrainedModel:
    if not partitioned:
        return model.to(device)
    for module in model.modules():  # parameters are where DeepSpeed has put their parts
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def parameter_dtype(resolved: ResolvedConfig) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[resolved.precision]


def compute_dtype(resolved: ResolvedConfig) -> torch.dtype:
    """Of the matrix products."""
    return getattr(torch, resolved.autocast_dtype) if resolved.autocast_dtype else parameter_dtype(resolved)
