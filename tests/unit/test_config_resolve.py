"""Batch arithmetic, origins, "auto", overrides, strict reading, and the comparison with what the engine has."""

import json

import pytest

from dstrain.config import RunFacts, apply_overrides, load_config, resolve_config
from dstrain.config.batch import solve_batch
from dstrain.errors import UserError

OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3}}


def base(**more):
    return {"train_batch_size": 8, "optimizer": OPTIMIZER, **more}


@pytest.mark.parametrize(
    ("given", "dp", "solved"),
    [
        ((16, 2, None), 2, (16, 2, 4)),
        ((16, None, 4), 2, (16, 2, 4)),
        ((None, 2, 4), 2, (16, 2, 4)),
        ((None, 2, None), 4, (8, 2, 1)),
        ((16, None, None), 4, (16, 4, 1)),
        ((16, 2, 4), 2, (16, 2, 4)),
        ((1, None, None), 1, (1, 1, 1)),
    ],
)
def test_batch_is_solved(given, dp, solved):
    batch = solve_batch(*given, dp_size=dp)
    assert (batch.global_batch, batch.micro_batch, batch.gradient_accumulation_steps) == solved


def test_only_global_takes_the_largest_micro_batch_that_fits():
    batch = solve_batch(48, None, None, dp_size=2, max_micro_batch=10)
    assert (batch.micro_batch, batch.gradient_accumulation_steps) == (8, 3)
    batch = solve_batch(14, None, None, dp_size=2, max_micro_batch=6)
    assert (batch.micro_batch, batch.gradient_accumulation_steps) == (1, 7)


@pytest.mark.parametrize(
    ("given", "dp", "words"),
    [
        ((10, None, None), 4, "write 8 or 12"),
        ((2, None, None), 4, "write 4"),
        ((12, 5, None), 2, "write 10 or 20, or train_micro_batch_size_per_gpu 3 or 6"),
        ((16, 3, None), 2, "write 12 or 18, or train_micro_batch_size_per_gpu 2 or 4"),
        ((16, None, 3), 2, "write 12 or 18"),
        ((16, 2, 2), 2, "leave out gradient_accumulation_steps"),
        ((None, None, 4), 2, "no batch size is given"),
        ((None, None, None), 2, "no batch size is given"),
    ],
)
def test_batch_that_does_not_divide_is_refused_with_the_nearest(given, dp, words):
    with pytest.raises(UserError, match=words):
        solve_batch(*given, dp_size=dp)


def test_a_resumed_run_keeps_its_global_batch():
    def cut(*given, dp):
        batch = solve_batch(*given, dp_size=dp, stored_global_batch=16)
        return batch.global_batch, batch.micro_batch, batch.gradient_accumulation_steps

    assert cut(None, 2, None, dp=2) == (16, 2, 4)  # first start: micro 2 on 8 ranks
    assert cut(None, 2, 1, dp=4) == (16, 2, 2)  # accumulation is solved anew
    assert cut(16, 4, 2, dp=1) == (16, 4, 4)
    assert cut(16, None, 2, dp=1) == (16, 8, 2)
    with pytest.raises(UserError, match="was started with 16"):
        cut(32, None, None, dp=2)
    with pytest.raises(UserError, match="cannot be split over"):
        cut(None, 3, None, dp=2)


def test_model_parallel_ranks_share_a_sample():
    config = base(zero_optimization={"stage": 1})
    tensor = resolve_config({**config, "tensor_parallel": {"autotp_size": 2}}, world_size=4)
    assert (tensor.global_batch, tensor.micro_batch, tensor.parallel.dp_size) == (8, 4, 2)
    # AutoTP has no mpu when DeepSpeed checks the batch: there every rank counts.
    assert tensor.deepspeed["train_batch_size"] == 16
    assert tensor.origins["train_batch_size"].startswith("derived: 8 x 2")
    pipe = resolve_config({**config, "pipeline": {"stages": 2}}, world_size=4)
    assert (pipe.deepspeed["train_batch_size"], pipe.micro_batch) == (8, 4)
    sequence = resolve_config({**config, "sequence_parallel_size": 4}, world_size=4)
    assert (sequence.deepspeed["train_batch_size"], sequence.micro_batch) == (8, 8)


def test_properties():
    config = base(
        bf16={"enabled": True},
        zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}},
        gradient_clipping=0,
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    )
    resolved = resolve_config(config, world_size=2)
    assert resolved.zero_stage == 3
    assert resolved.precision == "bf16"
    assert resolved.autocast_dtype is None
    assert resolved.gradient_clipping == 0.0
    assert resolved.offload_optimizer == "cpu"
    assert resolved.offload_param is None
    assert resolved.optimizer_type == "AdamW"
    assert resolved.scheduler_type == "WarmupLR"
    assert resolved.deepspeed is not config
    assert config == {**config}  # the user's dict is not written to


def test_origins():
    config = base(zero_optimization={"stage": 1, "reduce_bucket_size": 5e8})
    resolved = resolve_config(config, world_size=2, overrides=["optimizer.params.lr=0.5", 'fp16={"enabled": false}'])
    assert resolved.origins["optimizer.type"] == "user"
    assert resolved.origins["optimizer.params.lr"] == "--set"
    assert resolved.origins["fp16.enabled"] == "--set"
    assert resolved.origins["gradient_clipping"] == "default"
    assert resolved.origins["train_micro_batch_size_per_gpu"].startswith("derived: ")
    assert resolved.deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert isinstance(resolved.deepspeed["zero_optimization"]["reduce_bucket_size"], int)
    assert "user" in resolved.origins["zero_optimization.reduce_bucket_size"]


def test_auto_as_hugging_face_users_know_it():
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    resolved = resolve_config(config, world_size=2, facts=RunFacts(hidden_size=64, total_steps=50))
    made = resolved.deepspeed
    params = made["optimizer"]["params"]
    assert params["lr"] == fields["learning_rate"].default
    assert params["betas"] == [fields["adam_beta1"].default, fields["adam_beta2"].default]
    assert params["eps"] == fields["adam_epsilon"].default
    assert params["weight_decay"] == fields["weight_decay"].default
    assert made["gradient_clipping"] == fields["max_grad_norm"].default
    assert made["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": params["lr"],
        "warmup_num_steps": 1,
        "total_num_steps": 50,
    }
    assert resolved.global_batch == 4
    zero = made["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert resolved.origins["optimizer.params.lr"].startswith("derived: Hugging Face's default")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"zero_optimization": {"stage": "auto"}}, "write 0, 1, 2 or 3"),
        ({"bf16": {"enabled": "auto"}}, "no flag --bf16"),
        ({"fp16": {"enabled": "auto"}}, "no flag --fp16"),
        ({"optimizer": {"type": "auto"}}, "write a name"),
        ({"steps_per_print": "auto"}, "has no meaning there"),
        ({"train_batch_size": "auto"}, "no batch size is given"),
    ],
)
def test_auto_that_cannot_be_filled(more, words):
    with pytest.raises(UserError, match=words):
        resolve_config(base(**more), world_size=1)


def test_auto_without_a_known_width_is_left_to_deepspeed():
    zero = {"stage": 2, "reduce_bucket_size": "auto"}
    resolved = resolve_config(base(zero_optimization=zero), world_size=1)
    assert "reduce_bucket_size" not in resolved.deepspeed["zero_optimization"]
    wider = resolved.with_facts(hidden_size=128)
    assert wider.deepspeed["zero_optimization"]["reduce_bucket_size"] == 128 * 128


def test_schedule_length_is_the_runs():
    scheduler = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}
    resolved = resolve_config(base(scheduler=scheduler), world_size=1)
    assert "total_num_steps" not in resolved.deepspeed["scheduler"]["params"]
    longer = resolved.with_total_steps(300)
    assert longer.deepspeed["scheduler"]["params"]["total_num_steps"] == 300
    assert longer.origins["scheduler.params.total_num_steps"] == "derived: the run's length"
    with pytest.raises(UserError, match="longer than the schedule's 5 steps"):
        resolved.with_total_steps(5)
    scheduler["params"]["total_num_steps"] = 100
    fixed = resolve_config(base(scheduler=scheduler), world_size=1).with_total_steps(300)
    assert fixed.deepspeed["scheduler"]["params"]["total_num_steps"] == 100


def test_all_problems_at_once():
    config = base(trian_batch=1, gradient_clipping=-1, log_level="loud", comms_logger={"prof": True})
    with pytest.raises(UserError) as refusal:
        resolve_config(config, world_size=1, facts=RunFacts(source="my.json"))
    assert len(refusal.value.problems) >= 4
    assert all(problem.startswith("my.json: ") for problem in refusal.value.problems)


def test_wrong_values_do_not_hide_contradictions_nor_invent_them():
    config = {
        "train_batch_size": "8",
        "optimizer": {"type": "AdamW", "params": {"lr": -1, "adam_w_mode": False}},
        "zero_optimization": {"stge": 3, "offload_param": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
        "tensor_parallel": {"autotp_size": 3},
    }
    with pytest.raises(UserError) as refusal:
        resolve_config(config, world_size=2)
    told = " ".join(refusal.value.problems)
    for words in (
        "stge",
        "lr is -1",
        'the text "8"',
        "both enabled",
        "adam_w_mode false",
        "2 processes cannot be split",
    ):
        assert words in told
    # The stage and the batch are unknown, not 0 and missing.
    assert len(refusal.value.problems) == 6


def test_effective_values_are_compared():
    resolved = resolve_config(base(bf16={"enabled": True}, zero_optimization={"stage": 2}), world_size=2)
    right = {
        "train_batch_size": 8,
        "gradient_clipping": 1,
        "zero_optimization.stage": 2,
        "bf16.enabled": True,
        "fp16.enabled": False,
        "optimizer.type": "adamw",
        "zero_optimization.offload_optimizer.device": "none",
        "tensor_parallel.autotp_size": 1,
    }
    assert resolved.compare_effective(right) == []
    differences = resolved.compare_effective({**right, "zero_optimization.stage": 0, "gradient_clipping": 0.0})
    assert len(differences) == 2
    assert "the configuration says 2, but DeepSpeed runs with 0" in " ".join(differences)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("a.b=1e-4", "a", {"b": 1e-4}),
        ("a=true", "a", True),
        ("a=null", "a", None),
        ("a=nvme", "a", "nvme"),
        ("a.b.c=[1, 2]", "a", {"b": {"c": [1, 2]}}),
        ('a={"x": 1}', "a", {"x": 1}),
        ("a=/path=with=equals", "a", "/path=with=equals"),
    ],
)
def test_overrides(override, key, value):
    assert apply_overrides({}, [override])[key] == value


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "train_batch_size.x=1", "a=NaN", "a=1e999"])
def test_wrong_overrides(override):
    with pytest.raises(UserError, match="--set"):
        apply_overrides({"train_batch_size": 8}, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "line 1, column 2: not valid JSON"),
        ('{"a": 1,\n}', "not valid JSON"),
        ('{"a": 1 // why\n}', "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": {"b": 1, "b": 2}, "c": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "not a JSON number"),
        ("[1]", "holds the list"),
        ("3", "one object"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_files_that_are_not_strict_json(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "binary")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_config(tmp_path / "bom.json") == {"a": 1}


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": 1.5},
        {"train_batch_size": True},
        {"train_batch_size": 10**400},
        {"zero_optimization": None, "train_batch_size": 0},
        {"zero_optimization": 3},
        {"optimizer": "AdamW"},
        {"optimizer": {"type": 3}},
        {"optimizer": {"type": "AdamW", "params": 3}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}},
        {"optimizer": {"type": "AdamW", "params": {"lr": float("nan")}}},
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "x"]}}},
        {"scheduler": {"type": ["WarmupLR"]}},
        {"scheduler": {"type": "WarmupLR", "params": []}},
        {"bf16": True},
        {"tensor_parallel": {"autotp_size": -1}},
        {"pipeline": {"stages": 0}},
        {"sequence_parallel_size": "two"},
        {"data_types": {"grad_accum_dtype": "fp8"}},
        {"": 1},
        {"a.b": 1},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stage": True}},
        {"zero_optimization": True},
    ],
    ids=lambda config: json.dumps(config)[:50],
)
def test_wrong_kinds_are_refused_and_never_crash(config):
    with pytest.raises(UserError):
        resolve_config({**base(), **config}, world_size=1)
