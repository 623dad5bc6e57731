"""`dstrain launch --to ssh|mpi` over two hosts (`tests.cluster`)."""

import pytest

from tests import cluster, slurm
from tests.launch import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
OWN = {"ssh": [], "mpi": ["--engine_args=--allow-run-as-root"]}
PROGRAMS = {"ssh": "pdsh", "mpi": "mpirun"}


@pytest.mark.parametrize("engine", OWN)
def test_two_hosts_have_the_losses_of_one(engine, tmp_path):
    if why := cluster.why_not(PROGRAMS[engine]):
        pytest.skip(why)
    losses = slurm.uninterrupted(tmp_path / "plain", 10)
    flags = slurm.training(tmp_path / "two", 10)
    with cluster.build_cluster(tmp_path / "hosts") as hosts:
        slurm.give_ops(hosts)
        env = slurm.user_environment()
        own = [*OWN[engine], "--hostfile", str(hosts.hostfile())]
        if engine == "mpi":
            own += [f"--env={name}={value}" for name, value in env.items()]
        else:
            env["PATH"] = cluster.SEARCH_PATH
            (hosts.folder / "home" / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in env.items()))
        words = ["dstrain", "launch", "--to", engine, "--max_restarts", "0", *own, "--", str(ROOT / "dstrain/train.py")]
        done = hosts.run("node1", [*words, *flags], env=env, timeout_s=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert not [line for name in hosts.names for line in hosts.processes(name) if "train.py" in line]
    own_losses = [row["loss"] for row in slurm.read_metrics(tmp_path / "two" / "run")]
    assert slurm.largest_difference(own_losses, losses) <= 1e-5
