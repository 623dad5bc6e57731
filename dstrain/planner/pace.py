"""How far a CPU's real kernels stay behind its rates of matmul and copy: one real layer, run for a moment."""

import time
from dataclasses import replace
from typing import Any

import torch

from dstrain.arguments import ModelArguments
from dstrain.models.build import build_skeleton, save_activations
from dstrain.models.loss import install_fused_loss, token_loss
from dstrain.planner.tracing import Setting, of_depth

# A layer larger than this takes longer than a start may wait.
MOST_LAYER_ELEMENTS = 20_000_000
MOST_TOKENS, MOST_VOCABULARY = 512, 2048


def sample_of(config: Any, setting: Setting) -> tuple[Any, Setting]:
    """One layer of a model, at most `MOST_TOKENS` tokens and `MOST_VOCABULARY` words: the run's own types, attention
    and checkpointing, without adapters. What `trace_once` says of it is what the rates promise."""
    config = of_depth(config, 1)
    text = config.get_text_config()
    text.vocab_size = min(text.vocab_size, MOST_VOCABULARY)
    text.pad_token_id = None  # may lie beyond
    micro_batch = max(1, min(setting.micro_batch, MOST_TOKENS // setting.seq_len))
    seq_len = min(setting.seq_len, MOST_TOKENS)
    return config, replace(setting, micro_batch=micro_batch, seq_len=seq_len, tp_size=1, adapter=None)


def seconds_of_sample(config: Any, setting: Setting, rounds: int = 3) -> float:
    """Seconds of its forward and backward on this machine: the fastest round, of which the first warms up."""
    margs = ModelArguments(
        attn_implementation=setting.attn_implementation,
        gradient_checkpointing=setting.gradient_checkpointing,
        tiled_mlp=setting.tiled_mlp,
    )
    model = build_skeleton(margs, config, setting.dtype)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                values = torch.full(parameter.shape, 0.01, dtype=setting.dtype)
                module._parameters[name] = made.setdefault(id(parameter), torch.nn.Parameter(values))
    save_activations(model, margs)
    model.train()
    head = install_fused_loss(model)
    ids = torch.zeros((setting.micro_batch, setting.seq_len), dtype=torch.int64)
    best = float("inf")
    with torch.random.fork_rng(devices=[]):  # dropout must not draw from the run's own numbers
        for _ in range(rounds):
            start = time.perf_counter()
            with torch.autocast("cpu", setting.compute, enabled=setting.compute != setting.dtype):
                loss, _ = token_loss(model, head, {"input_ids": ids, "labels": ids})
            loss.backward()
            best = min(best, time.perf_counter() - start)
    return best
