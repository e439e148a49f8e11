"""A real Slurm of two nodes on one machine: slurmctld and two slurmd, in network namespaces, with files of its own.

Each daemon has its own processes and host name, so all that it started ends with it. Left out: GPUs (they are only
counted), cgroups and accounting. A job that is queued again waits for a minute (`cred_expire`), not for two.
"""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.nodes import ADDRESSES, two_nodes
from tests.fakes.runs import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "unshare")
CONF = """ClusterName=test
SlurmctldHost=node1({0})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=60
CredType=cred/munge
StateSaveLocation={place}/state
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmdSpoolDir={place}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
NodeName=node1 NodeAddr={0} CPUs=64 Gres=gpu:8
NodeName=node2 NodeAddr={1} CPUs=64 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=300 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
"""
DAEMONS = ("slurmctld", "slurmd", "slurmd")
APART = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
# What a daemon sees: its host name, the other node, and only its own processes.
BOX = """set -e
mount --bind "$1/hosts" /etc/hosts
mount -t proc none /proc
hostname "$2"
shift 2
exec "$@"
"""


class Cluster:
    """A Slurm that runs. `place` has its configuration and logs; `node` is the namespace of the first node."""

    def __init__(self, place: Path, node: str):
        self.place, self.node = place, node
        self.environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}

    def _run(self, *words: str) -> subprocess.CompletedProcess:
        inside = ["ip", "netns", "exec", self.node, *words]
        return subprocess.run(inside, env=self.environment, capture_output=True, text=True, timeout=60)

    def answers(self, *words: str) -> bool:
        """Whether a program of Slurm ends well."""
        return self._run(*words).returncode == 0

    def ask(self, *words: str) -> str:
        """What a program of Slurm prints."""
        done = self._run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What is known of a job. Takes its time, because who asks without a pause slows the job down."""
        time.sleep(0.3)
        found = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in found if "=" in word)


@contextmanager
def cluster(place: Path) -> Iterator[Cluster]:
    """Start one, in a directory. It ends with the block."""
    if os.geteuid():
        pytest.skip("Slurm of two nodes needs root")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"Slurm and munge are not installed: {', '.join(missing)}")
    for name in ("state", "node1", "node2"):
        (place / name).mkdir()
    files = {
        "slurm.conf": CONF.format(*ADDRESSES, place=place),
        "gres.conf": f"Name=gpu File={place}/gpu[0-7]\n",
        "cgroup.conf": f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={place}/state\n",
        "hosts": "127.0.0.1 localhost\n" + "".join(f"{a} node{k + 1}\n" for k, a in enumerate(ADDRESSES)),
        "munge.key": "a key of 32 bytes and a few more ",
    }
    for name, text in files.items():
        (place / name).write_text(text)
        (place / name).chmod(0o600 if name == "munge.key" else 0o644)
    for k in range(8):  # they have to be devices
        os.mknod(place / f"gpu{k}", stat.S_IFCHR, os.makedev(1, 3))
    kinds = ("key-file", "socket", "pid-file", "seed-file")
    munge = [f"--{kind}={place}/munge.{kind.removesuffix('-file')}" for kind in kinds]
    started = []

    def start(name: str, *command: str) -> None:
        environment = os.environ | {"PATH": path, "SLURM_CONF": str(place / "slurm.conf")}
        with (place / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    with two_nodes() as nodes:
        try:
            start("munged", "munged", "--foreground", "--force", *munge)
            for daemon, node, name in zip(DAEMONS, (nodes[0], *nodes), ("node1", "node1", "node2"), strict=True):
                who = ["-N", name] if daemon == "slurmd" else []
                words = ["ip", "netns", "exec", node, *APART, "bash", "-c", BOX, "box", str(place), name]
                start(f"{daemon}_{name}", *words, daemon, "-D", *who)
            made = Cluster(place, nodes[0])
            wait_until(lambda: made.answers("scontrol", "ping"))
            wait_until(lambda: made.ask("sinfo", "-h", "-p", "high", "-t", "idle", "-o", "%D").strip() == "2")
            yield made
        finally:
            for process in started:
                process.kill()
                process.wait()
