"""Hosts of a hostfile over Open MPI, under our supervisor.

`mpirun` itself, not `deepspeed --launcher openmpi`: that (0.19.8) ties MPI to the interface eth0 and leaves the ranks
to find their place through mpi4py.
"""

from dstrain.launch.clusters.description import COMMON, RunDescription, Written, rank_command

TAKES = COMMON | {"hostfile", "cpus_per_proc", "env", "engine_args"}
_PORT = 29500


def write(description: RunDescription) -> Written:
    env = {
        "MASTER_ADDR": description.hosts[0].name,
        "MASTER_PORT": str(_PORT),
        "OMP_NUM_THREADS": str(description.cpus_per_proc),
        **dict(description.env),
    }
    ranks = rank_command(
        description,
        RANK="$OMPI_COMM_WORLD_RANK",
        LOCAL_RANK="$OMPI_COMM_WORLD_LOCAL_RANK",
        WORLD_SIZE="$OMPI_COMM_WORLD_SIZE",
        LOCAL_WORLD_SIZE="$OMPI_COMM_WORLD_LOCAL_SIZE",
    )
    mpirun = ["mpirun", "--hostfile", str(description.hostfile), "-n", str(description.world_size)]
    # Binding a rank to a core, which is mpirun's default, would run all its threads there.
    mpirun += ["--bind-to", "none", "-x", "PATH"]
    for name, value in env.items():
        mpirun += ["-x", f"{name}={value}"]
    return Written((*mpirun, *description.engine_args, *ranks), supervised=True)
