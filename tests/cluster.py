"""Hosts on one machine: network, pid, mount and uts namespaces, each with an ssh server and an /etc/hosts of its own.

    with build_cluster(tmp_path, 2) as cluster:               # node1 and node2 at 10.88.0.1 and .2, interface eth0
        cluster.run("node1", ["ssh", "node2", "hostname"])
        cluster.cut("node2"); cluster.mend("node2")           # its cable
        cluster.crash("node2"); cluster.boot("node2")         # its power

The file system is shared, but for /mnt, which is a host's own disk. Nothing outside is changed but names in /etc/netns,
which are removed. It needs root, and Linux that permits namespaces: `why_not()` says what is missing.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.launch import BIN, ROOT

_NETNS = Path("/etc/netns")
_NEEDED = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "/usr/sbin/sshd": "openssh-server"}
_SSHD = """Port 22
ListenAddress 0.0.0.0
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 50
"""
_SSH = """Host *
  IdentityFile /etc/ssh/id_ed25519
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SEARCH_PATH = f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@cache
def why_not(*programs: str) -> str | None:
    """Why no hosts can be made here (also for want of `programs`), or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for program, package in _NEEDED.items():
        if shutil.which(program) is None:
            return f"no {program}: apt-get install {package}"
    for program in programs:
        if shutil.which(program) is None:
            return f"no {program} on this machine"
    probe = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c"]
    commands = "ip link add name dstest0 type veth peer name dstest1 && ip link add name dsbr0 type bridge"
    done = subprocess.run([*probe, commands], capture_output=True, text=True, timeout=30)
    return None if done.returncode == 0 else f"namespaces are not permitted: {done.stderr.strip()}"


@dataclass
class Cluster:
    """Running hosts. folder: on the file system that all of them share."""

    folder: Path
    prefix: str
    network: str
    names: list[str]
    inits: dict[str, int] = field(default_factory=dict)  # host -> pid of its first process, as seen from outside

    def address(self, name: str) -> str:
        return f"{self.network}.{self.names.index(name) + 1}"

    def command(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """What runs `command` on a host, with the environment of an ssh login and this interpreter's programs."""
        words = {"HOME": str(self.folder / "home"), "TERM": "dumb", "USER": "root", "LOGNAME": "root"}
        words |= {"PATH": SEARCH_PATH, **(env or {})}
        inside = ["nsenter", "-t", str(self.inits[name]), "-n", "-u", "-p", "-m", f"--wd={ROOT}"]
        return [*inside, "env", "-i", *(f"{key}={value}" for key, value in words.items()), *command]

    def run(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess:
        """Run a command on a host to its end; it is killed, with all it started on this host, after timeout_s."""
        words = self.command(name, ["timeout", "-k", "5", str(timeout_s), *command], env)
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s + 10)

    def processes(self, name: str) -> list[str]:
        """Command lines of what runs on a host, but for its ssh server."""
        done = self.run(name, ["ps", "-eo", "args", "--no-headers"])
        return [
            line for line in done.stdout.splitlines() if "sshd" not in line and not line.startswith(("ps ", "timeout"))
        ]

    def cut(self, name: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port(name), "down")

    def mend(self, name: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port(name), "up")

    def limit(self, name: str, rate: str) -> None:
        """Bound what a host sends (`100mbit`). Raises CalledProcessError where the kernel cannot (no tbf)."""
        command = ["tc", "-n", self._namespace(name), "qdisc", "replace", "dev", "eth0", "root", "tbf"]
        subprocess.run([*command, "rate", rate, "burst", "256kb", "latency", "400ms"], check=True, capture_output=True)

    def crash(self, name: str) -> None:
        """Power off: every process on the host dies at once."""
        with suppress(ProcessLookupError):
            os.kill(self.inits.pop(name), signal.SIGKILL)

    def boot(self, name: str) -> None:
        log = self.folder / f"{name}.sshd.log"
        script = (
            f"hostname {name}; mkdir -p {self.folder}/{name}.disk /mnt; mount --bind {self.folder}/{name}.disk /mnt; "
            "mount -t tmpfs tmpfs /dev/shm; exec /usr/sbin/sshd -D -e"
        )
        alone = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script]
        with open(log, "w") as out:
            outer = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace(name), *alone],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        for _ in range(100):
            if "Server listening" in log.read_text():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"no ssh server on {name}: {log.read_text()}")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        self.inits[name] = int(children[0])

    def hostfile(self, slots: int = 1) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    @property
    def _switch(self) -> str:
        return f"{self.prefix}sw"

    def _namespace(self, name: str) -> str:
        return f"{self.prefix}{self.names.index(name) + 1}"

    def _port(self, name: str) -> str:
        return f"p{self.names.index(name) + 1}"

    def up(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        (self.folder / "home").mkdir()
        _keygen(self.folder / "id_ed25519")
        for name in self.names:
            self._wire(name)
            self.boot(name)

    def _wire(self, name: str) -> None:
        namespace, port, own = self._namespace(name), self._port(name), _NETNS / self._namespace(name)
        (own / "ssh").mkdir(parents=True)
        hosts = [f"{self.address(other)} {other}" for other in self.names]
        (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        # no DNS: c10d would wait for a name server
        (own / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        _keygen(own / "ssh" / "host_key")
        shutil.copy(self.folder / "id_ed25519", own / "ssh")
        shutil.copy(self.folder / "id_ed25519.pub", own / "ssh" / "authorized_keys")
        (own / "ssh" / "sshd_config").write_text(_SSHD)
        (own / "ssh" / "ssh_config").write_text(_SSH)
        _ip("netns", "add", namespace)
        _ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")

    def down(self) -> None:
        for name in list(self.inits):
            self.crash(name)
        time.sleep(0.2)
        for namespace in (*map(self._namespace, self.names), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(_NETNS / namespace, ignore_errors=True)
        with suppress(OSError):
            _NETNS.rmdir()


@contextmanager
def build_cluster(folder: Path, num_hosts: int = 2) -> Iterator[Cluster]:
    """`node1` .. `nodeN`, up while the context lasts. folder: new or empty, seen by all hosts."""
    folder.mkdir(parents=True, exist_ok=True)
    # by process, so that test runs do not collide
    prefix, network = f"ds{os.getpid()}n", f"10.{88 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    cluster = Cluster(folder, prefix, network, [f"node{i + 1}" for i in range(num_hosts)])
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
