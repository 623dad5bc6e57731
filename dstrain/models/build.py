"""A Hugging Face causal language model, from scratch or pretrained, partitioned while it is built under ZeRO-3."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dstrain.arguments import ModelArguments
from dstrain.errors import UserError
from dstrain.models.initial_weights import Unit, initialise


def load_model_config(margs: ModelArguments) -> PreTrainedConfig:
    """The configuration that `--model_name_or_path`, or `--config_name` with `--config_overrides`, names.

    A name is a hub name, a folder with config.json, or (from scratch) a JSON file with `model_type`. Raises UserError.
    """
    name = margs.model_name_or_path or margs.config_name
    if name is None:
        raise UserError(
            "no model is named: give --config_name to train from scratch or --model_name_or_path to continue"
        )
    if name.endswith(".json"):
        values = json.loads(Path(name).read_text())
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=margs.trust_remote_code)
    if margs.config_overrides:
        config.update_from_string(margs.config_overrides)
    return config


def _build_on_meta(margs: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers (rotary tables, masks) real."""
    from accelerate import init_empty_weights

    options = {"attn_implementation": margs.attn_implementation} if margs.attn_implementation else {}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=margs.trust_remote_code, **options
        )
    model.tie_weights()  # init_empty_weights makes a new parameter at each assignment, also where one is tied
    return model


class _Partitioner:
    """Partitions units as `deepspeed.zero.Init` does, with one swapper for all of them."""

    def __init__(self, zero3_config: dict[str, Any]):
        self.config, self.swapper = zero3_config, None

    def __call__(self, unit: Unit) -> None:
        import deepspeed

        holder = torch.nn.Module()
        for _, _, parameter in unit.parameters():
            if not hasattr(parameter, "ds_id"):
                holder.register_parameter(f"p{len(holder._parameters)}", parameter)
        if holder._parameters:
            context = deepspeed.zero.Init(holder, config_dict_or_path=self.config, param_swapper=self.swapper)
            self.swapper = context.param_swapper


def build_model(
    margs: ModelArguments,
    config: PreTrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    zero3_config: dict[str, Any] | None = None,
    device: torch.device = torch.device("cpu"),
) -> PreTrainedModel:
    """Build the model in training mode, with parameters in `dtype` on `device`.

    zero3_config: the DeepSpeed configuration when its stage is 3; the parameters are then partitioned unit by unit.
    Raises UserError for what the user can mend.
    """
    if margs.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(margs.model_name_or_path, dtype=dtype)
    else:
        model = _build_on_meta(margs, config)
        initialise(model, seed, dtype, _Partitioner(zero3_config) if zero3_config else lambda unit: None)
    model.config.dtype = dtype
    if margs.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model if zero3_config else model.to(device)
