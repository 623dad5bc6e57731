"""`dstrain launch --to ssh|mpi` over two hosts (`tests.cluster`)."""

import pytest

from dstrain.monitor.metrics import read_metrics
from tests import cluster, faults, launch, slurm
from tests.launch import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
OWN = {"ssh": [], "mpi": ["--engine_args=--allow-run-as-root"]}
PROGRAMS = {"ssh": "pdsh", "mpi": "mpirun"}


@pytest.mark.parametrize("engine", OWN)
def test_two_hosts_have_the_losses_of_one(engine, tmp_path):
    if why := cluster.why_not(PROGRAMS[engine]):
        pytest.skip(why)
    folder = tmp_path / "plain"
    plain = [*faults.flags(folder), "--max_steps", "10"]
    plain_run = launch.run(launch.TRAIN, *plain, launcher="torchrun", ranks=2, run_dir=folder / "run").check()
    flags = [*faults.flags(tmp_path / "two"), "--max_steps", "10"]
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
    losses = [row["loss"] for row in read_metrics(tmp_path / "two" / "run") if row["kind"] == "train"]
    assert losses == pytest.approx(plain_run.losses(), rel=1e-5) and len(losses) == 10
