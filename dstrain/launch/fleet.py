"""Where a supervised start runs: on this host, or on the hosts of a hostfile, of which some may be lost.

Over a hostfile, every start is made on the hosts that answer at that time, and what a start leaves is swept from all of
them. The `deepspeed` runner is never sent a signal that it can catch: on SIGTERM and SIGINT it runs `pkill -f` on every
host, for every DeepSpeed job of this Python (deepspeed 0.19.8, launcher/runner.py, multinode_runner.py:145).
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dstrain.arguments import parse_arguments
from dstrain.errors import UserError
from dstrain.launch import processes
from dstrain.launch.asking import module_command
from dstrain.launch.hosts import (
    SSH_OPTIONS,
    Answer,
    Host,
    ask_all,
    is_this_host,
    read_hostfile,
    write_hostfile,
)
from dstrain.launch.words import HOSTFILE, find_script, flag_value, hostfile_of, launcher_of, with_flag
from dstrain.launch.worlds import holds, stored_global_batch
from dstrain.run_folder import RunFolder

LEFT_BEHIND_S = 30.0  # between the end of a run's part on one host and the end of the others
_LOOK_S = 5.0
_ANSWER_S = 30.0
# What else chooses hosts or ranks: a lost host would make these wrong.
_NOT_BESIDE_A_HOSTFILE = ("-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--no_ssh", "--node_rank")

Say = Callable[[str], None]


class OneHost:
    """All ranks are below this process."""

    environment: dict[str, str] | None = None
    has_lost_hosts = False

    def __init__(self, command: Sequence[str], folder: Path, say: Say):
        self.command = list(command)
        self._folder = folder
        self._say = say
        self._segments: set[Path] = set()

    def muster(self) -> list[str] | None:
        """The command of the next start; None where there is nothing to start on. Raises UserError."""
        self._segments = processes.shared_memory()
        return self.command

    def is_left_behind(self) -> bool:
        """Whether a part of the run has ended so long ago that nobody waits for it with reason."""
        return False

    def ask_to_stop(self, ranks: Sequence[int]) -> None:
        """An agreed stop, by a signal to one rank; what has not begun to train just ends. ranks: that train."""
        below = set(processes.descendants())
        training = [rank for rank in ranks if rank in below]
        processes.send(training[:1] or below, signal.SIGTERM)

    def clean_up(self, grace_s: float) -> None:
        """End what outlived its launcher, after so many seconds in which ranks save."""
        if killed := processes.end_descendants(grace_s):
            self._say(f"ended {killed} processes that outlived their launcher")
        for path in processes.remove_unmapped(processes.shared_memory() - self._segments):
            self._say(f"removed {path}, which a killed rank left")


class Fleet:
    """The hosts of `deepspeed --hostfile F ... SCRIPT ...`; script: where that is in `command`.

    smaller_config: the DeepSpeed JSON for when the hosts left cannot hold the degrees of the run's own.
    """

    def __init__(self, command: Sequence[str], script: int, folder: Path, say: Say, smaller_config: str | None = None):
        self._launcher, self._flags = list(command[: script + 1]), list(command[script + 1 :])
        self._script = os.path.basename(command[script])
        self._folder, self._say = folder, say
        self._smaller_config = smaller_config
        self._hostfile = flag_value(self._launcher, *HOSTFILE) or ""
        self._own = tempfile.TemporaryDirectory(prefix="dstrain_launch_")  # the run folder is for the run to begin
        self._hosts: list[Host] = []  # of the present start
        self._known: set[str] = set()  # segments that were there before it
        self._mustered = False
        self._looked_at = self._alone_since = 0.0
        self.has_lost_hosts = False
        # ssh connections of pdsh that notice a lost host, and never ask a person
        appended = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {' '.join(SSH_OPTIONS)}".strip()
        self.environment = os.environ | {"PDSH_SSH_ARGS_APPEND": appended}

    def muster(self) -> list[str] | None:
        """The command for the hosts that answer now; None if none does. Raises UserError.

        The first time it ends nothing: what it finds then is another start's. A run that has not begun needs them all.
        """
        listed = read_hostfile(self._hostfile)
        answers = self._ask(listed, None if not self._mustered else processes.ORPHANS_SAVE_S)
        silent = {answer.host: answer.problem for answer in answers if answer.problem}
        if not self._mustered:
            self._check_first(silent, answers)
        hosts = [host for host in listed if host.name not in silent]
        if not hosts:
            return None
        self._mustered = True
        self._known = {name for answer in answers for name in _left(answer)["segments"]}
        self._hosts, config = self._choose(hosts)
        self._tell(listed, silent, config)
        return self._command(listed, config)

    def _check_first(self, silent: dict[str, Any], answers: list[Answer]) -> None:
        """Raises UserError."""
        busy = [answer.host for answer in answers if _left(answer)["found"]]
        problems = [f"{self._folder} is being trained on {', '.join(busy)}: stop that run first"] if busy else []
        if not RunFolder(self._folder).metrics.exists():
            problems += [str(problem) for problem in silent.values()]
        if problems:
            raise UserError(problems)

    def _ask(self, hosts: Sequence[Host], grace_s: float | None) -> list[Answer]:
        """Sweep every host; one where that cannot be done counts as one that does not answer."""
        request = {"script": self._script, "output_dir": str(self._folder.resolve()), "known": sorted(self._known)}
        names = [host.name for host in hosts]
        command, timeout_s = module_command("dstrain.launch.sweep"), _ANSWER_S + (grace_s or 0.0)
        answers = ask_all(names, command, timeout_s=timeout_s, stdin=json.dumps(request | {"grace_s": grace_s}))
        return [answer if answer.problem or answer.exit_code == 0 else _failed(answer) for answer in answers]

    def _choose(self, hosts: list[Host]) -> tuple[list[Host], str | None]:
        """As many hosts as the degrees and the global batch allow, and the configuration if it isn't the run's own."""
        try:
            arguments = parse_arguments(self._flags).run
        except UserError:  # another script, with flags of its own
            return hosts, None
        own = arguments.deepspeed_config
        global_batch = stored_global_batch(self._folder)
        for config in filter(None, (own, self._smaller_config)):
            for number in range(len(hosts), 0, -1):
                world_size = sum(host.slots for host in hosts[:number])
                if holds(config, world_size, arguments.set, global_batch):
                    return hosts[:number], None if config == own else config
        return hosts, None  # the run itself says what is wrong

    def _tell(self, listed: list[Host], silent: dict[str, Any], config: str | None) -> None:
        idle = [host.name for host in listed if host not in self._hosts and host.name not in silent]
        ranks = sum(host.slots for host in self._hosts)
        parts = [
            f"starts {ranks} rank{'s' if ranks > 1 else ''} on {', '.join(host.name for host in self._hosts)}",
            *([f"with {config}"] if config else []),
            *([f"not on {', '.join(idle)}: degrees and batch do not divide by that many"] if idle else []),
            *[f"without {host} ({problem.removeprefix(f'{host} ')})" for host, problem in silent.items()],
        ]
        self._say("; ".join(parts))

    def _command(self, listed: list[Host], config: str | None) -> list[str]:
        reduced = Path(self._own.name, "hostfile")
        write_hostfile(reduced, self._hosts)
        launcher = with_flag(self._launcher, str(reduced), *HOSTFILE)
        if self._hosts[0] != listed[0]:  # DeepSpeed then asks the first host for its address
            launcher = with_flag(launcher, None, "--master_addr")
        if len(self._hosts) == 1 and not is_this_host(self._hosts[0].name):  # else the runner starts it here
            launcher.insert(1, "--force_multi")
        flags = self._flags
        if config is not None:
            flags = [
                *with_flag(with_flag(flags, None, "--deepspeed"), None, "--deepspeed_config"),
                "--deepspeed_config",
                config,
            ]
        if flag_value(flags, "--output_dir") is None:  # by which the sweep knows the run's processes
            flags = [*flags, "--output_dir", str(self._folder)]
        return [*launcher, *flags]

    def is_left_behind(self) -> bool:
        """pdsh waits for all its hosts; the ranks of the others may wait for a rank that will never come."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return False
        self._looked_at = now
        names = processes.names(processes.descendants())
        over_pdsh = any(name.startswith("pdsh") for name in names)  # pdsh.bin on Debian
        if not (over_pdsh and 0 < names.count("ssh") < len(self._hosts)):
            self._alone_since = now
        return now - self._alone_since > LEFT_BEHIND_S

    def ask_to_stop(self, ranks: Sequence[int]) -> None:
        """An agreed stop, by the file; what has not begun to train is swept away."""
        if ranks:
            (self._folder / "stop").touch()
        else:
            processes.end_descendants(0.0)

    def clean_up(self, grace_s: float) -> None:
        """On every host of the start: end its ranks, which save if they can, and then what started them."""
        answers = self._ask(self._hosts, grace_s)
        processes.end_descendants(0.0)
        self.has_lost_hosts = any(answer.problem for answer in answers)
        for answer in answers:
            left = _left(answer)
            if answer.problem:
                self._say(
                    f"{answer.problem}; what runs there ends by itself, since its connections to the others broke"
                )
            if left["killed"]:
                self._say(f"{answer.host}: ended {left['killed']} ranks that were left")
            if left["removed"]:
                self._say(f"{answer.host}: removed {', '.join(left['removed'])} from /dev/shm")


def build_place(command: Sequence[str], folder: Path, say: Say, smaller_config: str | None = None) -> OneHost | Fleet:
    """Where the command starts its ranks. Raises UserError."""
    hostfile, script = hostfile_of(command), find_script(command)
    if script is None or hostfile is None or all(is_this_host(host.name) for host in read_hostfile(hostfile)):
        if smaller_config is not None:
            raise UserError("--smaller_config is for a start over several hosts: deepspeed --hostfile F ... SCRIPT ...")
        return OneHost(command, folder, say)
    for name in _NOT_BESIDE_A_HOSTFILE:
        if any(word.split("=")[0] == name for word in launcher_of(command)):
            raise UserError(
                f"{name} cannot follow a lost host: write the hosts and their slots into {hostfile} instead"
            )
    return Fleet(command, script, folder, say, smaller_config)


def _left(answer: Answer) -> dict[str, Any]:
    return json.loads(answer.stdout) if not answer.problem else {"found": 0, "killed": 0, "removed": [], "segments": []}


def _failed(answer: Answer) -> Answer:
    last = answer.stderr.strip().splitlines()[-1:] or [f"exit code {answer.exit_code}"]
    return Answer(answer.host, answer.exit_code, "", "", f"{answer.host} cannot run dstrain ({last[0]})")
