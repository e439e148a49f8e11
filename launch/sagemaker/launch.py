"""Start a run as a training job of Amazon SageMaker, with the extra `sagemaker`.

    python -m launch.sagemaker.launch --recipe recipes/gsm8k-qwen2.5-0.5b.yaml --role arn:aws:iam::...:role/NAME
        --bucket MINE --spot --dry_run -- --run_name qwen --num_steps 100

Words after `--` are options of train.py. They are checked here, before anything costs money. The job gets this
repository as it lies on the disk. The same command, given again, continues the run.
Left out: what happens in the container (`entry.py`), prices, and making a role.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo import options
from grpo.config import Config, parse_args
from grpo.options import option
from grpo.run.directory import place_of

ROOT = Path(__file__).resolve().parents[2]
IMAGE = (
    "763104351884.dkr.ecr.{region}.amazonaws.com/"
    "huggingface-pytorch-training:2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04"
)
INSTALL = "python -m pip install --quiet '.[math,gym]' && "
RUN = (
    "exec torchrun --nnodes $SM_HOST_COUNT --nproc_per_node $(( SM_NUM_GPUS > 0 ? SM_NUM_GPUS : 1 )) "
    "--node_rank $SM_CURRENT_HOST_RANK --master_addr $SM_MASTER_ADDR --master_port $SM_MASTER_PORT "
    "--shutdown-timeout 110 -m launch.sagemaker.entry"
)
"""SageMaker kills the container 120 s after SIGTERM; a step has to end, and its checkpoint to be copied, before."""
STAYS = [".git", ".venv", "__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache", "runs", "tests", "bench", "docs"]
"""Names that are not uploaded."""
METRICS = {
    **{name: rf"  {name} (\S+)" for name in ("reward", "length", "truncated", "entropy", "kl", "grad")},
    "eval:accuracy": r"  eval/accuracy (\S+)",
    "seconds_per_step": r"  (\S+) s  left ",
}
"""{metric in CloudWatch: expression that finds it in a step's line}."""


@dataclass(frozen=True)
class Job:
    """Start a run as a training job of Amazon SageMaker. Options of train.py follow after `--`."""

    recipe: str = option()
    """YAML file of options, in this repository."""
    role: str = option()
    """ARN of the role that the job has; it reads and writes the bucket."""
    bucket: str = option()
    """Name of the S3 bucket for code, data, checkpoints and model; the SDK makes it if there is none."""
    region: str | None = None
    """AWS region; None: that of the AWS configuration."""
    instance_type: str = "ml.g5.2xlarge"
    """Machine, with a GPU for all but small models."""
    instance_count: int = option(1, ">= 1")
    """Number of machines."""
    volume_gb: int = option(200, ">= 1")
    """GB of disk on each machine."""
    data: str | None = None
    """data_path of the run: a local directory, which is uploaded, or s3://...; None: the recipe's."""
    model: str | None = None
    """Model of the run: the same; None: the recipe's."""
    spot: bool = False
    """Use spare machines, which cost less and may be taken away; the job then waits for others and goes on."""
    max_hours: float = option(24.0, "> 0 and <= 672")
    """Hours after which the job is stopped; with spot it may wait as long again."""
    price_per_hour: float | None = option(None, "> 0 and finite")
    """Price of one machine, in any currency, for an estimate; None: none is made."""
    image: str | None = None
    """Container image; None: Hugging Face's for training, with torch 2.9."""
    follow: bool = False
    """Print the job's log until it ends."""
    dry_run: bool = False
    """Upload and start nothing; print the request of CreateTrainingJob as JSON."""


def hyperparameters(words: list[str]) -> dict[str, str]:
    """Options of train.py as hyper-parameters: JSON of a text or of a list, so that nothing is taken for a number.

    Raises:
        ValueError: a value has a `'`, with which SageMaker's script of variables would break.
    """
    found = options._flags(words, Config)
    for name, value in found.items():
        if "'" in json.dumps(value):
            raise ValueError(f"{name} is {value!r}: must have no ' in it; put it into the recipe")
    return {name: json.dumps(value) for name, value in found.items()}


def estimate(job: Job) -> str:
    """What the job costs at most, by the user's price."""
    cost = job.price_per_hour * job.instance_count * job.max_hours
    machines = f"{job.instance_count} x {job.instance_type}"
    return f"at most {job.max_hours:g} h on {machines}: {cost:.2f} by your price, without disks, S3 and transfer"


def session_of(job: Job):
    """The SDK's session. Under dry_run it uploads nothing, and no role is looked up.

    Raises:
        ValueError: there is no region.
    """
    import boto3
    from sagemaker.core.helper.session_helper import Session

    class Offline(Session):
        def upload_data(self, path, bucket=None, key_prefix="data", **_):
            return f"s3://{bucket}/{key_prefix}"

        def default_bucket(self):
            return job.bucket

    if job.region:  # to follow a job, the SDK makes a session of its own
        os.environ["AWS_DEFAULT_REGION"] = job.region
    boto = boto3.Session()
    if boto.region_name is None:
        raise ValueError("region is None: must be given, because AWS has no default configured here")
    if job.dry_run:
        os.environ.update(SAGEMAKER_VALIDATE_ROLE="false", AWS_EC2_METADATA_DISABLED="true")
    return (Offline if job.dry_run else Session)(boto, default_bucket=job.bucket)


def trainer(job: Job, words: list[str], session):
    """The SDK's `ModelTrainer` of a job, which builds and sends the request.

    Args:
        job: the options.
        words: options of train.py.
        session: of `session_of`.

    Raises:
        ValueError: the recipe is not in the repository, or a path does not exist.
    """
    from sagemaker.core import shapes
    from sagemaker.core.training import configs
    from sagemaker.train import ModelTrainer

    recipe = Path(job.recipe).resolve()
    if not recipe.is_relative_to(ROOT):
        raise ValueError(f"recipe is {job.recipe!r}: must lie in {ROOT}, which is what the job gets")
    name = (
        re.sub(r"[^a-zA-Z0-9]+", "-", place_of(parse_args(["--recipe", str(recipe), *words])).name).strip("-") or "grpo"
    )
    seconds = round(job.max_hours * 3600)
    channels = {"train": job.data, "model": job.model}
    made = ModelTrainer(
        sagemaker_session=session,
        role=job.role,
        base_job_name=name,
        input_s3_key_prefix="grpo-code",
        training_image=job.image or IMAGE.format(region=session.boto_session.region_name),
        source_code=configs.SourceCode(source_dir=str(ROOT), command=INSTALL + RUN, ignore_patterns=STAYS),
        compute=configs.Compute(
            instance_type=job.instance_type,
            instance_count=job.instance_count,
            volume_size_in_gb=job.volume_gb,
            enable_managed_spot_training=job.spot,
        ),
        input_data_config=[
            configs.InputData(channel_name=channel, data_source=place) for channel, place in channels.items() if place
        ],
        hyperparameters=hyperparameters(["--recipe", str(recipe.relative_to(ROOT)), *words]),
        checkpoint_config=shapes.CheckpointConfig(
            s3_uri=f"s3://{job.bucket}/grpo/{name}/", local_path="/opt/ml/checkpoints"
        ),
        output_data_config=shapes.OutputDataConfig(
            s3_output_path=f"s3://{job.bucket}/grpo-models", compression_type="NONE"
        ),
        stopping_condition=shapes.StoppingCondition(
            max_runtime_in_seconds=seconds, **({"max_wait_time_in_seconds": 2 * seconds} if job.spot else {})
        ),
        environment={"PYTHONUNBUFFERED": "1", "RDMAV_FORK_SAFE": "1"},  # rewards run in forked processes
    )
    found = [shapes.MetricDefinition(name=metric, regex=regex) for metric, regex in METRICS.items()]
    return made.with_metric_definitions(found)


def main(argv: list[str]) -> int:
    """Start the job, or print its request. Exit code: 0, 1 if a followed job fails, 2 for a wrong option."""
    cut = argv.index("--") if "--" in argv else len(argv)
    job, words = options.parse(Job, argv[:cut], "launch.py"), argv[cut + 1 :]
    try:
        import sagemaker.train  # noqa: F401
        from botocore.exceptions import BotoCoreError, ClientError
        from sagemaker.core.utils.exceptions import SageMakerCoreError
    except ImportError as error:
        print(f"launch.py: error: {error.name} is missing: pip install '.[sagemaker]' brings it", file=sys.stderr)
        return 2
    try:
        made = trainer(job, words, session_of(job))
        if job.price_per_hour:
            print(estimate(job), file=sys.stderr)
        if job.dry_run:
            print(json.dumps(made._create_training_job_args(boto3=True), indent=2))  # the SDK has no public name for it
        else:
            made.train(wait=False, logs=False)
            print(f"the run is in {made.checkpoint_config.s3_uri}")
            if job.follow:
                made._latest_training_job.wait(logs=True)  # no public name either
    except SageMakerCoreError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("the job goes on, and is no longer followed", file=sys.stderr)
        return 130
    except (ValueError, BotoCoreError, ClientError) as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
