"""What is compared before the first step."""

import pytest

from dstrain import run_folder
from dstrain.arguments import parse_arguments
from dstrain.data.build import check_same_data
from dstrain.errors import UserError
from dstrain.prepare import read_configuration


def test_hosts_with_different_data_are_named():
    check_same_data([("a", "1"), ("a", "1"), ("b", "1")])
    with pytest.raises(UserError, match="a and b have different training data: give every host the same"):
        check_same_data([("a", "1"), ("a", "1"), ("b", "2")])


def refusal_of_a_start(tmp_path) -> str:
    flags = ["--deepspeed_config", "ds_configs/zero2.json", "--config_name", "x", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError) as refusal:
        read_configuration(parse_arguments(flags))
    return str(refusal.value)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    needs = ["torch>=2", "no_such.package>=1", 'pytest>=8; extra == "test"', "nor-this"]
    monkeypatch.setattr(run_folder.metadata, "requires", lambda name: needs)
    assert run_folder.missing_packages() == ["no_such.package", "nor-this"]
    assert "this Python lacks nor-this: run `pip install" in refusal_of_a_start(tmp_path)


def test_mpirun_must_tell_where_rank_0_is(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert "run `dstrain env --hostfile F` before" in refusal_of_a_start(tmp_path)


def test_a_run_of_its_own_on_each_of_accelerates_machines_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert "--deepspeed_multinode_launcher standard" in refusal_of_a_start(tmp_path)
