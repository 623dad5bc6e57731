"""DeepSpeed's CPU Adam kernels keep powers of beta that no checkpoint holds: replaying the steps brings them back.

When the last test fails after an upgrade, the kernels no longer do so, and dstrain/checkpoint/replay.py may go.
"""

import copy

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from dstrain.checkpoint.replay import replay_steps
from dstrain.distributed import use_own_programs

pytestmark = pytest.mark.ops
KINDS = {"fused": FusedAdam, "cpu": DeepSpeedCPUAdam}


@pytest.fixture(autouse=True)
def _own_ninja():
    use_own_programs()  # another version of ninja would build the kernels anew


def _build(kind):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    return parameter, KINDS[kind]([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def _train(parameter, optimizer, steps):
    for step in steps:
        parameter.grad = torch.sin(torch.arange(64.0) * (step + 1))
        optimizer.step()


def _whole_and_resumed(kind, replay):
    """Parameters after 14 steps in one go, and after a restart at step 11."""
    parameter, optimizer = _build(kind)
    _train(parameter, optimizer, range(11))
    saved, state = parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter])
    _train(parameter, optimizer, range(11, 14))

    other = torch.nn.Parameter(torch.zeros(1))
    other.grad = torch.zeros(1)
    KINDS[kind]([other], lr=0.0, betas=(0.5, 0.5)).step()  # the fused kernel's state outlives its optimizers

    again, resumed = _build(kind)
    again.data.copy_(saved)
    resumed.state[again] = state
    if replay:
        replay_steps(resumed, 11)
    _train(again, resumed, range(11, 14))
    return parameter.detach(), again.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_restart_gives_the_same_bits(kind):
    whole, resumed = _whole_and_resumed(kind, replay=True)
    assert torch.equal(whole, resumed)


def test_what_needs_no_replay_is_left_alone():
    parameter = torch.nn.Parameter(torch.zeros(2))
    replay_steps(torch.optim.SGD([parameter], lr=0.1), 10**9)
    replay_steps(torch.optim.AdamW([parameter]), 10**9)
    replay_steps(_build("cpu")[1], 10**9)  # 1 - beta^steps is 1: no endless loop


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_the_last_bits_differ(kind):
    whole, resumed = _whole_and_resumed(kind, replay=False)
    assert not torch.equal(whole, resumed)
    assert torch.allclose(whole, resumed, rtol=1e-5)
