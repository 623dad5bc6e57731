"""Hosts of a hostfile over ssh: DeepSpeed's own launcher with pdsh, under our supervisor."""

from dstrain.launch.clusters.description import COMMON, RunDescription, Written
from dstrain.launch.travel import check_words

TAKES = COMMON | {"hostfile", "engine_args"}


def write(description: RunDescription) -> Written:
    """Raises UserError for flags that pdsh would change."""
    launcher = ["deepspeed", "--hostfile", str(description.hostfile), *description.engine_args]
    command = (*launcher, description.script, *description.flags)
    check_words(command)
    return Written(command, supervised=True)
