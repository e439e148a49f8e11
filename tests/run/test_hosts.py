"""Hosts without a shared disk: each rank has a directory of its own, and only that of rank 0 holds the run."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo import distributed
from grpo.run import hosts
from tests.fakes import runs
from tests.fakes.runs import flags, killed


def own_directory(place: Path, before=None) -> None:
    """Each rank works where no other one does, as on a host of its own."""
    here = place / f"host_{os.environ['RANK']}"
    here.mkdir(exist_ok=True)
    os.chdir(here)
    if before is not None:
        before()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    runs.save_digits(place / "model")
    runs.write_problems(place / "data")
    return place


def argv(place: Path, **changes) -> list[str]:
    options = {"num_epochs": 2, "final_eval": True, "resume": "auto"} | changes
    return flags(str(place / "model"), str(place / "data"), Path("runs"), "x", **options)


def test_c64_a_run_is_resumed_and_evaluated_where_only_rank_0_has_the_files(place):
    """Kind: every rank reads a file that rank 0 alone has written.

    Looked at: checkpoints, and `final/` in the evaluation at the end. The resumed run equals one without the break.
    """
    before = partial(own_directory, place, killed("grpo.update:Learner.learn", 4, rank=1))
    ranks = runs.start_train_ranks(argv(place), 2, place / "broken", before=before)
    assert ranks[1].wait() == -9 and ranks[0].wait() != 0
    assert (place / "host_0" / "runs" / "x" / "checkpoints" / "step_000002").is_dir()
    ranks = runs.start_train_ranks(argv(place), 2, place / "again", before=partial(own_directory, place))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert not (place / "host_1" / "runs").exists()
    assert (place / "host_0" / "runs" / "x" / "eval" / "eval.json").exists()
    shared = place / "shared"
    ranks = runs.start_train_ranks(argv(place, out_dir=shared), 2, place / "whole")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    runs.assert_same_run(shared / "x", place / "host_0" / "runs" / "x")


@pytest.mark.parametrize("lacks", ["model", "data"])
def test_c64_a_host_without_the_model_or_the_data_says_so_in_a_sentence(place, tmp_path, lacks):
    """Kind: as above. Model and data are read by every rank, so each host needs them."""
    for rank, names in enumerate((["model", "data"], ["model" if lacks == "data" else "data"])):
        (tmp_path / f"host_{rank}").mkdir()
        for name in names:
            (tmp_path / f"host_{rank}" / name).symlink_to(place / name)
    words = flags("model", "data", Path("runs"), "x")
    ranks = runs.start_train_ranks(words, 2, tmp_path / "rank", before=partial(own_directory, tmp_path))
    assert [rank.wait() for rank in ranks] == [1, 2]
    (other,), (said,) = (rank.stderr.splitlines() for rank in ranks)
    assert said.startswith(f"rank 1: train.py: error: {'model' if lacks == 'model' else 'data_path'}: ")
    assert other.startswith("train.py: error: another process ended, or did not answer")


def _read(place: Path) -> None:
    own_directory(place)
    distributed.init("cpu", 60)
    hosts.PIECE = 3
    with hosts.at_hand("final") as directory:
        texts = {file.name: file.read_text() for file in Path(directory).iterdir()}
        torch.save([directory, texts], f"{place}/read_{distributed.rank()}.pt")
    with hosts.at_hand("some/name") as directory:
        assert directory == "some/name"
    distributed.shutdown()


@pytest.mark.parametrize("stale", [False, True], ids=["nothing", "an older one"])
def test_c64_a_directory_of_rank_0_is_at_hand_on_every_host(tmp_path, stale):
    """Kind: as above. A directory of the same name on another host may be of an earlier run."""
    for rank in (0, 1) if stale else (0,):
        directory = tmp_path / f"host_{rank}" / "final"
        directory.mkdir(parents=True)
        (directory / "a").write_text(f"from {rank}")
        (directory / "empty").touch()
    ranks = runs.start_ranks(partial(_read, tmp_path), 2, tmp_path / "out")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    read = [torch.load(tmp_path / f"read_{rank}.pt") for rank in (0, 1)]
    assert [files for _, files in read] == [{"a": "from 0", "empty": ""}] * 2
    assert read[0][0] == "final" and not Path(read[1][0]).exists()
