"""What follows from the facts of hosts and links: problems, each in one line that ends with what to do."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dstrain.launch.doctor.interfaces import is_loopback
from dstrain.launch.doctor.network import Link

Level = Literal["error", "warning"]

# GiB. Less on a disk than the first is a full one; a checkpoint takes 12 to 16 bytes a parameter.
_DISK_FULL, _DISK_LOW = 0.1, 5.0
_MEMORY_OF_IMPORTS = 0.4  # a rank, before it has a model
_SHM_OF_RANK = 66 / 1024  # DeepSpeed's shm_comm on CPU (0.19.8)
_SHM_OF_NCCL = 1.0
_CLOCK_S = 1.0
_SLOW_BYTES_PER_S = 100e6  # less than a link of 1 Gbit/s carries
_SLOW_SHARE = 0.25  # of the fastest link; hosts that compute meanwhile measure half
_FEW_FILES = 1024
_WHERE = {"output_dir": "--output_dir", "temp": "the folder for temporary files", "nvme_path": "nvme_path"}


@dataclass(frozen=True)
class Problem:
    """level: an error lets no run begin, or lets it train something else. check: what was looked at."""

    level: Level
    host: str  # one, or several with commas
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


def merge(problems: Sequence[Problem]) -> list[Problem]:
    """What several hosts have in common, in one line."""
    hosts_of: dict[tuple[Level, str, str], list[str]] = {}
    for problem in problems:
        hosts_of.setdefault((problem.level, problem.check, problem.text), []).append(problem.host)
    return [Problem(level, ", ".join(hosts), check, text) for (level, check, text), hosts in hosts_of.items()]


def judge_host(host: str, slots: int | None, facts: Mapping[str, Any]) -> list[Problem]:
    """Of one host. facts: as `probe.describe` gives them. slots: ranks that it takes, if known."""
    checks = (_packages, _devices, _memory, _disks, _limits, _left_behind, _ops)
    found = [(check.__name__.strip("_"), *line) for check in checks for line in check(facts, slots)]
    return [Problem(level, host, name.replace("_", " "), text) for name, level, text in found]


def size(gib: float) -> str:
    return f"{gib * 1024:.0f} MiB" if gib < 1 else f"{gib:.1f} GiB"


Lines = Iterator[tuple[Level, str]]


def _packages(facts: Mapping[str, Any], slots: int | None) -> Lines:
    if facts["missing"]:
        yield "error", f"its Python lacks {', '.join(facts['missing'])}: run `pip install -e .` in the checkout there"


def _devices(facts: Mapping[str, Any], slots: int | None) -> Lines:
    if facts["gpu_problem"]:
        yield "error" if "answer" in facts["gpu_problem"] else "warning", facts["gpu_problem"]
    gpus, cores = facts["gpus"], facts["cpu"]["cores"]
    if slots and gpus and slots > len(gpus):
        yield "error", f"slots={slots}, but it has {len(gpus)} GPUs: write slots={len(gpus)} into the hostfile"
    if slots and not gpus and slots > cores:
        yield "warning", f"slots={slots} on {cores} cores: ranks will take turns; write slots={cores} or less"
    for number, gpu in enumerate(gpus):
        name = f"GPU {number} ({gpu['name']})"
        if gpu["uncorrected_errors"]:
            yield (
                "error",
                f"{name} had {gpu['uncorrected_errors']} uncorrected memory errors since it was reset: "
                f"`nvidia-smi --gpu-reset -i {number}`, and leave the host out if they come back",
            )
        if gpu["throttled"]:
            yield "warning", f"{name} is slowed down ({', '.join(gpu['throttled'])}): look at its cooling and power"
        if gpu["processes"]:
            pids = " ".join(map(str, gpu["processes"]))
            yield "warning", f"{name} is in use by process {pids}: end it, unless it is a run beside this one"


def _memory(facts: Mapping[str, Any], slots: int | None) -> Lines:
    free, shm, ranks = facts["memory"]["free_gib"], facts["shm"], slots or 1
    if free < _MEMORY_OF_IMPORTS * ranks:
        yield "error", f"{free:.1f} GiB of memory free for {ranks} ranks: end what takes it"
    needed = _SHM_OF_NCCL if facts["gpus"] else _SHM_OF_RANK * ranks
    if shm["free_gib"] < needed:
        level: Level = "warning" if facts["gpus"] else "error"
        yield (
            level,
            f"/dev/shm has {size(shm['free_gib'])} free of {size(shm['size_gib'])}, and {ranks} ranks need "
            f"{size(needed)}: mount -o remount,size=8G /dev/shm (in a container: --shm-size 8g)",
        )


def _disks(facts: Mapping[str, Any], slots: int | None) -> Lines:
    for name, disk in facts["disks"].items():
        what = f"{_WHERE[name]} {disk['path']}"
        if disk["problem"]:
            yield "error", f"{what} cannot be written ({disk['problem']}): make room, or name another folder"
        elif disk["free_gib"] < _DISK_FULL:
            yield (
                "error",
                f"{what} is on a full disk ({size(disk['free_gib'])} free of {size(disk['size_gib'])}): "
                "make room, or name another folder",
            )
        elif disk["free_gib"] < _DISK_LOW and name != "temp":
            yield (
                "warning",
                f"{what} has {disk['free_gib']:.1f} GiB free: a checkpoint takes 12 to 16 bytes a parameter "
                "(`dstrain plan` says how much)",
            )


def _limits(facts: Mapping[str, Any], slots: int | None) -> Lines:
    files, locked = facts["limits"]["NOFILE"], facts["limits"]["MEMLOCK"]
    if files is not None and files < _FEW_FILES:
        yield "warning", f"a process may open only {files} files: raise nofile in /etc/security/limits.conf"
    if locked is not None and "nvme_path" in facts["disks"]:
        yield (
            "warning",
            f"a process may lock only {locked / 2**20:.0f} MiB of memory, and NVMe offload pins its buffers: raise "
            "memlock in /etc/security/limits.conf",
        )


def _left_behind(facts: Mapping[str, Any], slots: int | None) -> Lines:
    left = facts["left"]
    if left["processes"]:
        pids = " ".join(map(str, left["processes"]))
        yield "warning", f"ranks of a run are there: `kill {pids}`, unless they are of a run beside this one"
    if left["segments"]:
        yield (
            "warning",
            f"killed ranks left {size(left['segments_gib'])} in /dev/shm: `rm {' '.join(left['segments'])}`",
        )


def _ops(facts: Mapping[str, Any], slots: int | None) -> Lines:
    ops = facts["ops"]
    if ops is None:
        return
    for problem in ops["problems"]:
        yield "error", problem
    if ops["unbuilt"] and not ops["problems"]:
        names = ", ".join(name.removesuffix("Builder") for name in ops["unbuilt"])
        yield "warning", f"DeepSpeed's ops {names} are not built, so the first start waits for them: add --build"
    if ops["stale_locks"]:
        yield (
            "warning",
            f"dead builds left {' '.join(ops['stale_locks'])}: the next start, or --build, removes them",
        )


def compare(facts: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Between hosts, each with what most of them have. facts: by host."""
    found: list[Problem] = []
    if not facts:
        return found
    versions = {host: {**facts[host]["versions"], "code": facts[host]["code"]} for host in facts}
    for name in next(iter(versions.values())):
        usual, rest = _odd({host: version[name] for host, version in versions.items()})
        for value, hosts in rest.items():
            if name == "code":
                text = f"other sources of dstrain ({value}, elsewhere {usual}): bring all hosts to the same commit"
            elif value is None:  # `missing` says so
                continue
            else:
                remedy = "install the same Python" if name == "python" else f"pip install {name}=={usual}"
                text = f"{name} {value}, elsewhere {usual}: {remedy}"
            found.append(Problem("error", hosts, "same versions", text))
    _, rest = _odd({host: str([gpu["name"] for gpu in facts[host]["gpus"]] or facts[host]["cpu"]) for host in facts})
    for hosts in rest.values():
        text = "other devices than the rest: every step waits for the slowest; name hosts of one kind"
        found.append(Problem("warning", hosts, "same devices", text))
    return found


def _odd(values: Mapping[str, Any]) -> tuple[Any, dict[Any, str]]:
    """The most frequent value (the first of equals), and by each other value its hosts."""
    usual = Counter(values.values()).most_common(1)[0][0]
    rest: dict[Any, list[str]] = {}
    for host, value in values.items():
        if value != usual:
            rest.setdefault(value, []).append(host)
    return usual, {value: ", ".join(hosts) for value, hosts in rest.items()}


def judge_names(host: str, facts: Mapping[str, Any]) -> list[Problem]:
    """Where several hosts are to meet: the address at which each will listen."""
    network = facts["network"]
    there = ", ".join(name for name in network["interfaces"] if name != "lo") or "none"
    problems = []
    if wanted := network["wanted"]["GLOO_SOCKET_IFNAME"]:
        if network["gloo"] is None:
            problems.append(f"GLOO_SOCKET_IFNAME={wanted} is no interface of it: name one of {there}")
    elif network["gloo"] is None or is_loopback(network["gloo"]):
        resolved = "has no address" if network["gloo"] is None else f"is {network['gloo']}"
        problems.append(
            f"its own name {network['name']} {resolved} there, so no other host could reach its ranks (gloo): correct "
            f"/etc/hosts, or put GLOO_SOCKET_IFNAME={there.split(',')[0]} into .deepspeed_env"
        )
    if network["wanted"]["NCCL_SOCKET_IFNAME"] and not network["nccl"]:
        problems.append(
            f"NCCL_SOCKET_IFNAME={network['wanted']['NCCL_SOCKET_IFNAME']} matches none of its interfaces: {there}"
        )
    return [Problem("error", host, "interface", text) for text in problems]


def judge_port(host: str, facts: Mapping[str, Any], port: int) -> list[Problem]:
    """Where the ranks would meet. host: the first, on which rank 0 will run."""
    if facts["port_free"]:
        return []
    return [Problem("warning", host, "port", f"port {port} is taken: give the launcher another, --master_port N")]


def judge_sharing(seen: Mapping[str, Sequence[str]], first: str, path: str) -> list[Problem]:
    """seen: host -> the hosts whose file in the run folder is there too. first: one that left a file."""
    blind = [host for host, others in seen.items() if first not in others]
    if not blind:
        return []
    text = f"--output_dir {path} is not the folder that {first} has: name one on a file system that all hosts share"
    return [Problem("error", ", ".join(blind), "shared folder", text)]


def judge_links(links: Sequence[Link]) -> list[Problem]:
    found = []
    best = max((link.bytes_per_s for link in links), default=0.0)
    for link in links:
        hosts = " and ".join(link.hosts)
        if link.problem is not None:
            remedy = "open all TCP ports between the hosts, or put GLOO_SOCKET_IFNAME=... into .deepspeed_env"
            found.append(Problem("error", hosts, "network", f"{link.problem}: {remedy}"))
            continue
        if link.bytes_per_s < max(_SLOW_BYTES_PER_S, best * _SLOW_SHARE):
            rates = f"{link.bytes_per_s / 1e6:.0f} MB/s, where the fastest pair has {best / 1e6:.0f}"
            remedy = "look for a cable or port that is not what it should be, or name the fast interface"
            found.append(Problem("warning", hosts, "network", f"{rates}: {remedy}"))
        if abs(link.clock_s) > _CLOCK_S:
            text = f"their clocks differ by {abs(link.clock_s):.1f} s: apt-get install chrony on both"
            found.append(Problem("warning", hosts, "clock", text))
    return found
