"""Ray: a worker a rank, held and started again by Ray Train; `ray_driver` is the program that asks for it."""

import sys

from dstrain.launch.clusters.description import COMMON, RunDescription, Written

TAKES = COMMON | {"num_nodes", "num_procs_per_node", "cpus_per_proc", "use_cpu", "env"}


def write(description: RunDescription) -> Written:
    """The driver's command, for a host of the Ray cluster or `ray job submit`; one without a cluster begins its own."""
    driver = [sys.executable, "-m", "dstrain.launch.clusters.ray_driver", "--num_workers", str(description.world_size)]
    driver += ["--max_restarts", str(description.max_restarts), "--cpus_per_worker", str(description.cpus_per_proc)]
    driver += ["--gpus_per_worker", "0" if description.use_cpu else "1"]
    for name, value in description.env:
        driver += ["--env", f"{name}={value}"]
    return Written((*driver, "--", description.script, *description.flags), trains=True)
