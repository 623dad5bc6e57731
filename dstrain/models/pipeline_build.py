"""Build the stages of one rank: planned on meta, then only its own weights made or read."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dstrain.arguments import ModelArguments
from dstrain.errors import UserError
from dstrain.models.adapters import add_stage_adapters
from dstrain.models.build import build_skeleton, refuse_quantized, save_activations
from dstrain.models.initial_weights import initialise
from dstrain.models.pipeline import PipelinePlan, plan_pipeline
from dstrain.models.pipeline_module import PipeStage, PipeStages
from dstrain.models.quantized import check_quantizable, quantize_whole
from dstrain.models.stage import prune
from dstrain.parallel import PipePlacement


def build_stages(
    margs: ModelArguments, config: PreTrainedConfig, placement: PipePlacement, pp_rank: int, **how: Any
) -> PipeStages:
    """The stages of one pipeline rank; see `build_stage`."""
    how["num_stages"] = placement.num_stages
    return PipeStages([build_stage(margs, config, index=k, **how) for k in placement.stages(pp_rank)], placement)


def build_stage(
    margs: ModelArguments,
    config: PreTrainedConfig,
    *,
    index: int,
    num_stages: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> PipeStage:
    """Stage `index` of the model in training mode, with parameters in `dtype` on `device` (default: CPU).

    The weights are those that `build_model` gives, from scratch by (seed, name) or pretrained; nothing else is
    allocated or read. Raises UserError, before anything is built, for a model that is no chain of layers.
    """
    model = build_skeleton(margs, config, torch.float32)
    plan = plan_pipeline(model, num_stages)
    if margs.model_name_or_path:
        refuse_quantized(margs, config)
        if margs.load_in_4bit:
            check_quantizable(model)
        model = _load_own(type(model), margs, plan, index, dtype)
        if margs.load_in_4bit:
            quantize_whole(model, dtype, device or torch.device("cpu"))
    stage = PipeStage(model, plan, index, whole=build_skeleton(margs, config, dtype))
    if not margs.model_name_or_path:
        initialise(model, seed, dtype, None)
    if margs.adapter:
        add_stage_adapters(stage, margs, seed=seed, dtype=dtype)
    model.config.dtype = dtype
    save_activations(model, margs)
    stage.train()
    return stage.to(device or torch.device("cpu"))


def _load_own(
    model_class: type[PreTrainedModel], margs: ModelArguments, plan: PipelinePlan, index: int, dtype: torch.dtype
) -> PreTrainedModel:
    """`from_pretrained` of a class whose models lack the foreign parameters, so that it reads only the others."""

    class Pruned(model_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            this: Any = self
            needs = plan.needs[index]
            # Not tied yet: the plan knows a tied parameter by one of its names.
            tied = {name for pair in this.all_tied_weights_keys.items() for name in pair if needs & set(pair)}
            prune(self, needs | tied)
            own = {name for name, _ in self.named_parameters(remove_duplicate=False)}
            this.all_tied_weights_keys = {a: b for a, b in this.all_tied_weights_keys.items() if {a, b} <= own}

    options = {"attn_implementation": margs.attn_implementation} if margs.attn_implementation else {}
    name = margs.model_name_or_path
    model, info = Pruned.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(set(info["missing_keys"]) & plan.needs[index]):
        raise UserError(f"{name} lacks weights of the model: {', '.join(missing[:8])}: name a folder that has them all")
    model.__class__ = model_class
    return model
