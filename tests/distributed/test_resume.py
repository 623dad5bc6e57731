"""A run that was interrupted and resumed at the same layout gives the very bits of the uninterrupted one.

Compared are the losses of every step and the whole files of the last checkpoint: masters, moments, step counters and
the random generators of every rank.
"""

import json
import threading
import time

import pytest
from safetensors.torch import load_file

from tests import checkpoints as ck
from tests import forked
from tests.distributed.parity import thinned

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
MUON = {"type": "Muon", "params": {"lr": 0.02}}
LAYOUTS = {
    "zero0-1": (ck.config(0), 1),
    "zero0-2": (ck.config(0), 2),
    "zero1-2": (ck.config(1), 2),
    "zero1-bf16-2": (ck.config(1, "bf16"), 2),
    "zero2-bf16-1": (ck.config(2, "bf16"), 1),
    "zero2-bf16-2": (ck.config(2, "bf16"), 2),
    "zero3-2": (ck.config(3), 2),
    "zero3-bf16-2": (ck.config(3, "bf16", zero={"stage3_param_persistence_threshold": 100, "sub_group_size": 4000}), 2),
    "zero2-sgd-2": (ck.config(2, optimizer=SGD), 2),
    "zero0-torch-adam-1": (ck.config(0, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}), 1),
    "zero0-muon-2": (ck.config(0, optimizer=MUON), 2),
    "zero1-muon-bf16-2": (ck.config(1, "bf16", optimizer=MUON), 2),
    "zero0-adagrad-1": (ck.config(0, optimizer={"type": "Adagrad", "params": {"lr": 1e-2}}), 1),
}


def assert_resumes_bit_exactly(folder, values, ranks, **options):
    whole, copied = folder / "whole", folder / "resumed"
    first = ck.start(whole, values, ranks, **options).check()
    ck.interrupt(whole, copied)
    (folder / "resumed_inputs").mkdir()
    second = ck.start(copied, values, ranks, **options).check()
    assert second.losses() == first.losses()
    assert [line["text"] for line in second.metrics("event") if line["name"] == "resume"]
    assert ck.state_files(copied) == ck.state_files(whole)


SHIPPED = [p.stem for p in sorted((ck.ROOT / "ds_configs").glob("*.json"))]
SELDOM = ("moe_zero3", "sp2_zero1", "sp2_zero3", "tp2_zero2", "zero2")  # other tests run them too
SELDOM += ("zero3_offload_nvme",)  # its op takes three minutes to build


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(SHIPPED, *(name for name in SHIPPED if name not in SELDOM)))
def test_every_shipped_configuration_resumes_bit_exactly(name, tmp_path, request):
    if "fp16" in name:
        pytest.skip("this CPU has no fp16")
    if "nvme" in name:
        request.getfixturevalue("libaio")
    values = ck.shipped(name)
    dims = [values.get("pipeline", {}).get("stages", 1), values.get("tensor_parallel", {}).get("autotp_size", 1)]
    ranks = max(2, dims[0] * dims[1] * values.get("sequence_parallel_size", 1) * (2 if "dp2" in name else 1))
    # DeepSpeed swaps nothing smaller than 1 MiB to NVMe.
    model = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4} if "nvme" in name else {}
    assert_resumes_bit_exactly(tmp_path, values, ranks, model=model)


KEPT = ["zero0-2", "zero3-bf16-2"]


@pytest.mark.parametrize("name", thinned(list(LAYOUTS), *KEPT))
def test_same_layout_gives_the_same_bits(name, tmp_path):
    values, ranks = LAYOUTS[name]
    assert_resumes_bit_exactly(tmp_path, values, ranks, model={"attention_dropout": 0.1})


@pytest.mark.exhaustive
def test_dualpipev_resumes_bit_exactly_and_crosses_to_other_layouts(tmp_path):
    """Two stages a rank hold what one stage a rank, or one rank, holds under the same names."""
    model = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    micro = {"train_micro_batch_size_per_gpu": 1}
    folded = ck.config(1, pipeline={"stages": 2, "partition": "dualpipev"}, **micro)
    assert_resumes_bit_exactly(tmp_path, folded, 2, model=model)
    whole, losses = tmp_path / "whole", {}
    for name, values, ranks in (
        ("1f1b", ck.config(1, pipeline={"stages": 2}, **micro), 2),
        ("zero3", ck.config(3), 2),
    ):
        ck.interrupt(whole, tmp_path / name)
        losses[name] = ck.start(tmp_path / name, values, ranks, model=model).check().losses()
        ck.interrupt(tmp_path / name, tmp_path / f"{name}_back")
        losses[f"{name}_back"] = ck.start(tmp_path / f"{name}_back", folded, 2, model=model).check().losses()
    (tmp_path / "plain_inputs").mkdir()
    plain = ck.start(tmp_path / "plain", ck.config(1), 1, "--export", model=model).check()
    exported = ck.start(tmp_path / "exported", folded, 2, "--export", model=model).check()
    for name, found in losses.items():
        assert found == pytest.approx(plain.losses(), rel=1e-5), name
    ours, theirs = (load_file(r.run_dir / "export" / "model.safetensors") for r in (exported, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5, name


CPU = {"offload_optimizer": {"device": "cpu"}}
COPIED = {
    "zero0-1": (ck.config(0), 1),
    "zero1-bf16-2": (ck.config(1, "bf16"), 2),
    "zero1-muon-bf16-2": LAYOUTS["zero1-muon-bf16-2"],
    "zero2-sgd-2": LAYOUTS["zero2-sgd-2"],
    "zero2-cpu-2": (ck.config(2, "bf16", zero=CPU), 2),
    "zero3-2": (ck.config(3), 2),
    "zero3-cpu-2": (ck.config(3, "bf16", zero=CPU), 2),
    "pp2-2": (ck.config(1, pipeline={"stages": 2}), 2),
    "tp2-2": (ck.config(1, tensor_parallel={"autotp_size": 2}), 2),
}


def copy_slowly(rank: int) -> None:
    from dstrain.checkpoint import state

    copy_all = state.copy_all

    def slow(pairs: list) -> None:
        if threading.current_thread().name == "checkpoint-copy":
            time.sleep(0.5)  # many steps
        copy_all(pairs)

    state.copy_all = slow


@pytest.mark.parametrize("name", thinned(list(COPIED), "zero3-cpu-2"))
def test_a_checkpoint_is_of_its_step_however_long_the_copy_takes(name, tmp_path):
    """Whichever optimizer of DeepSpeed takes the next step waits for the copy."""
    values, ranks = COPIED[name]
    ck.start(tmp_path / "plain", values, ranks).check()
    slow = tmp_path / "slow"
    argv = ["--output_dir", str(slow), *ck.flags(slow, values, {})]
    processes = forked.start(argv, ranks, tmp_path, copy_slowly)
    assert forked.finish(processes, 60)
    assert [process.exitcode for process in processes] == [0] * ranks, (tmp_path / "rank0.err").read_text()
    for step in (ck.SAVED, ck.STEPS):
        assert ck.state_files(slow, step) == ck.state_files(tmp_path / "plain", step)
    lines = [json.loads(line) for line in (slow / "metrics.jsonl").read_text().splitlines()]
    (save,) = [line for line in lines if line["kind"] == "save" and line["step"] == ck.SAVED]
    assert save["stall_s"] > 0.3 or "muon" in name  # whose step does not wait, since its copy did not
