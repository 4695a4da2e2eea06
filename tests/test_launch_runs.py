"""The launch scripts, run with stand-ins for `ssh`, `srun`, `scontrol`, `scancel` and the trainer, which log what they
are given: who is started with what, and who is told to stop. No cluster is needed, or used.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchkit import LAUNCH, ROOT, documents, launched

from dsv3_book.train import finished


@pytest.fixture
def stage(tmp_path) -> Callable[..., tuple[subprocess.Popen, Path]]:
    """Starts a script with stand-ins on its PATH; gives the process, and the folder where they log."""
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    log.mkdir()
    processes = []

    def start(words: list[Any], programs: dict[str, str], **environment: str) -> tuple[subprocess.Popen, Path]:
        for name, text in programs.items():
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log)} | environment
        env["PYTHON"] = str(tools / "trainer")
        process = subprocess.Popen(
            list(map(str, words)),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            # What a shell runs in the background ignores SIGINT, and a script can't undo that for itself.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process, log

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


# A trainer that logs its words, trains until it is told to stop or to fail, and saves.
TRAINER = """
me=$LOG/${HOST:-$$}
trap 'echo saved > "$me.saved"; exit 1' TERM
printf '%s\\n' "$@" > "$me.words.part"; mv "$me.words.part" "$me.words"
for i in $(seq 600); do [ -e "$me.fail" ] && exit 7; [ -e "$me.end" ] && exit 0; sleep 0.05; done"""
# As the real one: it gives all its words to a shell, and what it reads to that shell's command.
SSH = """while [[ $1 == -* ]]; do shift 2; done
export HOST=$1; shift; exec sh -c "$*" """


def words_of(log: Path, host: str) -> list[str]:
    return (log / f"{host}.words").read_text().splitlines()


ARGUMENTS = ["--preset", "tiny", "--out", "/runs/it's new", "--prompt", 'a "b" $c', "--parallel.ep", "4"]


def on_hosts(stage: Any, **environment: str) -> tuple[subprocess.Popen, Path]:
    script = [LAUNCH / "ssh.sh", "host-a,host-b", "2", *ARGUMENTS]
    process, log = stage(script, {"ssh": SSH, "trainer": TRAINER}, **environment)
    until(lambda: all((log / f"{host}.words").exists() for host in ("host-a", "host-b")))
    return process, log


def test_ssh_starts_the_same_on_every_host(stage):
    process, log = on_hosts(stage, GLOO_SOCKET_IFNAME="eth7")
    assert words_of(log, "host-a") == words_of(log, "host-b")
    options = launched(words_of(log, "host-a")[2:], 2, 2)
    assert options.nnodes == "2" and options.rdzv_backend == "c10d" and options.rdzv_endpoint == "host-a:29400"
    assert options.training_script_args == ARGUMENTS  # quotes, blanks and dollars have come through two shells
    for host in ("host-a", "host-b"):
        (log / f"{host}.end").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_ssh_stops_all_when_one_fails(stage):
    process, log = on_hosts(stage)
    (log / "host-b.fail").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7 and "host-b ended with status 7: stopping the others" in said
    assert (log / "host-a.saved").exists() and not (log / "host-b.saved").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ssh_stops_all_when_it_is_stopped(stage, how):
    """Even by a kill that it can't answer."""
    process, log = on_hosts(stage)
    process.send_signal(how)
    until(lambda: all((log / f"{host}.saved").exists() for host in ("host-a", "host-b")))
    process.communicate(timeout=60)
    assert process.returncode == (1 if how != signal.SIGKILL else -signal.SIGKILL)


def test_ssh_that_reaches_nobody(stage):
    process, _ = stage([LAUNCH / "ssh.sh", "host-a,host-b", "2", *ARGUMENTS], {"ssh": "echo refused >&2; exit 255"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 255 and "host-a: refused" in said and "ended with status 255" in said


def test_ssh_without_enough_words():
    done = subprocess.run([LAUNCH / "ssh.sh", "host-a", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: " in done.stderr


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_CPUS_PER_TASK": "96",
}  # fmt: skip
STAND_INS = {
    "scontrol": '''echo "$@" >> "$LOG/scontrol"
        [ "$1 $2" != "show hostnames" ] || printf "node%s\\n" 1 2 3 4
        [ "$1 $2" != "show job" ] || cat "$LOG/job" 2>/dev/null || echo "   EndTime=Unknown PreemptTime=None"''',
    "srun": 'while [[ $1 == -* ]]; do shift; done; export HOST=step; "$@" & echo $! > "$LOG/step"; wait $!',
    "scancel": 'echo "$@" >> "$LOG/scancel"; kill -TERM "$(cat "$LOG/step")"',  # to the steps, not to the batch script
    "trainer": TRAINER,
}


def batch(stage: Any, *arguments: str) -> tuple[subprocess.Popen, Path]:
    submitted = SLURM | {"SLURM_SUBMIT_DIR": str(ROOT)}
    process, log = stage([LAUNCH / "slurm.sbatch", *arguments], STAND_INS, **submitted)
    until(lambda: (log / "step.words").exists() and (log / "step").exists())
    return process, log


def test_slurm_starts_a_trainer_that_fits(stage):
    process, log = batch(stage)
    options = launched(words_of(log, "step")[2:], 4, 8)
    assert options.nnodes == "4" and options.nproc_per_node == "8" and options.rdzv_backend == "c10d"
    assert options.rdzv_endpoint == "node1:24711" and options.rdzv_id == "4711-0"
    (log / "step.end").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "requeue" not in (log / "scontrol").read_text(), said


def test_slurm_takes_arguments_and_passes_a_failure_on(stage):
    process, log = batch(stage, *ARGUMENTS)
    assert words_of(log, "step")[-len(ARGUMENTS) :] == ARGUMENTS
    (log / "step.fail").touch()
    process.communicate(timeout=60)
    assert process.returncode == 7 and "requeue" not in (log / "scontrol").read_text()


def test_slurm_near_the_time_limit_saves_and_queues_again(stage):
    process, log = batch(stage)
    process.send_signal(signal.SIGUSR1)  # --signal=B:USR1@…: to the batch script alone
    out, _ = process.communicate(timeout=60)
    assert (log / "step.saved").exists() and (log / "scancel").read_text() == "--signal=TERM 4711\n"
    assert (log / "scontrol").read_text().splitlines()[-1] == "requeue 4711" and "goes back into the queue" in out


def test_slurm_pre_empted_queues_again(stage):
    """Pre-emption sends SIGTERM to the steps alone; a job that ends in its grace time isn't queued again by Slurm."""
    process, log = batch(stage)
    (log / "job").write_text("   StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T11:00:00 SuspendTime=None")
    os.kill(int((log / "step").read_text()), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (log / "step.saved").exists() and "goes back into the queue" in out
    assert (log / "scontrol").read_text().splitlines()[-1] == "requeue 4711"


def test_slurm_cancelled_waits_until_all_is_saved(stage):
    """A user's scancel sends SIGTERM to everything; the job is over."""
    process, log = batch(stage)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(int((log / "step").read_text()), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (log / "step.saved").exists() and "waiting for the trainers to save" in out
    assert "requeue" not in (log / "scontrol").read_text()


def test_finished(tmp_path, capsys):
    assert finished.main([str(tmp_path)]) == finished.AGAIN
    (tmp_path / "run.json").write_text('{"steps": 20}')
    for step, status in ((9, finished.AGAIN), (20, 0)):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        assert finished.main([str(tmp_path)]) == status
    assert "all 20 steps are done" in capsys.readouterr().out
    assert finished.main([]) == 2


def test_the_containers_command_tells_stopped_from_finished(stage, tmp_path):
    """The PyTorchJob's own command line, with its folder and torchrun replaced."""
    (job,) = documents(LAUNCH / "kubernetes" / "pytorchjob.yaml")
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    text = container["args"][0].replace("/shared/runs/v3-16b", shlex.quote(str(run)))
    programs = {"torchrun": TRAINER, "python": f'exec {sys.executable} "$@"'}
    for steps, status in ((20, finished.AGAIN), (10, 0)):
        (run / "run.json").write_text(f'{{"steps": {steps}}}')
        process, log = stage([*container["command"], text], programs, HOST=f"pod{steps}")
        until((log / f"pod{steps}.words").exists)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == status and (log / f"pod{steps}.saved").exists()
