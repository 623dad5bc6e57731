"""Wrong input of every kind: one clear line each, exit code 2, no traceback, and nothing written.

Each case starts the real `main` in a fresh process (forked from one that has the libraries imported). A case is
(id, changes to the right start, words that the line must hold). `ds` replaces keys of the DeepSpeed JSON by dotted name
(None removes one), `flags` come last on the command line, `files` are written into the case's folder `{d}` first.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.distributed import parity
from tests.launch import TRAIN, run_command

DS = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}


def case(
    name: str, *words: str, ds: dict | None = None, flags: str = "", files: dict[str, Any] | None = None, raw=None
):
    return pytest.param(ds or {}, flags, files or {}, raw, words, id=name)


def text(contents: str) -> dict[str, str]:
    return {"t.txt": contents}


CASES = [
    # the DeepSpeed JSON
    case("json_missing_file", "nowhere.json", flags="--deepspeed_config {d}/nowhere.json"),
    case("json_broken", "line 1", raw='{"train_batch_size": 4,'),
    case("json_is_a_list", "object", raw="[1, 2]"),
    case("json_duplicate_key", "train_batch_size", raw='{"train_batch_size": 4, "train_batch_size": 8}'),
    case("json_nan", "NaN", raw='{"train_batch_size": 4, "gradient_clipping": NaN}'),
    case("key_misspelt", "did you mean", "zero_optimization", ds={"zero_optimisation": {"stage": 1}}),
    case("nested_key_misspelt", "did you mean", "stage", ds={"zero_optimization.stag": 2}),
    case(
        "key_in_ignored_block",
        "activation_checkpointing",
        ds={"activation_checkpointing": {"partition_activation": True}},
    ),
    case("key_removed", "elasticity", ds={"elasticity": {"enabled": True}}),
    case("string_for_number", "train_batch_size", ds={"train_batch_size": "four"}),
    case("fractional_batch", "train_batch_size", ds={"train_batch_size": 4.5}),
    case("negative_batch", "train_batch_size", ds={"train_batch_size": -4}),
    case("no_batch", "no batch size", ds={"train_batch_size": None}),
    case("batch_does_not_divide", "3", ds={"train_micro_batch_size_per_gpu": 3}),
    case(
        "batch_contradicts",
        "gradient_accumulation_steps",
        ds={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    ),
    case("negative_lr", "lr", ds={"optimizer.params.lr": -1.0}),
    case("lr_string", "lr", ds={"optimizer.params.lr": "fast"}),
    case("optimizer_misspelt", "AdamW", ds={"optimizer.type": "AdmaW"}),
    case("optimizer_parameter_misspelt", "weight_decay", ds={"optimizer.params.weight_decy": 0.1}),
    case("no_optimizer", "optimizer", ds={"optimizer": None}),
    case("scheduler_misspelt", "WarmupCosineLR", ds={"scheduler": {"type": "WarmupCosinLR", "params": {}}}),
    case(
        "scheduler_parameter_misspelt",
        "warmup_num_steps",
        ds={"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
    ),
    case("stage_4", "stage", ds={"zero_optimization.stage": 4}),
    case("stage_auto", "auto", ds={"zero_optimization.stage": "auto"}),
    case("offload_param_at_stage_2", "offload_param", ds={"zero_optimization.offload_param": {"device": "cpu"}}),
    case(
        "offload_optimizer_at_stage_0",
        "offload_optimizer",
        ds={"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
    ),
    case(
        "nvme_optimizer_at_stage_2",
        "nvme",
        ds={"zero_optimization.offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
    ),
    case("hpz_at_stage_2", "zero_hpz_partition_size", ds={"zero_optimization.zero_hpz_partition_size": 2}),
    case("bf16_and_fp16", "bf16", "fp16", ds={"fp16": {"enabled": True}}),
    case("fp16_on_cpu", "fp16", ds={"bf16": None, "fp16": {"enabled": True}}),
    case("pipeline_with_stage_2", "pipeline", ds={"pipeline": {"stages": 2}}),
    case("degrees_do_not_divide", "autotp_size", ds={"tensor_parallel": {"autotp_size": 3}}),
    case("block_without_its_flag", "--compile", ds={"compile": {"deepcompile": True}}),
    case("negative_clipping", "gradient_clipping", ds={"gradient_clipping": -1}),
    # flags
    case("flag_unknown", "--learning_rate", flags="--learning_rate 1e-4"),
    case("flag_abbreviated", "did you mean --max_steps", flags="--max_step 3"),
    case("flag_not_a_number", "--max_steps", flags="--max_steps many"),
    case("flag_negative", "--seed", flags="--seed -1"),
    case("flag_too_small", "--block_size", flags="--block_size 1"),
    case("flag_twice", "--seed", flags="--seed 1 --seed 2"),
    case("flag_word_too_many", "extra", flags="--logging_steps 1 extra"),
    case("flag_choice", "--compile", flags="--compile everything"),
    case("flag_zero_steps", "--max_steps", flags="--max_steps 0"),
    case("two_models", "--model_name_or_path", flags="--model_name_or_path {d}"),
    case("two_sources_of_data", "--dataset_name", flags="--dataset_name x --train_file {d}/t.txt", files=text("x")),
    case("set_unknown_key", "did you mean", flags="--set zero_optimization.stagee=1"),
    case("set_without_value", "--set", flags="--set zero_optimization.stage"),
    # the model
    case("model_file_missing", "nowhere.json", flags="--config_name {d}/nowhere.json"),
    case("model_folder_without_config", "config.json", flags="--config_name {d}"),
    case("model_type_misspelt", "llama", flags="--config_name {d}/m.json", files={"m.json": '{"model_type": "lama"}'}),
    case("model_file_broken", "m.json", flags="--config_name {d}/m.json", files={"m.json": "{"}),
    case("model_not_causal", "causal", flags="--config_name {d}/m.json", files={"m.json": '{"model_type": "vit"}'}),
    case("override_misspelt", "hidden_size", flags="--config_overrides hiden_size=32"),
    case("attention_unknown", "attn_implementation", flags="--attn_implementation flashy"),
    case("block_longer_than_positions", "--block_size", "256", flags="--block_size 512"),
    case("tokenizer_missing", "nowhere", flags="--tokenizer_name {d}/nowhere"),
    case("tokenizer_too_large", "vocab_size", flags="--config_overrides vocab_size=100"),
    case("heads_do_not_divide", "head", flags="--config_overrides num_attention_heads=5"),
    case("export_folder_taken", "--export", "new or empty", flags="--export {d}"),
    # the data
    case("data_missing", "nowhere.txt", flags="--train_file {d}/nowhere.txt"),
    case("data_glob_empty", "*.txt", flags="--train_file {d}/*.txt"),
    case("data_empty", "t.txt", flags="--train_file {d}/t.txt", files=text("")),
    case("data_not_utf8", "t.txt", flags="--train_file {d}/t.txt", files={"t.txt": b"\xff\xfe\x00abc"}),
    case(
        "data_broken_line",
        "t.jsonl:2",
        flags="--train_file {d}/t.jsonl",
        files={"t.jsonl": '{"text": "a"}\n{"text": \n'},
    ),
    case(
        "data_column_missing",
        "body",
        flags="--train_file {d}/t.jsonl --text_column txt",
        files={"t.jsonl": '{"body": "a"}\n'},
    ),
    case(
        "data_wrong_type",
        "t.jsonl",
        flags="--train_file {d}/t.jsonl",
        files={"t.jsonl": '{"text": "a"}\n{"text": 3}\n'},
    ),
    case(
        "data_truncated_gz",
        "t.txt.gz",
        flags="--train_file {d}/t.txt.gz",
        files={"t.txt.gz": gzip.compress(b"abc" * 999)[:20]},
    ),
    case("data_is_binary", "t.pdf", flags="--train_file {d}/t.pdf", files={"t.pdf": b"%PDF-1.7 \xff\xfe\x80"}),
    case("dataset_unknown", "dataset_name", flags="--dataset_name {d}/nowhere"),
    # folders
    case("output_is_a_file", "--output_dir", flags="--output_dir {d}/t.txt", files=text("x")),
    case("output_holds_other_files", "--output_dir", flags="--output_dir {d}/full", files={"full/thesis.tex": "x"}),
    case("output_with_broken_run_json", "run.json", flags="--output_dir {d}/full", files={"full/run.json": "{"}),
    case("checkpoint_missing", "nowhere", flags="--resume_from_checkpoint {d}/nowhere"),
]


def write_inputs(folder: Path, ds: dict, files: dict[str, Any], raw: str | None) -> None:
    config = json.loads(json.dumps(DS))
    for key, value in ds.items():
        *parents, last = key.split(".")
        block = config
        for parent in parents:
            block = block[parent]
        if value is None:
            del block[last]
        else:
            block[last] = value
    (folder / "ds.json").write_text(json.dumps(config) if raw is None else raw)
    (folder / "model.json").write_text(json.dumps(parity.LLAMA))
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def arguments(folder: Path, flags: str) -> list[str]:
    """The right start, with a flag of the case in place of its own."""
    wrong = flags.format(d=folder).split()
    right = {
        "--deepspeed_config": f"{folder}/ds.json",
        "--config_name": f"{folder}/model.json",
        "--output_dir": f"{folder}/run",
        "--max_steps": "2",
    }
    kept = [word for flag, value in right.items() if flag not in wrong for word in (flag, value)]
    return kept + wrong


def start(folder: Path, argv: list[str]) -> tuple[int, str, str]:
    (process,) = forked.start(argv, 1, folder)
    forked.finish([process], 60)
    return process.exitcode, (folder / "rank0.out").read_text(), (folder / "rank0.err").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("ds", "flags", "files", "raw", "words"), CASES)
def test_wrong_input(ds, flags, files, raw, words, tmp_path):
    inputs, logs = tmp_path / "in", tmp_path / "logs"
    inputs.mkdir()
    logs.mkdir()
    write_inputs(inputs, ds, files, raw)
    before = snapshot(inputs)
    exit_code, out, err = start(logs, arguments(inputs, flags))
    assert exit_code == 2, f"{exit_code}\n{out[-2000:]}\n{err[-4000:]}"
    lines = err.strip().splitlines()
    assert lines and all(line.startswith("dstrain: error: ") for line in lines), err
    assert "Traceback" not in err + out
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert snapshot(inputs) == before, "a refused start wrote something"
    assert not (inputs / "run").exists(), "a refused start made a run folder"


def test_there_are_sixty():
    assert len(CASES) >= 60


def test_all_problems_are_told_at_once(tmp_path):
    write_inputs(tmp_path, {"zero_optimisation": {}, "optimizer.params.lr": -1.0}, {}, None)
    argv = [str(TRAIN), *arguments(tmp_path, "--set bf16.enable=true --resume_from_checkpoint none")]
    result = run_command([str(Path(os.sys.executable)), *argv]).check(2)
    assert len(result.stderr.strip().splitlines()) == 3, result.stderr
    assert result.seconds < 2.0


def test_another_model_data_or_seed_is_refused_by_name(tmp_path):
    write_inputs(tmp_path, {}, {"a.txt": "to be or not to be " * 300, "b.txt": "that is the question " * 300}, None)
    right = f"--train_file {tmp_path}/a.txt --block_size 64 --max_eval_batches 1"
    assert start(tmp_path, arguments(tmp_path, right))[0] == 0
    kept = snapshot(tmp_path / "run")
    for flags, name in (
        (right + " --seed 7", "seed"),
        (right.replace("a.txt", "b.txt"), "data"),
        (right + " --config_overrides num_hidden_layers=1", "model"),
        (right + " --set train_batch_size=8", "train_batch_size"),
    ):
        exit_code, _, err = start(tmp_path, arguments(tmp_path, flags))
        assert exit_code == 2, err
        assert name in err, err
        assert snapshot(tmp_path / "run") == kept, f"a refused start with another {name} changed the run"
