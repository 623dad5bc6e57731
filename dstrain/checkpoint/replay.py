"""Bring the hidden counters of DeepSpeed's CPU optimizers to where an uninterrupted run has them.

`Adam_Optimizer::IncrementStep` (deepspeed 0.19, csrc/includes/cpu_adam.h) multiplies beta^t up step by step in fp32,
but takes std::pow when the step it is given does not follow the one before, as after every restart. The two differ in
the last bit, and with them every weight. No checkpoint of DeepSpeed's holds this; replaying the steps restores it.
"""

import math
from typing import Any

import torch


def replay_steps(optimizer: Any, steps: int) -> None:
    """Take `steps` steps of the CPU kernel behind `optimizer` on a tensor of one element; at most a second.

    Does nothing for optimizers without such a counter, on a GPU, or where 1 - beta^steps is 1 in fp32 already.
    """
    groups = [group for group in optimizer.param_groups if "betas" in group]
    betas = {tuple(group["betas"]) for group in groups}
    if len(betas) != 1 or steps > _steps_that_matter(max(next(iter(betas)))):
        return  # with several betas the kernel never multiplies up
    optimizer = getattr(optimizer, "aux_optimizer", None) or optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedCPUAdam":
        one = [torch.zeros(1) for _ in range(4)]
        for step in range(1, steps + 1):
            beta1, beta2 = groups[0]["betas"]
            update = optimizer.ds_opt_adam.adam_update
            update(optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, groups[0]["bias_correction"], *one)
    elif kind == "FusedAdam" and not torch.cuda.is_available():
        # On the CPU all instances share one kernel state for each of the two modes.
        element = torch.nn.Parameter(torch.zeros(1))
        element.grad = torch.zeros(1)
        mode = {"betas": groups[0]["betas"], "adam_w_mode": bool(optimizer.adam_w_mode), "lr": 0.0}
        double = type(optimizer)([element], **mode)
        for _ in range(steps):
            double.step()


def _steps_that_matter(beta: float) -> int:
    """Steps until beta^steps is lost beside 1 in fp32."""
    return math.ceil(-27 * math.log(2) / math.log(beta)) if 0 < beta < 1 else 0
