"""What DeepSpeed's launcher does to other runs (docs/deepspeed-facts.md)."""

from deepspeed.launcher.runner import parse_args


def test_every_run_meets_at_one_port_unless_told():
    assert parse_args(["a.py"]).master_port == parse_args(["b.py"]).master_port == 29500
