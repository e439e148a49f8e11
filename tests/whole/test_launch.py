"""The files in `launch/`: what they ask for, and that a signal to the Slurm script saves, queues again and goes on."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from grpo.config import from_yaml, parse_args
from grpo.run.signals import STOPS
from tests.fakes import runs

LAUNCH = runs.ROOT / "launch"
SCRIPT = LAUNCH / "slurm.sh"
# In place of Slurm: two processes, which get the signals of srun; what is queued again stands in a file.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_NTASKS=2
for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
for pid in $pids; do while kill -0 $pid 2> /dev/null; do wait $pid; code=$?; done; done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in "show hostnames") echo 127.0.0.1; echo other;; requeue*) echo "$2" >> "$PLACE/requeued";;
"show job") echo "   PreemptEligibleTime=2026-11-30T10:00:00 PreemptTime=${PREEMPTED:-None}";; esac
"""
PYTHON = """#!/bin/bash
trap 'echo "saved $RANK" >> "$PLACE/saved"; exit 0' USR1
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$PLACE/started"
[ -n "$CODE" ] && exit "$CODE"
for i in {1..600}; do sleep 0.1; done
"""


def lines_of(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines()) if file.exists() else []


def submitted(place: Path, python: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """The script as Slurm starts it, with programs of ours in place of Slurm's."""
    programs = place / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "29017", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1", "PLACE": str(place)}
    given = os.environ | job | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | environment
    with (place / "slurm.out").open("a") as out:
        return subprocess.Popen(["bash", str(SCRIPT), *arguments], cwd=runs.ROOT, env=given, stdout=out, stderr=out)


def test_the_slurm_script_asks_for_as_many_processes_as_gpus_and_for_a_signal_that_is_known():
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert {"job-name", "nodes", "time", "cpus-per-task", "requeue"} <= found.keys()
    assert found["ntasks-per-node"] == found["gpus-per-node"] and found["open-mode"] == "append"
    to_script, name, seconds = re.fullmatch(r"(B:)(\w+)@(\d+)", found["signal"]).groups()
    assert to_script and signal.Signals[f"SIG{name}"] in STOPS and int(seconds) >= 120
    first = next(i for i, line in enumerate(SCRIPT.read_text().splitlines()) if line and not line.startswith("#"))
    assert "#SBATCH" not in "\n".join(SCRIPT.read_text().splitlines()[first:]), "Slurm reads them before any command"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preemption"])
def test_a_signal_reaches_every_process_and_the_job_is_queued_again(tmp_path, number):
    script = submitted(tmp_path, PYTHON, "--run_name", "two words")
    runs.wait_until(lambda: len(lines_of(tmp_path / "started")) == 2, timeout=60)
    script.send_signal(number)
    assert script.wait(timeout=60) == 0, lines_of(tmp_path / "slurm.out")
    same = f"2 127.0.0.1 {20_000 + 29_017 % 10_000} train.py --resume auto --run_name two words"
    assert lines_of(tmp_path / "started") == [f"0 0 {same}", f"1 1 {same}"]
    assert lines_of(tmp_path / "saved") == ["saved 0", "saved 1"] and lines_of(tmp_path / "requeued") == ["29017"]


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    script = submitted(tmp_path, PYTHON, CODE=str(code))
    assert script.wait(timeout=60) == code
    assert len(lines_of(tmp_path / "started")) == 2 and not (tmp_path / "requeued").exists()


def test_a_preemption_that_only_the_processes_are_told_is_queued_again(tmp_path):
    """Slurm with a GraceTime: they save and end well, and the job would be COMPLETED (tests/launch/test_slurm.py)."""
    assert submitted(tmp_path, PYTHON, CODE="0", PREEMPTED="2026-11-30T10:05:00").wait(timeout=60) == 0
    assert lines_of(tmp_path / "requeued") == ["29017"]


@pytest.mark.slow
def test_a_run_that_was_queued_again_equals_one_without_a_break(tmp_path):
    model, data = runs.save_digits(tmp_path / "model"), runs.write_problems(tmp_path / "data")
    python = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n'

    def argv(name: str) -> list[str]:
        return runs.flags(model, data, tmp_path, name, num_steps=30, checkpoint_every=0, resume="auto")

    script = submitted(tmp_path, python, *argv("cut"))
    runs.wait_until(lambda: (tmp_path / "cut" / "rollouts" / "step_000002.jsonl").exists())
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=runs.PATIENCE) == 0, (tmp_path / "slurm.out").read_text()
    assert lines_of(tmp_path / "requeued") == ["29017"] and not (tmp_path / "cut" / "final").exists()
    assert 2 <= len(runs.metrics(tmp_path / "cut")) < 30
    assert submitted(tmp_path, python, *argv("cut")).wait(timeout=runs.PATIENCE) == 0
    ranks = runs.start_train_ranks(argv("whole"), 2, tmp_path / "whole")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_slurm_script_is_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def job() -> dict:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def task() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_kubernetes_job_has_what_a_train_job_needs():
    found, trainer = job(), job()["spec"]["trainer"]
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert found["metadata"]["name"] and found["spec"]["runtimeRef"]["name"] == "torch-distributed"
    assert trainer["image"] and trainer["numNodes"] >= 2 and trainer["command"] == ["bash", "-c"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in trainer["env"]


def test_the_skypilot_task_has_what_a_task_needs():
    found = task()
    assert found["name"] and found["num_nodes"] >= 2 and found["setup"]
    assert re.fullmatch(r"\w+:\d+", found["resources"]["accelerators"])
    assert found["resources"]["job_recovery"]["max_restarts_on_errors"] >= 1
    assert found["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"  # others can not rename directories
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in found["run"]


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("kind", ["kubernetes", "skypilot"])
def test_both_start_torchrun_alike_with_options_that_exist(tmp_path, kind, node):
    """The command is run by bash with a torchrun that only says how it was called."""
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    of_cluster = {"PET_MASTER_ADDR": "head", "PET_NODE_RANK": str(node)}
    of_cluster |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    of_cluster |= {"SKYPILOT_NODE_IPS": "head\nother", "SKYPILOT_NODE_RANK": str(node)}
    command = job()["spec"]["trainer"]["args"][0] if kind == "kubernetes" else task()["run"]
    given = os.environ | of_cluster | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.check_output(["bash", "-c", command], env=given, text=True).splitlines()
    at = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    launch = dict(zip(words[:at:2], words[1:at:2], strict=True))
    assert (launch["--rdzv-backend"], launch["--rdzv-endpoint"]) == ("c10d", "head:29400")
    assert launch["--rdzv-conf"] == f"is_host={1 - node}" and int(launch["--max-restarts"]) >= 1
    options = [re.sub("^(/grpo/)?recipes/", f"{runs.ROOT}/recipes/", word) for word in words[at + 1 :]]
    config, recipe = parse_args(options), from_yaml(options[options.index("--recipe") + 1])
    changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(recipe, f.name)}
    assert changed == {"out_dir", "resume"} and (config.out_dir, config.resume) == ("/runs", "auto")


def test_kubeflow_reads_the_job():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow_trainer_api is not installed")
    read = models.TrainerV1alpha1TrainJob.from_dict(job())
    assert read.to_dict() == job()  # what it does not know it leaves out


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    read = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert read.num_nodes == task()["num_nodes"] and "/runs" in read.storage_mounts
