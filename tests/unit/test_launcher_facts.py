"""What DeepSpeed's launcher does to other runs (docs/deepspeed-facts.md)."""

from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import parse_args


def test_a_signal_to_the_pdsh_launcher_ends_every_deepspeed_job_of_that_python():
    """What it looks for on the hosts tells neither the script nor the port of this run."""
    args = parse_args(["--master_addr", "node1", "--master_port", "29777", "mine.py", "--output_dir", "mine"])
    runner = PDSHRunner(args, "d29ybGQ=")
    command, kill_command, _ = runner.get_cmd({}, {"node1": [0], "node2": [0]})
    assert any("29777" in word for word in command) and "mine.py" in command
    assert "pkill -f " in kill_command and "deepspeed.launcher.launc" in kill_command[-1]
    assert not any(word in " ".join(kill_command) for word in ("29777", "mine", "d29ybGQ="))


def test_every_run_meets_at_one_port_unless_told():
    assert parse_args(["a.py"]).master_port == parse_args(["b.py"]).master_port == 29500
