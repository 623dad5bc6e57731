"""Hosts of a hostfile over ssh: DeepSpeed's own launcher with pdsh, under our supervisor."""

from dstrain.launch.clusters.description import COMMON, RunDescription, Written

TAKES = COMMON | {"hostfile", "engine_args"}


def write(description: RunDescription) -> Written:
    launcher = ["deepspeed", "--hostfile", str(description.hostfile), *description.engine_args]
    return Written((*launcher, description.script, *description.flags), supervised=True)
