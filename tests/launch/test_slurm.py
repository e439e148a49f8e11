"""`launch/slurm.sh` on a real Slurm of two nodes: preempted, told of its time limit, and each time queued again.

Needs root, `ip`, Slurm and munge (Debian: slurm-wlm and munge). What Slurm sends before a time limit is sent by hand.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import runs, slurm

pytestmark = pytest.mark.slow
ONE_EACH = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


def test_a_job_is_preempted_and_stopped_and_equals_a_run_without_a_break(tmp_path, monkeypatch):
    model, data = runs.save_digits(tmp_path / "model"), runs.write_problems(tmp_path / "data")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (tmp_path / "slurm").mkdir()

    def argv(name: str) -> list[str]:
        return runs.flags(model, data, tmp_path, name, num_steps=60, checkpoint_every=0)

    with slurm.cluster(tmp_path / "slurm") as cluster:
        places = [f"--chdir={runs.ROOT}", f"--output={tmp_path}/out"]
        script = [str(runs.ROOT / "launch" / "slurm.sh"), *argv("cut")]
        number = cluster.ask("sbatch", "--parsable", *places, *ONE_EACH, *script).strip()

        def wait_for(condition: Callable[[], bool]) -> None:
            runs.wait_until(lambda: condition() or cluster.job(number)["JobState"] == "FAILED")
            assert condition(), (tmp_path / "out").read_text()

        def wait_for_step(step: int) -> None:
            wait_for((tmp_path / "cut" / "rollouts" / f"step_{step:06}.jsonl").exists)

        wait_for_step(2)
        cluster.ask("sbatch", "--partition=high", "--output=/dev/null", "--nodes=2", "--exclusive", "--wrap=srun true")
        wait_for(lambda: cluster.job(number)["Restarts"] == "1")
        first = len(runs.metrics(tmp_path / "cut"))
        wait_for_step(first + 2)
        cluster.ask("scancel", "--signal=USR1", "--batch", number)
        wait_for(lambda: cluster.job(number)["Restarts"] == "2")
        second = len(runs.metrics(tmp_path / "cut"))
        assert 2 <= first < second < 60
        wait_for(lambda: cluster.job(number)["JobState"] == "COMPLETED")
        assert cluster.job(number)["Restarts"] == "2"
    said = (tmp_path / "out").read_text()
    assert all(f"asked to stop; saved after step {step}" in said for step in (first, second))
    ranks = runs.start_train_ranks(argv("whole"), 2, tmp_path / "whole")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
