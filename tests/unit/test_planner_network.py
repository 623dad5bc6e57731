"""What of a step goes over the network, and how long it takes there."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dstrain.errors import UserError
from dstrain.launch.hosts import Host
from dstrain.planner.hardware import DEVICES
from dstrain.planner.network import check_slots, with_network
from dstrain.planner.step_time import Travel, Work, travel_seconds
from tests.checkpoints import MODEL

H100 = DEVICES["h100-80g"]


def link(a: str, b: str, rate: float, problem: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(hosts=(a, b), bytes_per_s=rate, round_trip_s=1e-3, problem=problem)


def work(*travel: Travel) -> Work:
    nothing = dict.fromkeys(("flops", "traffic", "operators", "update_traffic", "host_traffic"), 0.0)
    return Work(precision="bf16", update_on_host=False, travel=travel, bubble=1.0, **nothing)


def test_the_slowest_link_is_the_network():
    links = [link("a", "b", 9e9), link("a", "c", 1e9), link("b", "c", 8e9)]
    device = with_network(H100, links)
    assert device.network == 1e9 and device.network_latency == pytest.approx(1e-3 + 20e-6)
    assert device.link == H100.link and with_network(H100, []) == H100
    with pytest.raises(UserError, match="a to c: no TCP connection"):
        with_network(H100, [*links, link("a", "c", 0.0, "no TCP connection")])


def test_hosts_of_unlike_slots_are_refused():
    assert check_slots([Host("a", 8), Host("b", 8)]) == 8
    with pytest.raises(UserError, match="the hosts have 4, 8 slots"):
        check_slots([Host("a", 8), Host("b", 4)])


def test_a_group_wider_than_a_host_goes_over_the_network():
    device = with_network(H100, [link("a", "b", 1e9)])
    near, far = travel_seconds(work(Travel(8, 45e9, 10), Travel(16, 2e9, 3)), device, 2, 8)
    assert near == pytest.approx(0.1 + 10 * 20e-6) and far == pytest.approx(2.0 + 3 * 1.02e-3)
    assert travel_seconds(work(Travel(16, 45e9, 0)), device) == (pytest.approx(0.1), 0.0)


@pytest.mark.parametrize(("stride", "lanes"), [(1, 1), (4, 4), (32, 8)], ids=["dp", "tp4", "pp"])
def test_groups_side_by_side_share_a_measured_network(stride, lanes):
    """On hosts of eight: one ring of all ranks, four of every fourth, and each rank to its own of the next stage."""
    group = Travel(32, 1e9, 0, stride)
    measured = with_network(H100, [link("a", "b", 1e9)])
    assert travel_seconds(work(group), measured, 4, 8) == (0.0, pytest.approx(lanes))
    own_ports = replace(H100, network=1e9)
    assert travel_seconds(work(group), own_ports, 4, 8) == (0.0, pytest.approx(1))


def plan(folder, more):
    """On 2 hosts of 8: (the planner, the work of two micro-batches of one block of 32)."""
    from dstrain.arguments import ModelArguments
    from dstrain.models.config import load_model_config
    from dstrain.planner.memory import Flags, setting_of
    from dstrain.planner.step_time import work_of
    from dstrain.planner.strategy import Cluster, Planner

    (folder / "model.json").write_text(json.dumps(MODEL))
    margs = ModelArguments(config_name=str(folder / "model.json"))
    flags = Flags(32)
    planner = Planner(load_model_config(margs), margs, Cluster(2, 8, H100), flags)
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        **more,
    }
    resolved = planner.resolve(deepspeed, flags)
    return planner, work_of(planner.shape, planner.trace(setting_of(resolved, flags, on_cpu=False)), resolved, 32)


@pytest.mark.parametrize(
    ("stage", "more", "spans"),
    [
        (1, {}, {16: 3.0}),  # both halves of an all-reduce, and the gather of what was updated
        (2, {}, {16: 5.0}),  # an all-reduce for each micro-batch
        (3, {}, {16: 6.0}),  # gathered twice and scattered, for each micro-batch
        (3, {"zero_hpz_partition_size": 8}, {16: 3.0, 8: 3.0}),  # gathered once a step, then nearby
        (1, {"stages": 2}, {8: 1.5}),
    ],
    ids=["zero1", "zero2", "zero3", "hpz", "pp2"],
)
def test_what_each_way_of_splitting_sends(stage, more, spans, tmp_path):
    """With two micro-batches, on 2 hosts of 8: in bytes of the model, for a ring of any length."""
    stages = more.get("stages", 1)
    pipeline = {"pipeline": {"stages": stages}} if stages > 1 else {}
    zero = {"stage": stage, **{k: v for k, v in more.items() if k != "stages"}}
    planner, found = plan(tmp_path, {"zero_optimization": zero, **pipeline})
    assert Work.from_json(found.to_json()) == found
    assert {group.span for group in found.travel} == spans.keys() | ({16} if stages > 1 else set())
    whole = 2.0 * planner.shape.num_parameters
    for group in found.travel:
        if expected := spans.get(group.span):
            assert group.sent == pytest.approx(expected * whole * (group.span - 1) / group.span, rel=2e-3)
    if stages == 2:  # each stage has one neighbour: hidden states of two micro-batches there, or their gradients back
        (pairs,) = (group for group in found.travel if group.span == 16)
        assert pairs.stride == 8 and pairs.sent == 2 * 32 * MODEL["hidden_size"] * 2.0


def test_tensor_parallelism_sums_once_for_each_matrix_that_it_divides(tmp_path):
    _, found = plan(tmp_path, {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}})
    (tensor,) = (group for group in found.travel if group.span == 2)
    sums = 7 * MODEL["num_hidden_layers"] + 1  # query, key, value, output, gate, up, down; the head
    assert tensor.messages == sums * 2
    assert tensor.sent == sums * 2 * 32 * MODEL["hidden_size"] * 2.0  # of bf16, half of it there and half back
