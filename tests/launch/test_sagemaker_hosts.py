"""Two machines of SageMaker: launch.py sends the job to moto, and the SDK's own scripts run what was sent.

Each machine is a container with a network of its own. Needs root, `ip`, moto and the extra `sagemaker`. What differs
from AWS is in tests/fakes/sagemaker.py.
"""

import re
import signal
from pathlib import Path

import pytest

from launch.sagemaker import launch
from tests.fakes import runs, sagemaker
from tests.fakes.nodes import two_nodes

pytestmark = pytest.mark.slow
RECIPE = str(runs.ROOT / "recipes" / "grpo.yaml")
FIXED = ("model", "data_path", "out_dir", "resume")
"""Options that the job sets."""


@pytest.fixture
def nodes():
    """The names of two namespaces with a link between them."""
    with two_nodes() as names:
        yield names


@pytest.fixture
def aws():
    """(client of S3, requests that were sent)."""
    with sagemaker.cloud() as made:
        yield made


def flags(place: Path, out: Path, **changes) -> list[str]:
    """Options of train.py for a run in miniature."""
    return runs.flags(str(place / "model"), str(place / "data"), out, "job", resume="auto", **changes)


def words(**changes) -> list[str]:
    """The same without those that the job sets."""
    pairs = iter(flags(Path(), Path(), **changes))
    return [word for pair in zip(pairs, pairs, strict=True) if pair[0][2:] not in FIXED for word in pair]


def start(place: Path, nodes: list[str], aws, options: list[str]) -> list[sagemaker.Container]:
    """Send the job as a user does, and start its two machines."""
    s3, requests = aws
    sent = ["--recipe", RECIPE, "--role", sagemaker.ROLE, "--bucket", sagemaker.BUCKET]
    sent += ["--region", sagemaker.REGION, "--instance_count", 2, "--spot"]
    sent += ["--data", place / "data", "--model", place / "model", "--", *options]
    assert launch.main([str(word) for word in sent]) == 0
    here = place / f"job_{len(requests)}"
    hosts = [sagemaker.Container(here / f"{k}", requests[-1], s3, k) for k in (0, 1)]
    for host, node in zip(hosts, nodes, strict=True):
        host.start(node)
    return hosts


def ends(hosts: list[sagemaker.Container], timeout: float = runs.PATIENCE) -> list[int]:
    """Exit codes."""
    return [host.process.wait(timeout) for host in hosts]


@pytest.fixture
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


def test_two_machines_train_stop_and_go_on_to_the_same_bits(place, nodes, aws):
    options = words(num_steps=40)
    hosts = start(place, nodes, aws, options)
    run = hosts[0].ml / "checkpoints" / "job"
    third = run / "rollouts" / "step_000003.jsonl"
    runs.wait_until(lambda: third.exists() or hosts[0].process.poll() is not None)
    for host in hosts:
        host.stop(signal.SIGTERM)
    codes = ends(hosts, timeout=110)  # SageMaker kills after 120 s
    done = len(runs.metrics(run))
    assert f"saved after step {done}" in hosts[0].log and 3 <= done < 40, codes
    assert not any((host.ml / "output" / "failure").exists() for host in hosts)
    hosts[0].collect()
    hosts = start(place, nodes, aws, options)
    assert ends(hosts) == [0, 0], hosts[0].log + hosts[1].log
    assert re.search(r"^step +(\d+)/40", hosts[0].log, re.M)[1] == str(done + 1)
    whole = ["--recipe", RECIPE, *flags(place, place / "whole", num_steps=40)]
    ranks = runs.start_train_ranks(whole, 2, place / "ranks")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_same_run(place / "whole" / "job", hosts[0].ml / "checkpoints" / "job")


def reason_of(host: sagemaker.Container) -> str:
    """The failure that SageMaker is told."""
    (reason,) = (host.ml / "output" / "failure").read_text().splitlines()
    assert "train.py: error: " in reason
    return reason


def test_a_wrong_option_is_the_reason_on_both_machines(place, nodes, aws):
    hosts = start(place, nodes, aws, words(max_prompt_tokens=1))
    assert all(ends(hosts)) and all("max_prompt_tokens" in reason_of(host) for host in hosts)


def test_a_lost_machine_is_the_reason_on_the_other(place, nodes, aws):
    first, second = start(place, nodes, aws, words(num_steps=5000))
    runs.wait_until(lambda: "\nstep " in first.log or first.process.poll() is not None)
    second.stop(signal.SIGKILL)
    assert first.process.wait(runs.PATIENCE) and "another process ended" in reason_of(first)
