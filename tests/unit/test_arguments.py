"""Flags: strict, repeatable, from the command line or a file, and every mistake one line that says what to write."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.arguments import GROUPS, IN_DEEPSPEED_JSON, Arguments, _fields, parse_arguments
from dstrain.errors import UserError
from tests.launch import TRAIN, environment


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        parse_arguments(list(argv))
    assert all("\n" not in problem for problem in refused.value.problems)
    return refused.value.problems


def test_defaults_are_those_of_hugging_face():
    args = parse_arguments([])
    assert args.run.seed == 42
    assert (args.run.max_steps, args.run.num_train_epochs) == (-1, 3.0)
    assert (args.run.save_steps, args.run.resume_from_checkpoint) == (500, "auto")
    assert args.data.train_file == []
    assert not args.model.trust_remote_code


def test_arguments_are_frozen_and_listed_whole():
    args = parse_arguments(["--seed", "7"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.run.seed = 8
    assert args.to_dict()["seed"] == 7
    assert args.to_dict().keys() == _fields().keys()


def test_no_name_is_in_two_groups():
    names = [f.name for cls in GROUPS.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) >= 30


def test_repeated_flags_append():
    args = parse_arguments(["--train_file", "a", "--train_file", "b", "--set", "x.y=1", "--set=z=2"])
    assert args.data.train_file == ["a", "b"]
    assert args.run.set == ["x.y=1", "z=2"]


def test_a_default_list_is_nobodys_to_change():
    parse_arguments([]).run.set.append("spoiled")
    assert parse_arguments([]).run.set == []


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], "auto"),
        (["--resume_from_checkpoint"], "auto"),
        (["--resume_from_checkpoint", "--seed", "1"], "auto"),
        (["--resume_from_checkpoint", "none"], "none"),
        (["--resume_from_checkpoint=runs/a/checkpoints/step_00000010"], "runs/a/checkpoints/step_00000010"),
    ],
)
def test_resume(argv, value):
    assert parse_arguments(argv).run.resume_from_checkpoint == value


@pytest.mark.parametrize("name", ["--deepspeed_config", "--deepspeed"])
def test_the_alias_of_the_configuration(name):
    assert parse_arguments([name, "f.json"]).run.deepspeed_config == "f.json"


@pytest.mark.parametrize("word", ["--local_rank=3", "--local-rank=3"])
def test_launchers_local_rank_may_come_first(word, tmp_path):
    (tmp_path / "f.yaml").write_text("max_steps: 4\n")
    args = parse_arguments([word, str(tmp_path / "f.yaml"), "--seed", "1"])
    assert (args.run.local_rank, args.run.max_steps, args.run.seed) == (3, 4, 1)


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["true"], True), (["1"], True), (["False"], False), (["no"], False)],
)
def test_switches(words, value):
    flags = ["--train_file", "a", "--max_steps", "5", "--streaming", *words]
    assert parse_arguments(flags).data.streaming is value


def test_bare_compile_means_by_layer():
    assert parse_arguments(["--compile"]).model.compile == "layer"
    assert parse_arguments(["--compile", "whole"]).model.compile == "whole"


def test_the_same_value_twice_is_no_contradiction():
    assert parse_arguments(["--seed", "3", "--seed", "3"]).run.seed == 3


WRONG = [
    (["--max_step", "3"], "unknown flag --max_step: did you mean --max_steps?"),
    (["--max-steps", "3"], "unknown flag --max-steps: did you mean --max_steps?"),
    (["-m", "3"], "unknown flag -m: see --help"),
    (["--eval_strategy", "epoch", "--eval_steps", "5"], "--eval_strategy epoch and --eval_steps are both given"),
    (["--early_stopping_patience", "2"], "--early_stopping_patience needs evaluations on the way: add --eval_steps N"),
    (["--load_best_model_at_end"], "--load_best_model_at_end needs evaluations on the way: add --eval_steps N"),
    (["--early_stopping_threshold", "0.1"], "--early_stopping_threshold needs --early_stopping_patience"),
    (["--label_smoothing_factor", "1"], "--label_smoothing_factor must be below 1: 0.1 is usual"),
    (["--seed"], "--seed has no value: write one after it"),
    (["--seed", "x"], "--seed is 'x': write a whole number"),
    (["--seed", "1.5"], "--seed is '1.5': write a whole number"),
    (["--seed", "-1"], "--seed is -1: the smallest value is 0"),
    (["--seed", "1", "--seed", "2"], "--seed is given twice with different values (1, 2): keep one"),
    (["--max_time", "nan"], "--max_time is 'nan': write a number"),
    (["--max_time", "inf"], "--max_time is 'inf': write a number"),
    (["--max_time", "0"], "--max_time is 0: write a positive number of seconds, or leave it out"),
    (["--streaming", "maybe"], "--streaming is 'maybe': write true or false"),
    (["--streaming", "--streaming", "false"], "--streaming is given twice with different values (true, false)"),
    (["--compile", "all"], "--compile is 'all': write one of layer, whole"),
    (["--report_to", "wandb"], "--report_to is 'wandb': write one of report, none"),
    (["--report_to", "none", "--report_to", "report"], "--report_to none and another --report_to are both given"),
    (["--output_dir", ""], "--output_dir is empty: write a text, or leave it out"),
    (["--block_size", "1"], "--block_size is 1: the smallest value is 2"),
    (["--train_file", "a", "b"], "unexpected word 'b': a flag takes one value; repeat the flag to give several"),
    (["--max_steps", "0"], "--max_steps is 0: write a positive number, or leave it out"),
    (["--max_steps", "-2"], "--max_steps is -2: the smallest value is -1"),
    (["--num_train_epochs", "0"], "--num_train_epochs is 0: write a positive number"),
    (["--max_steps", "5", "--num_train_epochs", "1"], "--max_steps and --num_train_epochs are both given"),
    (["--model_name_or_path", "a", "--config_name", "b"], "--model_name_or_path and --config_name are both given"),
    (["--model_name_or_path", "a", "--config_overrides", "n=1"], "--config_overrides changes a model trained from"),
    (["--dataset_name", "a", "--train_file", "b"], "--dataset_name and --train_file are both given"),
    (["--dataset_config_name", "a"], "--dataset_config_name needs --dataset_name"),
    (
        ["--text_column", "a", "--messages_column", "b"],
        "--text_column and --messages_column are both given, and say in",
    ),
    (
        ["--prompt_column", "a", "--prompt_template", "{b}", "--completion_column", "c"],
        "--prompt_column and --prompt_templ",
    ),
    (
        ["--messages_column", "a", "--completion_template", "{b}"],
        "--messages_column and --completion_template are both",
    ),
    (["--prompt_column", "a"], "a prompt needs a completion: give --completion_column or --completion_template too"),
    (["--completion_template", "{a}"], "a completion needs a prompt: give --prompt_column or --prompt_template too"),
    (["--bad_rows", "drop"], "--bad_rows is 'drop': write one of refuse, skip"),
    (["--learning_rate", "1"], "--learning_rate: it is optimizer.params.lr of the DeepSpeed JSON"),
    (["--learning_rate=0.1"], "write it there, or --set optimizer.params.lr=0.1"),
    (["--bf16"], "--bf16: it is bf16.enabled of the DeepSpeed JSON"),
    (["no_such_file.yaml"], "no_such_file.yaml cannot be read"),
]


@pytest.mark.parametrize(("argv", "line"), WRONG, ids=[" ".join(argv)[:50] for argv, _ in WRONG])
def test_a_mistake_is_one_line(argv, line):
    assert any(line in problem for problem in problems(*argv)), problems(*argv)


def test_all_problems_at_once():
    assert len(problems("--max_step", "3", "--seed", "x", "--block_size", "0", "--max_steps", "0")) == 4


def test_no_flag_of_ours_is_said_to_be_in_the_json():
    assert not IN_DEEPSPEED_JSON.keys() & _fields().keys()


def test_files(tmp_path):
    values = {"max_steps": 5, "train_file": ["a", "b"], "streaming": True, "max_time": 1.5, "set": "x=1"}
    (tmp_path / "f.json").write_text(json.dumps(values))
    (tmp_path / "f.yaml").write_text(
        "max_steps: 5\ntrain_file: [a, b]\nstreaming: yes\nmax_time: 1.5\nset: x=1\nseed:\n"
    )
    for name in ("f.json", "f.yaml"):
        args = parse_arguments([str(tmp_path / name)])
        assert {key: args.to_dict()[key] for key in values} == values | {"set": ["x=1"]}
        assert args.run.seed == 42


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "f.yaml").write_text("max_steps: 5\ntrain_file: [a, b]\n")
    args = parse_arguments([str(tmp_path / "f.yaml"), "--max_steps", "6", "--train_file", "c"])
    assert (args.run.max_steps, args.data.train_file) == (6, ["c"])


WRONG_FILES = [
    ("f.yaml", "max_step: 3\n", "unknown name max_step: did you mean max_steps?"),
    ("f.yaml", "max_steps: 3\nmax_steps: 4\n", "max_steps is given twice: keep one, or write a list"),
    ("f.json", '{"seed": 1, "seed": 2}', "seed is given twice: keep one, or write a list"),
    ("f.yaml", "max_steps: 3.7\n", "f.yaml: max_steps is 3.7: write a whole number"),
    ("f.yaml", "max_steps: true\n", "f.yaml: max_steps is True: write a whole number"),
    ("f.yaml", "seed: [1, 2]\n", "f.yaml: seed is [1, 2]: write a whole number"),
    ("f.yaml", "train_file: [a, null]\n", "f.yaml: train_file is None: write a text"),
    ("f.yaml", "set: {a: 1}\n", "f.yaml: set is {'a': 1}: write a text"),
    ("f.yaml", "streaming: maybe\n", "f.yaml: streaming is 'maybe': write true or false"),
    ("f.yaml", "a: [\n", "is not valid YAML"),
    ("f.json", "{", "is not valid JSON"),
    ("f.json", '{"max_time": NaN}', "NaN is no JSON number"),
    ("f.yaml", "- max_steps\n", "holds no table of flags: write lines such as `max_steps: 100`"),
    ("f.yaml", "", "holds no table of flags"),
]


@pytest.mark.parametrize(("name", "text", "line"), WRONG_FILES, ids=[line[:40] for _, _, line in WRONG_FILES])
def test_a_mistake_in_a_file_is_one_line(name, text, line, tmp_path):
    (tmp_path / name).write_text(text)
    assert any(line in problem for problem in problems(str(tmp_path / name)))


plain_text = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@given(
    seed=st.integers(0, 2**31),
    files=st.lists(plain_text, max_size=3),
    epochs=st.floats(1e-3, 1e3),
    packing=st.booleans(),
)
def test_what_goes_in_comes_out(seed, files, epochs, packing):
    argv = ["--seed", str(seed), "--num_train_epochs", repr(epochs), "--packing", str(packing)]
    argv += [word for name in files for word in ("--train_file", name)]
    args = parse_arguments(argv)
    assert isinstance(args, Arguments)
    assert (args.run.seed, args.run.num_train_epochs) == (seed, epochs)
    assert (args.data.packing, args.data.train_file) == (packing, files)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in _fields())


def run_entry(*argv: str) -> tuple[subprocess.CompletedProcess, float]:
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(TRAIN), *argv], capture_output=True, text=True, env=environment())
    return done, time.monotonic() - start


@pytest.mark.ops  # measured when no build runs beside it
def test_the_entry_refuses_at_once_without_torch(tmp_path):
    """Exit code 2, one line a problem, nothing written; torch alone would take longer than the limit of 2 s."""
    folder = tmp_path / "run"
    done, seconds = run_entry("--max_step", "3", "--seed", "x", "--output_dir", str(folder))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "dstrain: error: unknown flag --max_step: did you mean --max_steps?",
        "dstrain: error: --seed is 'x': write a whole number",
    ]
    assert not folder.exists()
    assert seconds < 2.0


def test_the_entry_does_not_import_torch_to_refuse():
    code = (
        "import runpy, sys\nsys.argv = ['train.py', '--max_step', '3']\n"
        f"try: runpy.run_path({str(TRAIN)!r}, run_name='__main__')\nexcept SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split("\n")[:2] == ["2", "[]"]
