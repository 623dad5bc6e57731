"""`dstrain env`: the variables that a hostfile run takes to its other hosts, written where DeepSpeed reads them.

    dstrain env --hostfile hostfile --dry_run
    dstrain env --hostfile hostfile --secret HF_TOKEN --secret WANDB_API_KEY

`deepspeed --hostfile` by itself hands on only what begins with PYTHON, UCX, MLFLOW, MV2 and, on GPUs, NCCL. It adds
each line of `.deepspeed_env` of the home folder, then of the working directory, where this command writes it.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import ExitCode, UserError
from dstrain.launch.hosts import read_hostfile
from dstrain.launch.travel import PLAIN, value_problem

# Names, and beginnings of names, of what libraries read on every host.
_CARRIED = (
    *("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "WANDB_", "COMET_", "TENSORBOARD_"),
    *("TORCH", "PYTORCH_", "TRITON_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "DS_", "LD_LIBRARY_PATH"),
    *("NCCL_", "GLOO_", "TP_SOCKET_IFNAME", "MASTER_PORT", "XDG_CACHE_HOME", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
_BY_ITSELF = ("PYTHON", "UCX", "MLFLOW", "MV2")  # deepspeed 0.19.8, launcher/runner.py: EXPORT_ENVS
# Each host's own, or the launcher's own.
_OF_ONE_HOST = {
    "CUDA_VISIBLE_DEVICES": "the launcher chooses the devices of each host: limit them by slots",
    "DS_ENV_FILE": "it names this very file",
}
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)|(^|_)(PASS|AUTH)(_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s]+:[^/@\s]+@")  # a password inside an address


@dataclass(frozen=True)
class Travel:
    """variables: what is written, in its order. left: secrets and variables of one host -> why they stay."""

    variables: dict[str, str]
    left: dict[str, str]
    others: list[str]  # names that no run needs elsewhere


def is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.search(name) or _SECRET_VALUE.search(value))


def choose(environment: Mapping[str, str], secrets: Iterable[str], main_host: str) -> Travel:
    """What of an environment travels. secrets: names that travel whatever they are. main_host: where rank 0 runs.

    Raises UserError for a secret that is not set, and for a value that would arrive as another one.
    """
    secrets = list(dict.fromkeys(secrets))
    problems = [f"--secret {name}: it is not set here" for name in secrets if name not in environment]
    variables, left, others = {"PATH": _own_path(environment.get("PATH", os.defpath))}, {}, []
    for name, value in sorted(environment.items()):
        if name == "PATH":
            continue
        if name not in secrets and not name.startswith(_CARRIED):
            if not name.startswith(_BY_ITSELF):
                others.append(name)
        elif name in _OF_ONE_HOST:
            left[name] = _OF_ONE_HOST[name]
        elif name not in secrets and is_secret(name, value):
            left[name] = f"it looks like a secret: add --secret {name} if the other hosts need it"
        elif problem := value_problem(value):
            problems.append(
                f"{name} has {problem}, which the shells of the other hosts change: change its value, or leave it out "
                f"with `env -u {name} dstrain env ...`"
            )
        else:
            variables[name] = value
    if problems:
        raise UserError(problems)
    variables["MASTER_ADDR"] = main_host  # read by ranks that mpirun starts; the pdsh launcher has its own
    return Travel(variables, left, others)


def _own_path(path: str) -> str:
    """PATH with this environment's programs first; folders whose names would not travel are left out."""
    folders = [str(Path(sys.executable).parent), *path.split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(folder for folder in folders if folder and PLAIN.fullmatch(folder)))


def read_env_file(path: Path) -> dict[str, str]:
    """As DeepSpeed reads it; a line without `=`, which stops the launcher, is left out."""
    if not path.exists():
        return {}
    pairs = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """Replace the file whole; nobody else can read it at any time."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("".join(f"{name}={value}\n" for name, value in variables.items()))
    temporary.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", required=True, help="the hosts of the run, as `NAME slots=N` lines")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="write this variable too; repeatable",
    )
    parser.add_argument("--dry_run", action="store_true", help="only show what would be written")


def run(args: argparse.Namespace) -> int:
    """Write `.deepspeed_env` into the working directory, and say what is in it. Raises UserError."""
    path = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))  # DeepSpeed's own name for another file
    names = [host.name for host in read_hostfile(args.hostfile)]
    if names[1:] and "localhost" in names:
        raise UserError(
            f"{args.hostfile} names localhost beside other hosts, for whom it is another one: write its name"
        )
    travel = choose(os.environ, args.secret, names[0])
    kept = {name: value for name, value in read_env_file(path).items() if name not in travel.variables}
    # What somebody has added by hand stays, but for secrets; what was carried before and is not set any more goes.
    gone = {n: "it is not set here" for n in kept if n.startswith(_CARRIED)}
    gone |= {n: f"set it here and add --secret {n}" for n, value in kept.items() if is_secret(n, value)}
    kept = {name: value for name, value in kept.items() if name not in gone}
    if not args.dry_run:
        write_env_file(path, {**kept, **travel.variables})
    done = "would write" if args.dry_run else "wrote"
    print(f"{done} {path.absolute()}, which deepspeed reads when it starts in this folder:")
    for name, value in {**kept, **travel.variables}.items():
        hidden = name in args.secret or is_secret(name, value)
        notes = ["added by hand"] * (name in kept)
        notes += ["with pdsh only: mpirun hands it on in quotes"] * (PLAIN.fullmatch(value) is None)
        print(f"  {name}={'(secret)' if hidden else value}" + "".join(f"   [{note}]" for note in notes))
    for name, reason in travel.left.items():
        print(f"left out {name}: {reason}")
    for name in gone.keys() - travel.left.keys():
        print(f"left out {name}, which the file had: {gone[name]}")
    print(f"left out {len(travel.others)} others: {' '.join(travel.others)}")
    if args.secret:
        print("deepspeed prints secrets with its command line (not with --quiet), and `ps` shows them on every host")
    if (home := Path.home() / path).exists() and home.resolve() != path.resolve():
        print(f"{home} is read too; where both name a variable, {path} wins")
    return ExitCode.FINISHED
