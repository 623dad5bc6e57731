"""The run that the gate compares (`dstrain/verify.py`): the user's own, on a shallower model and a smaller batch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dstrain.arguments import Arguments, ModelArguments
from dstrain.config import ResolvedConfig, RunFacts, apply_overrides, load_config, resolve_config
from dstrain.errors import UserError

# The first two steps of a warm-up change nothing (docs/deepspeed-facts.md): four do, two of them after the resume.
STEPS, RESUME_AT = 6, 4
MAX_LAYERS, MAX_MICRO_BATCH, MAX_ACCUMULATION = 4, 2, 2


def shrink(args: Arguments, world_size: int, scratch: Path) -> tuple[Arguments, ResolvedConfig]:
    """The same run with at most `MAX_LAYERS` layers (or one a stage), dropout off, a smaller batch and a schedule whose
    warm-up is over after two steps. A pretrained model is taken from scratch."""
    _check_named(args)
    raw = apply_overrides(load_config(args.run.deepspeed_config), args.run.set)
    facts = RunFacts(
        source=str(args.run.deepspeed_config),
        gradient_checkpointing=args.model.gradient_checkpointing,
        compile=args.model.compile is not None,
        adapters=args.model.adapter is not None,
        load_in_4bit=args.model.load_in_4bit,
        total_steps=STEPS,
    )
    asked = resolve_config(raw, world_size=world_size, facts=facts)
    raw.pop("train_batch_size", None)
    raw["train_micro_batch_size_per_gpu"] = min(asked.micro_batch, MAX_MICRO_BATCH)
    raw["gradient_accumulation_steps"] = min(
        asked.gradient_accumulation_steps, max(MAX_ACCUMULATION, 2 * asked.parallel.pp_size)
    )
    _shorten_schedule(raw)
    (scratch / "ds.json").write_text(json.dumps(raw))
    model = _shallow(args.model, asked.placement.num_stages, scratch / "model")
    if args.model.adapter:
        model = _with_adapters(model, args.model, args.run.seed, scratch)
    run = dataclasses.replace(
        args.run,
        deepspeed_config=str(scratch / "ds.json"),
        set=[],
        logging_steps=1,
        eval_steps=None,
        max_eval_batches=1,
        max_steps=STEPS,
        save_steps=RESUME_AT,
        save_total_limit=None,
        export=None,
        eval_strategy="steps",
        early_stopping_patience=None,
        early_stopping_threshold=0.0,
        load_best_model_at_end=False,
        sample_steps=None,
        max_time=None,
        profile=False,
        verify=False,
        co2_country=None,
        report_to=["none"],
        resume_from_checkpoint="none",
        overwrite_output_dir=False,
        local_rank=-1,
    )
    return Arguments(model, args.data, run), resolve_config(raw, world_size=world_size, facts=facts)


def _shallow(margs: ModelArguments, num_stages: int, folder: Path) -> ModelArguments:
    """From scratch, without adapters."""
    from dstrain.models.config import load_model_config, make_shallow

    config = load_model_config(margs)
    make_shallow(config, max(MAX_LAYERS, num_stages))
    config.save_pretrained(folder)
    source = margs.model_name_or_path or margs.config_name or ""
    return dataclasses.replace(
        margs,
        model_name_or_path=None,
        config_name=str(folder),
        config_overrides=None,
        tokenizer_name=margs.tokenizer_name or ("bytes" if source.endswith(".json") else source),
        lora_rank=None,
        lora_alpha=None,
        lora_dropout=0.0,
        lora_target_modules=[],
        load_in_4bit=False,
        peft_config=None,
    )


def _with_adapters(margs: ModelArguments, asked: ModelArguments, seed: int, scratch: Path) -> ModelArguments:
    """Those that are asked for, beside weights from scratch, which are stored for it; on every layer that is left, and
    without dropout."""
    import torch
    from transformers.utils import logging

    from dstrain.models.build import build_model
    from dstrain.models.config import load_model_config

    plain = dataclasses.replace(margs, gradient_checkpointing=False, tiled_mlp=False)
    base = build_model(plain, load_model_config(plain), seed=seed, dtype=torch.float32)
    logging.disable_progress_bar()
    base.save_pretrained(str(margs.config_name))
    file = scratch / "adapter_config.json"
    kept = {
        name: value
        for name, value in (asked.adapter or {}).items()
        if name not in ("layers_to_transform", "layers_pattern")
    }
    file.write_text(json.dumps({**kept, "peft_type": "LORA", "lora_dropout": 0.0}))
    return dataclasses.replace(
        margs,
        model_name_or_path=margs.config_name,
        config_name=None,
        peft_config=str(file),
        load_in_4bit=asked.load_in_4bit,
    )


def _check_named(args: Arguments) -> None:
    problems = []
    if not args.run.deepspeed_config:
        problems.append("--deepspeed_config is missing: name a DeepSpeed JSON, for example ds_configs/zero2.json")
    if not (args.model.model_name_or_path or args.model.config_name):
        problems.append("no model is named: write --model_name_or_path M or --config_name C")
    if problems:
        raise UserError(problems)


def _shorten_schedule(raw: dict[str, Any]) -> None:
    """In place: the shortest warm-up, and the end of the schedule at the last step."""
    scheduler = raw.get("scheduler")
    if not isinstance(scheduler, dict) or not str(scheduler.get("type")).startswith("Warmup"):
        return
    params = scheduler["params"] = dict(scheduler.get("params") or {})
    params["warmup_num_steps"] = 1
    if isinstance(params.get("total_num_steps"), int):
        params["total_num_steps"] = STEPS
