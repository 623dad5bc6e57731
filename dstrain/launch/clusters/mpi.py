"""Hosts of a hostfile over Open MPI, under our supervisor.

`mpirun` itself, not `deepspeed --launcher openmpi`: that (0.19.8) ties MPI to the interface eth0.
"""

from dstrain.launch.clusters.description import COMMON, RunDescription, Written

TAKES = COMMON | {"hostfile", "cpus_per_proc", "env", "engine_args"}


def write(description: RunDescription) -> Written:
    env = {
        "MASTER_ADDR": description.hosts[0].name,
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": str(description.cpus_per_proc),
        **dict(description.env),
    }
    mpirun = ["mpirun", "--hostfile", str(description.hostfile), "-n", str(description.world_size)]
    # Binding a rank to a core, which is mpirun's default, would run all its threads there.
    mpirun += ["--bind-to", "none", "-x", "PATH"]
    for name, value in env.items():
        mpirun += ["-x", f"{name}={value}"]
    ranks = ["python", description.script, *description.flags]  # mpirun's names for their place are read by `Launch`
    return Written((*mpirun, *description.engine_args, *ranks), supervised=True)
