"""Runs tiny models under DeepSpeed in one process and prints one JSON object: what test_config_facts.py asserts.

    python tests/unit/deepspeed_facts.py

Every figure is a list over steps of (loss, gradient norm or null, learning rates).
"""

import contextlib
import gc
import io
import json
import logging
import os
import sys
import traceback

import torch

with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
    from deepspeed.utils import logger

from dstrain.launch.ops import ask_cpu_once

STEPS = 5
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
MUON = {"type": "Muon", "params": {"lr": 0.05}}


def build(bf16: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    return model.bfloat16() if bf16 else model


def inputs(step: int, bf16: bool) -> torch.Tensor:
    torch.manual_seed(10 * step)
    x = torch.randn(4, 16)
    return x.bfloat16() if bf16 else x


def plain(bf16: bool, clipping: float = 0.5) -> list:
    """AdamW with fp32 masters in plain torch."""
    model = build(bf16)
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1)
    out = []
    for step in range(STEPS):
        loss = (model(inputs(step, bf16)).float() ** 2).mean()
        loss.backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, clipping)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        out.append([loss.item(), norm.item(), [1e-2]])
    return out


def run(stage=0, bf16=False, clipping=0.5, optimizer=ADAMW, masters=None, **more):
    """The figures, or the name of the exception."""
    config = {
        "train_batch_size": 4,
        "gradient_clipping": clipping,
        "steps_per_print": 2**31 - 1,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
        "bf16": masters or {"enabled": bf16},
        **more,
    }
    model = build(False)
    gc.freeze()  # DeepSpeed collects garbage as it starts, and would look through all that was imported
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
        )
    except (TypeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    out = []
    for step in range(STEPS):
        rates = engine.get_lr()
        loss = (engine(inputs(step, bf16)).float() ** 2).mean()
        engine.backward(loss)
        engine.step()
        norm = engine.get_global_grad_norm()
        out.append([loss.item(), None if norm is None else float(norm), rates])
    run.engine = engine
    return out


def schedule(kind: str, stage: int = 0, **params):
    return run(stage, scheduler={"type": kind, **({"params": params} if params else {})})


def experts(**more) -> str:
    """Why DeepSpeed's AutoEP does not take transformers' Mixtral: exception and place; "" where it does."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    config = {"train_batch_size": 1, "expert_parallel": {"enabled": True, "autoep_size": 1, **more}}
    try:
        deepspeed.initialize(model=model, config=config, dist_init_required=False)
    except (TypeError, ValueError, AttributeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {os.path.basename(place.filename)}: {error}"
    return ""


def main() -> dict:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29719")
    deepspeed.init_distributed("gloo")
    logger.setLevel(logging.ERROR)
    ask_cpu_once()
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    facts = {"plain bf16": plain(True), "plain fp32": plain(False)}
    for stage in (0, 1, 2, 3):
        facts[f"AdamW fp32 {stage}"] = run(stage)
        facts[f"AdamW bf16 {stage}"] = run(stage, bf16=True, **(fp32_sums if stage else {}))
        for dtype in ("float16", "bfloat16"):
            facts[f"autocast {dtype} {stage}"] = run(stage, torch_autocast={"enabled": True, "dtype": dtype})
        whole = {"zero_optimization": {"stage": stage, "reduce_scatter": stage != 3}}
        for clipping in (0.0, 0.01):
            facts[f"Muon fp32 {stage} clipping {clipping}"] = run(clipping=clipping, optimizer=MUON, **whole)
            facts[f"Muon bf16 {stage} clipping {clipping}"] = run(
                bf16=True, clipping=clipping, optimizer=MUON, **whole, **(fp32_sums if stage else {})
            )
    facts["bf16 sums in fp32 at stage 0"] = run(0, bf16=True, **fp32_sums)
    masters = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    for name, sums in (("with", fp32_sums), ("without", {})):
        model_and_masters = run(1, True, masters=masters, **sums)
        assert model_and_masters
        held = run.engine.optimizer
        flat = getattr(held, "fp32_groups_flat_partition", None) or held.single_partition_of_fp32_groups
        facts[f"bf16 masters {name} fp32 sums"] = str(flat[0].dtype)
    facts["WarmupDecayLR"] = schedule("WarmupDecayLR", total_num_steps=10, warmup_num_steps=2, warmup_type="linear")
    facts["WarmupCosineLR"] = schedule("WarmupCosineLR", total_num_steps=10, warmup_num_steps=1, warmup_type="linear")
    facts["no params"] = schedule("WarmupLR")
    facts["StepLR 0"] = schedule("StepLR", 0, step_size=1)
    facts["StepLR 1"] = schedule("StepLR", 1, step_size=1)
    schedule("OneCycle", cycle_min_lr=1e-3, cycle_max_lr=1e-2)
    facts["OneCycle betas"] = list(run.engine.optimizer.param_groups[0]["betas"])
    facts["AutoEP of Mixtral"] = experts()
    return facts


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    print(json.dumps(result))
