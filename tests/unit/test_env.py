"""What travels to the other hosts of a hostfile run, and what does not."""

import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstrain.cli import main
from dstrain.errors import UserError
from dstrain.launch.env import choose, is_secret, read_env_file
from dstrain.launch.travel import check_words, value_problem, word_problem
from tests.launch import ROOT

BIN = str(Path(sys.executable).parent)
VALUES = [
    "",
    "a",
    "a b  c",
    "it's",
    "a;b|c&d",
    "*.txt",
    "~/x",
    "a#b",
    "a!b",
    "grüße",
    "50%",
    "(x) <y>",
    "[1, 2]",
    "{a,b}",
]
BROKEN_VALUES = ['say "x" y', "a$HOME", "`hostname`", "a\\\\b c", " a", "a\nB=c d"]
WORDS = ["a b", "it's so", 'say "x" y', "f *.md", "--set=a.b=[0.9,0.95]", "x#y", '{"a": 1}', "a;b c", "(x y)", "p!q r"]
BROKEN_WORDS = [
    "",
    'x"y',
    "it's",
    "$HOME",
    "e $HOME",
    "*.md",
    "j\\k",
    '{"a":1}',
    "a;b",
    "(x)",
    "~/x",
    "#c",
    "<b>",
    "o `id`",
]


@pytest.fixture(scope="module")
def pdsh_line():
    """The line that DeepSpeed makes for the shells of the other hosts: from flags and variables."""
    runner = pytest.importorskip("deepspeed.launcher.multinode_runner")

    def make(command: str, words: list[str], variables: dict[str, str]) -> str:
        pdsh = runner.PDSHRunner(SimpleNamespace(user_args=words, user_script=""), "")
        for entry in "".join(f"{name}={value}\n" for name, value in variables.items()).splitlines():
            pdsh.add_export(*entry.split("=", 1))
        exports = "".join(f"export {name}={value}; " for name, value in pdsh.exports.items())
        return exports + " ".join([command, *pdsh.user_arguments])

    return make


def arrived(line: str) -> str:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("value", [*VALUES, *BROKEN_VALUES], ids=repr)
def test_a_value_is_refused_where_a_shell_would_change_it(value, pdsh_line):
    line = pdsh_line("printenv V", [], {"V": value})
    assert (arrived(line) == value + "\n") == (value_problem(value) is None) == (value in VALUES)


@pytest.mark.parametrize("word", [*WORDS, *BROKEN_WORDS], ids=repr)
def test_a_word_is_refused_where_a_shell_would_change_it(word, pdsh_line):
    line = pdsh_line("printf '<%s>'", [word, "end"], {})
    assert (arrived(line) == f"<{word}><end>") == (word_problem(word) is None) == (word in WORDS)


def test_signs_of_pdsh_are_refused():
    assert value_problem("100%n") and word_problem("%h") and not word_problem("50%")


def test_names_of_secrets():
    secret = ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_CREDENTIALS", "HF_TOKENS_X", "hf_token"]
    assert [name for name in secret if not is_secret(name, "x")] == []
    assert not is_secret("TOKENIZERS_PARALLELISM", "false") and not is_secret("MKL_KEYBOARD", "x")
    assert is_secret("https_proxy", "http://me:word@proxy:3128") and not is_secret("https_proxy", "http://proxy:3128")


def test_what_travels():
    own = {
        "PATH": f"/usr/bin:{BIN}:/mnt/c/Program Files",
        "HOME": "/root",
        "PYTHONPATH": "x",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    asked = {"HF_HOME": "/data/hf", "WANDB_NOTES": "my run", "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "eth1"}
    asked |= {"NCCL_DEBUG": "INFO", "TORCH_EXTENSIONS_DIR": "/e", "DS_ACCELERATOR": "cpu", "HF_TOKEN": "t"}
    environment = {**own, **asked, "WANDB_API_KEY": "k"}
    travel = choose(environment, ["HF_TOKEN"], "node1")
    assert travel.variables == {"PATH": f"{BIN}:/usr/bin", **asked, "MASTER_ADDR": "node1"}
    assert travel.left.keys() == {"WANDB_API_KEY", "CUDA_VISIBLE_DEVICES"} and travel.others == ["HOME"]


def test_what_cannot_travel_is_refused():
    with pytest.raises(UserError) as refusal:
        choose({"PATH": "/bin", "HF_HOME": "a$b", "WANDB_NAME": 'an "x"'}, ["NO_SUCH"], "node1")
    assert [problem.split()[0] for problem in refusal.value.problems] == ["--secret", "HF_HOME", "WANDB_NAME"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    Path("hostfile").write_text("node7 slots=2\nnode8 slots=2\n")
    Path(".deepspeed_env").write_text("MINE=1\nHF_OLD=2\nMY_TOKEN=hidden\n")
    command = ["env", "--hostfile", "hostfile", "--secret", "HF_TOKEN"]
    before = Path(".deepspeed_env").read_text()
    assert main([*command, "--dry_run"]) == 0 and Path(".deepspeed_env").read_text() == before
    assert main(command) == 0
    said, written = capsys.readouterr().out, read_env_file(Path(".deepspeed_env"))
    assert "hidden" not in said and "HF_TOKEN=(secret)" in said and "left out MY_TOKEN" in said
    assert written["MINE"] == "1" and written["HF_TOKEN"] == "hidden" and written["MASTER_ADDR"] == "node7"
    assert written["HF_HOME"] == "/data/hf" and not {"HF_OLD", "MY_TOKEN"} & written.keys()
    assert stat.S_IMODE(Path(".deepspeed_env").stat().st_mode) == 0o600
    assert main(["env", "--hostfile", "none"]) == 2
    Path("hostfile").write_text("localhost slots=2\nnode8 slots=2\n")
    assert main(command) == 2 and "localhost beside other hosts" in capsys.readouterr().err


def test_a_supervised_start_over_pdsh_is_refused_where_its_words_would_change(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.write_text("node1 slots=1\nnode2 slots=1\n")
    one.write_text("node1 slots=1\n")
    flags = ["dstrain/train.py", "--set", 'fp16={"enabled":true}']
    with pytest.raises(UserError, match="YAML"):
        check_words(["deepspeed", "--hostfile", str(two), *flags])
    check_words(["deepspeed", f"--hostfile={two}", "--launcher=openmpi", *flags])
    check_words(["deepspeed", "--hostfile", str(one), *flags])
    check_words(["torchrun", *flags])
