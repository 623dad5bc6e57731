"""One description of a run for every engine, and what an engine makes of it.

Each engine is a module here with `TAKES`, the fields that it obeys, and `write(description) -> Written`.
"""

import shlex
from dataclasses import dataclass, field

from dstrain.launch.hosts import Host

COMMON = frozenset({"max_restarts"})
# of the engines that find the hosts themselves
SCHEDULED = COMMON | {"name", "num_nodes", "num_procs_per_node", "cpus_per_proc", "use_cpu", "grace_s", "env"}


@dataclass(frozen=True)
class RunDescription:
    """script: dstrain/train.py as the hosts see it, and flags: its own. hosts: of the hostfile, where one is used.

    grace_s: what a run that is asked to stop gets to save and end. time_limit: [D-]HH:MM:SS, or None.
    engine_args: words handed on to sbatch, deepspeed or mpirun. claim: the volume of the run folder, where it exists.
    """

    script: str
    flags: tuple[str, ...]
    output_dir: str
    name: str
    max_restarts: int = 3
    num_nodes: int = 1
    num_procs_per_node: int = 1
    cpus_per_proc: int = 1
    use_cpu: bool = False
    grace_s: int = 300
    time_limit: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    engine_args: tuple[str, ...] = ()
    hostfile: str | None = None
    hosts: tuple[Host, ...] = ()
    kind: str = "Job"
    image: str = "dstrain:latest"
    namespace: str | None = None
    claim: str | None = None
    storage: str = "100Gi"
    mount: str = "/workspace/runs"

    @property
    def world_size(self) -> int:
        """Ranks over all hosts."""
        return sum(host.slots for host in self.hosts) or self.num_nodes * self.num_procs_per_node


@dataclass(frozen=True)
class Written:
    """files: path -> text, to be written before `command` starts. supervised: start it as `dstrain launch -- command`
    does, since the engine itself starts nothing again. trains: the command ends when the run does, with its exit code.
    """

    command: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    supervised: bool = False
    trains: bool = False


def quoted(words: list[str] | tuple[str, ...]) -> str:
    """A command as a shell takes it."""
    return shlex.join(words)
