"""LoRA in real processes: the numbers of plain peft under ZeRO-3 and a pipeline, checkpoints without base, exports."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dstrain import cli
from dstrain.adapter import is_adapter, peft_name
from dstrain.checkpoint.export import export
from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.errors import UserError
from dstrain.generate.model import load
from tests import adapters as ad

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return ad.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def zero3(base, tmp_path_factory):
    """A run at ZeRO-3 on two ranks with its export: (flags, result)."""
    folder = tmp_path_factory.mktemp("zero3") / "run"
    argv = ad.flags(folder, base, "AdamW", "--export", "--save_steps", "10", zero_optimization={"stage": 3})
    return argv, ad.train(folder, argv, ranks=2).check()


def test_zero3_equals_plain_peft(zero3):
    from safetensors.torch import load_file

    argv, result = zero3
    losses, adapters, _ = ad.plain_peft(argv, "AdamW")
    assert losses[-1] < losses[0] - 0.1
    assert ad.relative(result.losses(), losses) <= 1e-5
    exported = load_file(result.run_dir / "export" / "adapter_model.safetensors")
    assert ad.largest_difference(exported, adapters) <= 1e-4
    facts = result.run_json()
    assert facts["num_trainable_parameters"] == sum(v.numel() for v in adapters.values())
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(argv[3]).parameters())
    assert facts["num_parameters"] == whole + facts["num_trainable_parameters"]


@pytest.mark.exhaustive  # on a busy machine a run starts before its prediction is there (docs/planner.md)
def test_plan_said_what_the_run_expected(zero3, capfd):
    argv, result = zero3
    named = ("--deepspeed_config", "--model_name_or_path", "--block_size", "--lora_rank", "--lora_alpha")
    flags = [word for name in named for word in (name, argv[argv.index(name) + 1])]
    assert cli.main(["plan", *flags, "--devices_per_host", "2", "--json"]) == 0
    planned, expected = json.loads(capfd.readouterr().out)["prediction"], result.run_json()["prediction"]
    for name in ("device_gib", "host_gib", "checkpoint_gib", "pinned_gib", "nvme_gib"):
        assert planned[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_checkpoint_holds_adapters_only(zero3, base):
    _, result = zero3
    folder = result.run_dir / "checkpoints" / f"step_{ad.STEPS:08d}"
    reader, manifest = CheckpointReader(folder), read_manifest(folder)
    assert reader.names() and all(is_adapter(name) for name in reader.names())
    stored = sum(torch.Size(reader.shapes[name]).numel() for name in reader.names())
    assert stored == result.run_json()["num_trainable_parameters"]
    assert manifest.contents["arguments"]["model_name_or_path"] == str(base)
    assert len(manifest.contents["identity"]["base"]) == 64
    tensors = sum(path.stat().st_size for path in folder.glob("rank_*"))
    assert 12 * stored < tensors < 12 * stored + 6 * 16384  # masters, two moments, and a header of each file


def test_exports_give_the_same_logits_beside_and_in_the_base(zero3, base, tmp_path):
    _, result = zero3
    beside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.run_dir / "export")
    again = AutoModelForCausalLM.from_pretrained(result.run_dir / "export")  # by transformers' own door
    checkpoint = result.run_dir / "checkpoints" / f"step_{ad.STEPS:08d}"
    merged = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "merged", merge=True))
    asked = load(str(result.run_dir)).model  # by `dstrain evaluate` and `dstrain generate`
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (ad.logits(plain) - ad.logits(beside)).abs().max() > 1e-2
    assert torch.equal(ad.logits(again), ad.logits(beside))
    torch.testing.assert_close(ad.logits(merged), ad.logits(beside), rtol=1e-5, atol=1e-5)
    assert torch.equal(ad.logits(asked), ad.logits(merged))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    other = ad.write_base(tmp_path / "other", seed=1)
    for name in (str(result.run_dir), str(result.run_dir / "export")):
        with pytest.raises(UserError, match="other has other weights than the model of these adapters"):
            load(name, base_model=str(other))


def test_the_exported_adapters_are_evaluated_as_the_checkpoint(zero3, tmp_path, capfd):
    argv, result = zero3
    ask = ("--task", "perplexity", "--data_file", argv[argv.index("--train_file") + 1], "--block_size", "32")
    found = []
    for name in (result.run_dir, result.run_dir / "export"):
        assert cli.main(["evaluate", str(name), *ask]) == 0
        found.append(json.loads(capfd.readouterr().out.splitlines()[-1])["metrics"])
    assert found[0] == found[1]
    assert torch.equal(*(ad.logits(load(str(name)).model) for name in (result.run_dir, result.run_dir / "export")))


def test_a_pipeline_goes_on_from_it_and_gives_the_same_curve(zero3, base, tmp_path):
    """From the middle of the ZeRO-3 run: stages read what is theirs, and load their own part of the base."""
    _, result = zero3
    middle = result.run_dir / "checkpoints" / "step_00000010"
    more = ("--resume_from_checkpoint", str(middle))
    argv = ad.flags(tmp_path / "run", base, "AdamW", *more, pipeline={"stages": 2})
    resumed = ad.train(tmp_path / "run", argv, ranks=2).check()
    assert ad.relative(resumed.losses(), result.losses()[10:]) <= 1e-5
    assert resumed.run_json()["num_trainable_parameters"] == result.run_json()["num_trainable_parameters"]


LAYOUTS = {
    "zero0": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1},
    "zero3_offloaded": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    "pp2": {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2},
    "sp2": {"sequence_parallel_size": 2, "zero_optimization": {"stage": 3}},
    "tp2_zero0": {"tensor_parallel": {"autotp_size": 2}},
    "tp2_zero1": {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}},
    "tp2_zero3": {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 3}},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_gives_the_same_curve(zero3, base, tmp_path, name):
    argv = ad.flags(tmp_path / "run", base, "AdamW", "--gradient_checkpointing", **LAYOUTS[name])
    assert ad.relative(ad.train(tmp_path / "run", argv, ranks=2).check().losses(), zero3[1].losses()) <= 1e-5


def test_another_base_is_refused(zero3, tmp_path):
    argv, result = zero3
    other = ad.write_base(tmp_path / "other", seed=1)
    middle = result.run_dir / "checkpoints" / "step_00000010"
    flags = ad.flags(tmp_path / "run", other, "AdamW", "--resume_from_checkpoint", str(middle))
    refused = ad.train(tmp_path / "run", flags, ranks=1).check(2)
    assert "names another model" in refused.stderr
    argv = [str(other) if word == argv[3] else word for word in argv]
    refused = ad.train(result.run_dir, argv, ranks=1).check(2)
    assert "holds a run with another base" in refused.stderr
    assert json.loads((result.run_dir / "run.json").read_text())["identity"]["base"]


@pytest.fixture(scope="module")
def in_4bit(base, tmp_path_factory):
    """A run beside a base in 4 bits, with an evaluation on the way: (flags, result)."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("in_4bit") / "run"
    more = ("--load_in_4bit", "--eval_steps", "5", "--save_steps", "10")
    argv = ad.flags(folder, base, "AdamW", *more, zero_optimization={"stage": 3})
    return argv, ad.train(folder, argv, ranks=2).check()


def test_a_base_in_4_bits_equals_plain_peft(in_4bit, zero3, base, tmp_path):
    argv, result = in_4bit
    losses, adapters, model = ad.plain_peft(argv, "AdamW")
    assert ad.relative(result.losses(), losses) <= 1e-5
    assert ad.relative(result.losses(), zero3[1].losses()) > 1e-4  # of the base as it is
    for name in ("num_parameters", "num_trainable_parameters"):
        assert result.run_json()[name] == zero3[1].run_json()[name]
    reader = CheckpointReader(result.run_dir / "checkpoints" / f"step_{ad.STEPS:08d}")
    for name in reader.names():
        value = adapters[peft_name(name)]
        assert (reader.whole("weight", name) - value).norm() <= 1e-4 * value.norm()
    asked = load(str(result.run_dir)).model  # merged, as `dstrain evaluate` and `dstrain generate` have it
    torch.testing.assert_close(ad.logits(asked), ad.logits(model), rtol=1e-4, atol=1e-4)
    exported = export(reader.folder, tmp_path / "e")
    assert torch.equal(ad.logits(load(str(exported)).model), ad.logits(asked))
    beside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    assert (ad.logits(beside) - ad.logits(model)).abs().max() > 1e-3


@pytest.mark.exhaustive
def test_a_base_in_4_bits_is_not_left_by_the_way(in_4bit, base, tmp_path):
    argv, result = in_4bit
    refused = ad.train(result.run_dir, [word for word in argv if word != "--load_in_4bit"], ranks=1).check(2)
    assert "holds a run with another adapter (load_in_4bit: true, now null)" in refused.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("tp")])
def test_every_layout_gives_the_same_curve_in_4_bits(in_4bit, base, tmp_path, name):
    argv = ad.flags(tmp_path / "run", base, "AdamW", "--gradient_checkpointing", "--load_in_4bit", **LAYOUTS[name])
    assert ad.relative(ad.train(tmp_path / "run", argv, ranks=2).check().losses(), in_4bit[1].losses()) <= 1e-5


@pytest.mark.exhaustive
def test_resuming_in_4_bits_is_exact(in_4bit, base, tmp_path):
    middle = in_4bit[1].run_dir / "checkpoints" / "step_00000010"
    more = ("--load_in_4bit", "--eval_steps", "5", "--resume_from_checkpoint", str(middle))
    argv = ad.flags(tmp_path / "run", base, "AdamW", *more, zero_optimization={"stage": 3})
    assert ad.train(tmp_path / "run", argv, ranks=2).check().losses() == in_4bit[1].losses()[10:]
    flags = [word for word in argv if word != "--load_in_4bit"]
    refused = ad.train(tmp_path / "other", flags, ranks=1).check(2)
    assert "holds adapters of a model in 4 bits: add --load_in_4bit" in refused.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_in_4_bits(in_4bit, base, tmp_path, stage):
    """And what is merged computes what was trained, within what bf16 can tell."""
    values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    argv = ad.flags(tmp_path / "run", base, "AdamW", "--load_in_4bit", **values)
    result = ad.train(tmp_path / "run", argv, ranks=2).check()
    assert ad.relative(result.losses(), in_4bit[1].losses()) <= 2e-2
    assert load(str(result.run_dir)).model.dtype == torch.bfloat16
