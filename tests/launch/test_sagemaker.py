"""SageMaker without a cloud: the request against AWS's own description of it, and the entry under a directory like
/opt/ml. What only AWS can show is in docs/sagemaker.md."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from grpo.config import parse_args
from grpo.run.log import step_line
from launch.sagemaker import entry, launch
from tests.fakes import runs, sagemaker

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/gsm8k-qwen2.5-0.5b.yaml"
JOB = {"recipe": ROOT / RECIPE, "role": "arn:aws:iam::123456789012:role/grpo", "bucket": "mine", "region": "us-east-1"}
OPTIONS = ["--run_name", "qwen_0.5b", "--reward_weights", "1.0", "0.5", "--num_steps", "7"]


# The entry: variables of the container -> options.


def test_channels_hyperparameters_and_places_become_options():
    given = {"recipe": RECIPE, "learning-rate": 1e-6, "reward_weights": [1.0, 0.5], "chat": True, "revision": None}
    environment = {
        "SM_HPS": json.dumps(given),
        "SM_CHANNEL_TRAIN": "/opt/ml/input/data/train",
        "SM_CHANNEL_CODE": "/opt/ml/input/data/code",
        "SM_MODEL_DIR": "/opt/ml/model",
    }
    config = parse_args([w.replace(RECIPE, str(ROOT / RECIPE)) for w in entry.arguments(environment)])
    assert (config.learning_rate, config.reward_weights, config.chat, config.revision) == (1e-6, (1.0, 0.5), True, None)
    assert (config.out_dir, config.resume) == ("/opt/ml/checkpoints", "auto")
    assert (config.data_path, config.model) == ("/opt/ml/input/data/train", "Qwen/Qwen2.5-0.5B")


def test_a_hyperparameter_beats_a_channel_and_may_not_move_the_run():
    environment = {"SM_CHANNEL_MODEL": "/in/model", "SM_MODEL_DIR": "/opt/ml/model"}
    assert parse_args(entry.arguments(environment)).model == "/in/model"
    chosen = environment | {"SM_HPS": '{"model": "embedded"}'}
    assert parse_args(entry.arguments(chosen)).model == "embedded"
    for name in ("out_dir", "out-dir", "resume"):
        with pytest.raises(ValueError, match=f"^hyper-parameter {name} is 'x': must not be given"):
            entry.arguments(environment | {"SM_HPS": json.dumps({name: "x"})})


# What is sent.


def test_hyperparameters_arrive_as_they_were_given():
    sent = launch.hyperparameters(["--recipe", RECIPE, *OPTIONS, "--revision", "1e5", "--chat"])
    arrived = {name: json.loads(value) for name, value in sent.items()}  # as the SDK does in the container
    environment = {"SM_HPS": json.dumps(arrived), "SM_MODEL_DIR": "/opt/ml/model"}
    config = parse_args([w.replace(RECIPE, str(ROOT / RECIPE)) for w in entry.arguments(environment)])
    assert (config.revision, config.chat, config.reward_weights) == ("1e5", True, (1.0, 0.5))
    with pytest.raises(ValueError, match="^system_prompt is \"it's\": must have no ' in it"):
        launch.hyperparameters(["--system_prompt", "it's"])


def test_the_expressions_find_the_numbers_of_a_steps_line():
    line = {
        "step": 3,
        "reward/mean": 0.4375,
        "reward/gsm8k.format": 0.25,
        "completion/length": 93.5,
        "time/step": 12.34,
    }
    line |= {"completion/truncated": 0.125, "policy/entropy": 1.5e-05, "policy/kl": -0.001234, "optim/skipped": 0}
    line |= {"optim/grad_norm": 1234567.0, "eval/accuracy": 0.5, "eval/n": 200}
    text = step_line(line, 30, 60.0)
    found = {name: float(re.search(regex, text)[1]) for name, regex in launch.METRICS.items()}
    expected = {"reward": 0.4375, "length": 93.5, "truncated": 0.125, "entropy": 1.5e-05, "kl": -0.001234}
    expected |= {"grad": 1.235e6, "eval:accuracy": 0.5, "seconds_per_step": 12.3}
    assert found == expected


def test_the_estimate_is_the_price_times_machines_times_hours():
    job = launch.Job("r", "r", "b", instance_count=2, max_hours=3.0, price_per_hour=1.5)
    assert launch.estimate(job).startswith("at most 3 h on 2 x ml.g5.2xlarge: 9.00 by your price")


def faults(shape, value, where="request"):
    """What is wrong with a request by botocore's description: types, names, ranges, patterns, choices."""
    kinds = {"structure": dict, "map": dict, "list": list, "string": str, "integer": int, "long": int, "boolean": bool}
    if not isinstance(value, kinds[shape.type_name]):
        return [f"{where}: not a {shape.type_name}"]
    size = value if isinstance(value, int) else len(value)
    least, most = shape.metadata.get("min", size), shape.metadata.get("max", size)
    found = [] if least <= size <= most else [f"{where}: {size} is not within {least} and {most}"]
    if isinstance(value, str):
        choices, pattern = shape.metadata.get("enum"), shape.metadata.get("pattern")
        found += [f"{where}: no such choice"] if choices and value not in choices else []
        found += [f"{where}: not {pattern}"] if pattern and not re.fullmatch(pattern, value) else []
    elif shape.type_name == "structure":
        found += [f"{where}.{name}: missing" for name in shape.required_members if name not in value]
        found += [f"{where}.{name}: unknown" for name in value if name not in shape.members]
        parts = [(shape.members[name], part, name) for name, part in value.items() if name in shape.members]
        found += [fault for of, part, name in parts for fault in faults(of, part, f"{where}.{name}")]
    elif isinstance(value, list):
        found += [fault for i, part in enumerate(value) for fault in faults(shape.member, part, f"{where}.{i}")]
    elif isinstance(value, dict):
        for name, part in value.items():
            found += faults(shape.key, name, f"{where} key {name}") + faults(shape.value, part, f"{where}.{name}")
    return found


@pytest.fixture(scope="module")
def described():
    """AWS's description of CreateTrainingJob."""
    session = pytest.importorskip("botocore.session", reason="needs the extra sagemaker")
    model = session.get_session().get_service_model("sagemaker")
    return model.operation_model("CreateTrainingJob").input_shape


@pytest.fixture
def dry(monkeypatch, capsys):
    """Runs launch.py with --dry_run, without credentials; gives (exit code, stdout, stderr)."""
    pytest.importorskip("sagemaker.train", reason="needs the extra sagemaker")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.setenv(name, "")  # so that afterwards it is what it was
        monkeypatch.delenv(name)
    nowhere = {"AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (nowhere | {"SAGEMAKER_VALIDATE_ROLE": "false"}).items():
        monkeypatch.setenv(name, value)

    def run(words=OPTIONS, **changes):
        given = {name: value for name, value in (JOB | changes).items() if value is not None}
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        code = launch.main([*flags, "--dry_run", "--", *words])
        return code, *capsys.readouterr()

    return run


def test_the_request_is_what_aws_describes(dry, described, tmp_path):
    code, out, err = dry(spot=True, instance_count=2, data=tmp_path, model="s3://mine/qwen", max_hours=1.5)
    request = json.loads(out)
    assert (code, err) == (0, "") and faults(described, request) == []
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == [
        "train",
        "model",
        "code",
        "sm_drivers",
    ]
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 5400, "MaxWaitTimeInSeconds": 10800}
    assert request["EnableManagedSpotTraining"] is True and request["ResourceConfig"]["InstanceCount"] == 2
    place = {"S3Uri": "s3://mine/grpo/qwen-0-5b/", "LocalPath": "/opt/ml/checkpoints"}
    assert request["CheckpointConfig"] == place and json.loads(request["HyperParameters"]["recipe"]) == RECIPE
    long = json.loads(dry([*OPTIONS, "--run_name", 90 * "a"])[1])
    assert faults(described, long) == [] and "MaxWaitTimeInSeconds" not in long["StoppingCondition"]


WRONG = [
    ("ResourceConfig InstanceType", "ml.nonsense", "no such choice"),
    ("ResourceConfig InstanceCount", -1, "-1 is not within 0"),
    ("ResourceConfig VolumeSizeInGB", "200", "not a integer"),
    ("RoleArn", "grpo", "not arn:aws"),
    ("CheckpointConfig S3Uri", "mine/grpo", "not (https|s3)"),
    ("AlgorithmSpecification TrainingImage", 300 * "a", "300 is not within 0 and 255"),
    ("StoppingCondition MaxRuntimeInSeconds", 0, "0 is not within 1"),
    ("HyperParameters system_prompt", 3000 * "a", "3000 is not within 0 and 2500"),
    ("TrainingJobName", "a_b", "not [a-zA-Z0-9]"),
    ("OutputDataConfig Compression", "NONE", "unknown"),
]


def test_a_wrong_request_is_refused(dry, described):
    """botocore itself checks types, names and least values, and would send the others."""
    good = dry()[1]
    for path, value, fault in WRONG:
        request = json.loads(good)
        *places, name = path.split()
        reduce(dict.__getitem__, places, request)[name] = value
        found = faults(described, request)
        assert any(fault in each and name in each for each in found), (path, found)
    missing = json.loads(good)
    del missing["RoleArn"]
    assert faults(described, missing) == ["request.RoleArn: missing"]


def test_a_mistake_costs_one_sentence_and_no_money(dry, tmp_path):
    (tmp_path / "r.yaml").write_text("num_steps: 3\n")
    sentences = {
        "launch.py: error: recipe is ": dry(recipe=tmp_path / "r.yaml"),
        "launch.py: error: region is None: must be given": dry(region=None),
        "launch.py: error: Not a valid S3 URI or local file path": dry(data="nowhere"),
        "launch.py: error: system_prompt is ": dry(["--system_prompt", "it's"]),
    }
    for sentence, (code, out, err) in sentences.items():
        assert (code, out) == (2, "") and err.startswith(sentence) and err.count("\n") == 1, err
    with pytest.raises(SystemExit, match="2"):
        dry(["--nun_steps", "3"])


@pytest.mark.parametrize(("status", "code"), [("Completed", 0), ("Failed", 1)])
def test_following_needs_no_default_region_and_a_failure_is_a_sentence(monkeypatch, capsys, status, code):
    with sagemaker.cloud() as (_, requests):
        from botocore.client import BaseClient

        call = BaseClient._make_api_call

        def answered(client, name, request):
            ended = {"TrainingJobStatus": status, "FailureReason": "train.py: error: no"}
            return call(client, name, request) | (ended if name == "DescribeTrainingJob" else {})

        monkeypatch.setattr(BaseClient, "_make_api_call", answered)
        flags = [word for name, value in JOB.items() for word in (f"--{name}", str(value))]
        assert launch.main([*flags, "--follow", "--", *OPTIONS]) == code
    out, err = capsys.readouterr()
    assert len(requests) == 1 and "the run is in s3://mine/grpo/qwen-0-5b/" in out
    assert ("launch.py: error: " in err and "train.py: error: no" in err) == (status == "Failed"), err


# The entry in something like a container.


class Container:
    """A directory like /opt/ml, and the job's command in it."""

    def __init__(self, ml: Path, processes: int, given: dict):
        self.ml = ml
        for name in ("model", "checkpoints", "output"):
            (ml / name).mkdir(parents=True)
        runs.save_digits(ml / "input" / "data" / "model")
        runs.write_problems(ml / "input" / "data" / "train")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.environment = os.environ | {
            **{"SM_HPS": json.dumps(given), "SM_MODEL_DIR": str(ml / "model"), "PYTHONUNBUFFERED": "1"},
            **{"SM_OUTPUT_FAILURE": str(ml / "output" / "failure"), "SM_NETWORK_INTERFACE_NAME": "lo"},
            **{f"SM_CHANNEL_{name.upper()}": str(ml / "input" / "data" / name) for name in ("model", "train")},
            **{"SM_HOST_COUNT": "1", "SM_CURRENT_HOST_RANK": "0", "SM_NUM_GPUS": str(processes)},
            **{"SM_MASTER_ADDR": "127.0.0.1", "SM_MASTER_PORT": str(port)},
        }

    def start(self) -> subprocess.Popen:
        """The command, without the installation, in the bash whose process torchrun takes over."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = launch.RUN.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
        return subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=self.environment, **pipes)


def given(**changes) -> dict:
    """Hyper-parameters of a run in miniature."""
    words = runs.flags("", "", Path(), "job", **changes)
    options = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    return {name: value for name, value in options.items() if name not in ("model", "data_path", "out_dir")}


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "processes"), [(1, 2), (2, 0)])
def test_processes_and_hosts_leave_one_model_and_checkpoints(tmp_path, hosts, processes):
    boxes = [Container(tmp_path / f"algo-{k}", processes, given(num_steps=2)) for k in range(hosts)]
    port = boxes[0].environment["SM_MASTER_PORT"]
    for k, box in enumerate(boxes):
        box.environment |= {"SM_HOST_COUNT": str(hosts), "SM_CURRENT_HOST_RANK": str(k), "SM_MASTER_PORT": port}
    started = [box.start() for box in boxes]
    outs = [process.communicate(timeout=runs.PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [0] * hosts, outs
    job, model = boxes[0].ml / "checkpoints" / "job", boxes[0].ml / "model"
    assert [line["step"] for line in runs.metrics(job)] == [1, 2] and (job / "checkpoints" / "step_000002").is_dir()
    assert json.loads((job / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in model.iterdir()} == {path.name for path in (job / "final").iterdir()}
    steps = [line for line in outs[0].splitlines() if line.startswith("step ")]
    assert len(steps) == 2 and all(re.search(launch.METRICS["reward"], line) for line in steps)
    for box in boxes:
        assert not (box.ml / "output" / "failure").exists()
    for box in boxes[1:]:
        assert not any(box.ml.glob("model/*")) and not any(box.ml.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path):
    box = Container(tmp_path / "ml", 0, given(num_steps=40))
    job, process = tmp_path / "ml" / "checkpoints" / "job", box.start()
    runs.wait_until(lambda: (job / "rollouts" / "step_000003.jsonl").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=110)
    done = len(runs.metrics(job))
    assert f"saved after step {done}" in out and 3 <= done < 40, out
    assert not any((tmp_path / "ml" / "model").iterdir()) and not (tmp_path / "ml" / "output" / "failure").exists()
    process = box.start()
    out, _ = process.communicate(timeout=runs.PATIENCE)
    assert process.returncode == 0, out
    data = tmp_path / "ml" / "input" / "data"
    argv = runs.flags(str(data / "model"), str(data / "train"), tmp_path, "whole", num_steps=40)
    subprocess.run([sys.executable, ROOT / "train.py", *argv], check=True, capture_output=True, timeout=runs.PATIENCE)
    runs.assert_same_run(tmp_path / "whole", job)


@pytest.mark.slow
def test_the_reason_of_a_failure_is_our_sentence(tmp_path):
    box = Container(tmp_path / "ml", 0, given(num_steps=2, max_prompt_tokens=1))
    process = box.start()
    process.communicate(timeout=runs.PATIENCE)
    reason = (tmp_path / "ml" / "output" / "failure").read_text()
    assert process.returncode != 0 and reason.startswith("train.py: error: ") and "\n" not in reason
    assert "max_prompt_tokens" in reason


def test_a_wrong_option_and_a_crash_are_reasons_too(tmp_path, monkeypatch, capsys):
    reason = tmp_path / "failure"
    monkeypatch.setenv("SM_OUTPUT_FAILURE", str(reason))
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    for hps, sentence in {
        '{"nun_steps": 3}': "--nun_steps is not an option",
        '{"resume": "no"}': "hyper-parameter",
    }.items():
        reason.unlink(missing_ok=True)
        monkeypatch.setenv("SM_HPS", hps)
        assert entry.main() == 2 and reason.read_text().startswith(f"train.py: error: {sentence}")
        assert reason.read_text() in capsys.readouterr().err
    entry.fail("a later one")
    assert "later" not in reason.read_text()
    reason.unlink()

    def crash():
        raise RuntimeError("broken" + 2000 * "!")

    monkeypatch.setattr(entry, "run", crash)
    with pytest.raises(RuntimeError):
        entry.main()
    assert reason.read_text().startswith("RuntimeError: broken!") and len(reason.read_text()) == 1024
