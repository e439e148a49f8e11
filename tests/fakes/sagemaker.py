"""What SageMaker does around a training job: S3 and the request by moto, then containers made from the request.

moto says Completed at once. It starts nothing and makes no model, so that is done here. The containers have namespaces
of their own (files, processes, host name), but no image: python, torchrun and libraries are those of the tests, and
`pip` only notes what it was asked for. Left out: GPUs, EFA, CloudWatch, and a copy to S3 while the job runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.nodes import ADDRESSES

NEEDED = {
    "moto": "moto is not installed: pip install 'moto[s3,sagemaker]'",
    "sagemaker.train": "needs the extra sagemaker",
}
APART = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
APART += ["--map-root-user"] if os.geteuid() else []
BUCKET, REGION, ROLE = "mine", "us-east-1", "arn:aws:iam::123456789012:role/grpo"
# The first process of the container writes down its number outside, and becomes what the request asks for.
BOX = """set -e
read -r number _ < /proc/self/stat
mount -t tmpfs none "$1/opt"
mkdir "$1/opt/above" "$1/opt/work"
mount -t overlay none -o "lowerdir=/opt,upperdir=$1/opt/above,workdir=$1/opt/work" /opt
mkdir -p /opt/ml
mount --bind "$1/ml" /opt/ml
mount --bind "$1/hosts" /etc/hosts
mount -t proc none /proc
hostname "$2"
echo "$number" > "$1/number"
shift 2
exec "$@"
"""
PIP = """import os, sys
with open("/opt/ml/pip", "a") as file:
    print(os.getcwd(), *sys.argv[1:], file=file)
"""


@contextmanager
def cloud() -> Iterator[tuple]:
    """moto with a bucket. Gives (client of S3, list of the requests of CreateTrainingJob that are sent meanwhile)."""
    moto, _ = [pytest.importorskip(name, reason=reason) for name, reason in NEEDED.items()]
    import boto3
    from botocore.client import BaseClient

    requests, call = [], BaseClient._make_api_call

    def noted(client, name: str, request: dict):
        if name == "CreateTrainingJob":
            requests.append(request)
        return call(client, name, request)

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")  # moto does not simulate policies
        patch.setenv("AWS_DEFAULT_REGION", "")  # launch.py sets it; afterwards it is what it was
        patch.delenv("AWS_DEFAULT_REGION")
        patch.setattr(BaseClient, "_make_api_call", noted)
        s3 = boto3.client("s3", region_name=REGION)
        s3.create_bucket(Bucket=BUCKET)
        yield s3, requests


def parts_of(uri: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key.rstrip("/")


def download(s3, uri: str, place: Path) -> None:
    """Every object below an address, as SageMaker brings a channel or checkpoints."""
    bucket, prefix = parts_of(uri)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for item in page.get("Contents", []):
            file = place / item["Key"].removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, item["Key"], str(file))


def upload(s3, place: Path, uri: str) -> None:
    """Every file below a directory."""
    bucket, prefix = parts_of(uri)
    for file in (path for path in place.rglob("*") if path.is_file()):
        s3.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(place)}")


class Container:
    """One machine of a job. `ml` is its /opt/ml.

    Args:
        place: directory for it, which is made.
        request: of CreateTrainingJob.
        s3: client of the S3 that has what the request names.
        rank: which machine it is, from 0.
    """

    def __init__(self, place: Path, request: dict, s3, rank: int = 0):
        self.place, self.request, self.s3, self.host = place, request, s3, f"algo-{rank + 1}"
        self.ml, self.process = place / "ml", None
        for name in ("ml/model", "ml/output/data", "ml/input/config", "opt", "modules"):
            (place / name).mkdir(parents=True)
        channels = {channel["ChannelName"]: channel for channel in request["InputDataConfig"]}
        for name, channel in channels.items():
            download(s3, channel["DataSource"]["S3DataSource"]["S3Uri"], self.ml / "input" / "data" / name)
        (self.ml / "checkpoints").mkdir()
        download(s3, request["CheckpointConfig"]["S3Uri"], self.ml / "checkpoints")
        count = request["ResourceConfig"]["InstanceCount"]
        resources = {"current_host": self.host, "hosts": [f"algo-{k + 1}" for k in range(count)]}
        resources["network_interface_name"] = "eth0" if count > 1 else "lo"
        resources["current_instance_type"] = request["ResourceConfig"]["InstanceType"]
        configs = {"resourceconfig": resources, "inputdataconfig": channels}
        for name, value in (configs | {"hyperparameters": request["HyperParameters"]}).items():
            (self.ml / "input" / "config" / f"{name}.json").write_text(json.dumps(value))
        addresses = ADDRESSES if count > 1 else ["127.0.0.1"]
        known = [f"{address} algo-{k + 1}\n" for k, address in enumerate(addresses)]
        (place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))
        (place / "modules" / "pip.py").write_text(PIP)

    def start(self, node: str | None = None) -> subprocess.Popen:
        """Start it, in a network namespace or in this one. Standard output and error are the file `log`."""
        asked = self.request["AlgorithmSpecification"]
        command = [*asked["ContainerEntrypoint"], *asked["ContainerArguments"]]
        inside = ["ip", "netns", "exec", node] if node else []
        environment = {
            **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self.place)},
            **{"PYTHONPATH": str(self.place / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            **{"TRAINING_JOB_NAME": self.request["TrainingJobName"]} | self.request["Environment"],
        }
        with (self.place / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*inside, *APART, "bash", "-c", BOX, "box", str(self.place), self.host, *command],
                cwd="/", env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        return self.process

    @property
    def log(self) -> str:
        """What the container has printed so far."""
        return (self.place / "log").read_text()

    def stop(self, number: int) -> None:
        """A signal for its first process, as SageMaker sends one."""
        os.kill(int((self.place / "number").read_text()), number)

    def collect(self) -> None:
        """What SageMaker copies to S3: the checkpoints, and the model without compression."""
        upload(self.s3, self.ml / "checkpoints", self.request["CheckpointConfig"]["S3Uri"])
        output = f"{self.request['OutputDataConfig']['S3OutputPath']}/{self.request['TrainingJobName']}/output/model"
        upload(self.s3, self.ml / "model", output)
