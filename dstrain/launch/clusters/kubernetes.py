"""Kubernetes: one pod a host, as an indexed Job with a headless Service, or as a TrainJob of Kubeflow's Trainer.

The first process of each container is `dstrain launch`: it takes the SIGTERM of an eviction for an agreed stop, and it
returns the run's own exit code, which torchrun does not, so that the Job can act on it.
"""

from typing import Any

import yaml

from dstrain.errors import ExitCode
from dstrain.launch.clusters.description import SCHEDULED, RunDescription, Written

TAKES = SCHEDULED | {"kind", "image", "namespace", "claim", "storage", "mount"}
KINDS = ("Job", "TrainJob")
_PORT = 29500
_USER = 10001  # of the Dockerfile
_HOPELESS = (ExitCode.USER_ERROR, ExitCode.NON_FINITE, ExitCode.VERIFY_FAILED)


def write(description: RunDescription) -> Written:
    """The manifest, as NAME.yaml in this folder, and the kubectl that applies it."""
    objects = [] if description.claim else [_claim(description)]
    if description.kind == "Job":
        objects += [_service(description), _job(description)]
    else:
        objects.append(_train_job(description))
    path = f"{description.name}.yaml"
    text = "---\n".join(yaml.safe_dump(thing, sort_keys=False, width=120) for thing in objects)
    return Written(("kubectl", "apply", "--filename", path), {path: text})


def _job(description: RunDescription) -> dict[str, Any]:
    container = {
        "name": "dstrain",
        "image": description.image,
        "command": _command(description),
        "env": _env(description),
        "ports": [{"containerPort": _PORT}],
        "resources": _resources(description),
        "volumeMounts": _mounts(description),
    }
    pod = {
        "subdomain": description.name,  # with the Service of this name: NAME-0.NAME is the first pod's address
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": description.grace_s,
        "securityContext": _security(),
        "volumes": _volumes(description),
        "containers": [container],
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [int(code) for code in _HOPELESS]}},
        # an agreed stop, and an eviction or preemption: not the run's fault, so no restart is used up
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [int(ExitCode.STOPPED)]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": description.num_nodes,
        "parallelism": description.num_nodes,
        "backoffLimitPerIndex": description.max_restarts,
        "maxFailedIndexes": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": _labels(description)}, "spec": pod},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(description), "spec": spec}


def _command(description: RunDescription) -> list[str]:
    """The Job's controller sets JOB_COMPLETION_INDEX; Kubernetes puts it into the words."""
    torchrun = [
        *("torchrun", "--nnodes", str(description.num_nodes), "--nproc_per_node", str(description.num_procs_per_node)),
        *("--node_rank", "$(JOB_COMPLETION_INDEX)"),
        *("--master_addr", f"{description.name}-0.{description.name}", "--master_port", str(_PORT)),
    ]
    script = [description.script, *(_literal(word) for word in description.flags)]
    return ["dstrain", "launch", "--max_restarts", "0", "--", *torchrun, *script]


def _literal(word: str) -> str:
    """A word in which Kubernetes finds no variable."""
    return word.replace("$(", "$$(")


def _service(description: RunDescription) -> dict[str, Any]:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # the ranks look for each other before any pod is ready
        "selector": _labels(description),
        "ports": [{"name": "rendezvous", "port": _PORT}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(description), "spec": spec}


def _train_job(description: RunDescription) -> dict[str, Any]:
    """Kubeflow's runtime `torch-distributed` tells torchrun the hosts by PET_* variables. Its Job knows nothing of exit
    codes, so `dstrain launch` restarts in the pod; the runtime replaces pods that are lost."""
    restarts = ["dstrain", "launch", "--max_restarts", str(description.max_restarts), "--", "torchrun"]
    trainer = {
        "image": description.image,
        "command": [*restarts, description.script, *(_literal(word) for word in description.flags)],
        "env": _env(description),
        "numNodes": description.num_nodes,
        "numProcPerNode": description.num_procs_per_node,
        "resourcesPerNode": _resources(description),
    }
    pod = {
        "terminationGracePeriodSeconds": description.grace_s,
        "securityContext": _security(),
        "volumes": _volumes(description),
        "containers": [{"name": "node", "volumeMounts": _mounts(description)}],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "dstrain.launch/clusters",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
    }
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer, "runtimePatches": [patch]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(description),
        "spec": spec,
    }


def _claim(description: RunDescription) -> dict[str, Any]:
    spec = {
        "accessModes": ["ReadWriteMany" if description.num_nodes > 1 else "ReadWriteOnce"],
        "resources": {"requests": {"storage": description.storage}},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _metadata(description), "spec": spec}


def _metadata(description: RunDescription) -> dict[str, Any]:
    where = {"namespace": description.namespace} if description.namespace else {}
    return {"name": description.name, **where, "labels": _labels(description)}


def _labels(description: RunDescription) -> dict[str, str]:
    return {"app.kubernetes.io/name": "dstrain", "app.kubernetes.io/instance": description.name}


def _env(description: RunDescription) -> list[dict[str, str]]:
    pairs = {"OMP_NUM_THREADS": str(description.cpus_per_proc), **dict(description.env)}
    return [{"name": name, "value": _literal(value)} for name, value in pairs.items()]


def _resources(description: RunDescription) -> dict[str, Any]:
    ranks = description.num_procs_per_node
    requests = {"requests": {"cpu": str(ranks * description.cpus_per_proc)}}
    return requests if description.use_cpu else {**requests, "limits": {"nvidia.com/gpu": str(ranks)}}


def _security() -> dict[str, Any]:
    return {"runAsNonRoot": True, "runAsUser": _USER, "fsGroup": _USER}


def _volumes(description: RunDescription) -> list[dict[str, Any]]:
    claim = description.claim or description.name
    # The ranks of a pod exchange tensors through /dev/shm, of which a container has 64 MiB.
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _mounts(description: RunDescription) -> list[dict[str, str]]:
    return [{"name": "runs", "mountPath": description.mount}, {"name": "shm", "mountPath": "/dev/shm"}]
