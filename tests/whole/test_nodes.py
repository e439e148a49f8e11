"""Two nodes: `torchrun --nnodes 2` between two network namespaces, each with a directory of its own.

The same numbers as on one node; a cut link ends both sides; a killed process is followed by a restart from the newest
checkpoint. Needs root and `ip`; the machine's own network is not touched.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import runs
from tests.fakes.nodes import ADDRESSES, ip, two_nodes

pytestmark = pytest.mark.slow

# What each process runs: train.py, and in its first life what goes wrong on one of them.
SCRIPT = """
import os, subprocess, sys
sys.path.insert(0, {root!r})
from tests.fakes.runs import at, call_main, killed
LINK = ["ip", "link", "set", "eth0", "down"]
TROUBLE = {{
    "nothing": None,
    "killed": killed("grpo.update:Learner.learn", 4, rank=1),
    "cut": lambda: at("grpo.update:Learner.learn", 3, lambda: subprocess.run(LINK, check=True), rank=1),
}}
call_main("train", sys.argv[2:], TROUBLE[sys.argv[1]] if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None)
"""
FRESH = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it a restarted process may find the address of a dead one in the store that torchrun keeps: it then hangs or
fails (https://github.com/pytorch/pytorch/issues/135712)."""


@pytest.fixture
def nodes():
    """The names of two namespaces with a link between them."""
    with two_nodes() as names:
        yield names


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


def argv(place: Path, out: Path, **changes) -> list[str]:
    options = {"num_epochs": 2, "num_steps": 5, "checkpoint_every": 1, "final_eval": True, "resume": "auto"} | changes
    return runs.flags(str(place / "model"), str(place / "data"), out, "x", **options)


@pytest.fixture(scope="module")
def one_node(place) -> Path:
    """A run of two processes on one node."""
    ranks = runs.start_train_ranks(argv(place, place / "one"), 2, place / "one_node")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    return place / "one" / "x"


def start_two(nodes: list[str], place: Path, here: Path, trouble: str, restarts: int = 0, **changes) -> list:
    """torchrun on each node, in the directory `here`/node_k. Its output goes to a file beside that."""
    script = here / "script.py"
    script.write_text(SCRIPT.format(root=str(runs.ROOT)))
    started = []
    for k, (name, address) in enumerate(zip(nodes, ADDRESSES, strict=True)):
        (here / f"node_{k}").mkdir()
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "test"]
        meet += ["--rdzv-conf", f"is_host={1 - k}", "--local-addr", address]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet]
        launch += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", str(script), trouble]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            **FRESH,
        }
        command = ["ip", "netns", "exec", name, *launch, *argv(place, Path("runs"), **changes)]
        with (here / f"node_{k}.out").open("w") as out:
            started.append(subprocess.Popen(command, cwd=here / f"node_{k}", env=environment, stdout=out, stderr=out))
    return started


def outputs(here: Path) -> list[str]:
    return [(here / f"node_{k}.out").read_text() for k in (0, 1)]


def end_well(started: list, here: Path) -> None:
    """Wait for both nodes, each no longer than the patience of these tests."""
    assert [process.wait(timeout=runs.PATIENCE) for process in started] == [0, 0], outputs(here)


def test_two_nodes_compute_what_two_processes_on_one_compute(nodes, place, one_node, tmp_path):
    end_well(start_two(nodes, place, tmp_path, "nothing"), tmp_path)
    runs.assert_same_run(one_node, tmp_path / "node_0" / "runs" / "x")
    assert not (tmp_path / "node_1" / "runs").exists()


@pytest.mark.parametrize("how", ["none", "full"])
def test_a_killed_process_is_followed_by_a_restart_that_goes_on_to_the_bit(nodes, place, one_node, tmp_path, how):
    """From shards the files of rank 0 are whole, and one disk suffices too. Their sums are rounded in another order."""
    end_well(start_two(nodes, place, tmp_path, "killed", restarts=1, shard=how), tmp_path)
    first, second = outputs(tmp_path)
    assert "exitcode: -9" in second and "another process ended" in first, first + second
    compare = runs.assert_same_run if how == "none" else runs.assert_alike
    compare(one_node, tmp_path / "node_0" / "runs" / "x")


def test_a_cut_link_ends_the_processes_of_both_sides_in_a_sentence(nodes, place, tmp_path):
    """torchrun itself stays some minutes on the side that can not reach the other: it is killed with the namespace."""
    started = start_two(nodes, place, tmp_path, "cut", num_steps=50, ddp_timeout=8)
    runs.wait_until(lambda: all("train.py: error: " in output for output in outputs(tmp_path)))
    assert started[0].wait(timeout=runs.PATIENCE) == 1
    runs.wait_until(lambda: ip("netns", "pids", nodes[1]).split() in ([], [str(started[1].pid)]))
    for output in outputs(tmp_path):
        (said,) = (line for line in output.splitlines() if "train.py: error: " in line)
        assert "another process ended, or did not answer for 8 s (ddp_timeout)" in said
    assert len(runs.metrics(tmp_path / "node_0" / "runs" / "x")) == 2
