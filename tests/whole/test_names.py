"""Every name that an option may have runs in `train.py`: alone, the same on two processes, and resumed to the bit.

Run i takes the i-th name of every table, so a few runs see all names. A name that is added to a table is in one of them
without a further line here. Left out: names of machines, trackers, data and models, and rewards of other tasks.
"""

import os
import signal
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import rewards
import train
from grpo.advantages import ADVANTAGES, BINARY
from grpo.config import Config
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.update import Learner
from grpo.weighting import WEIGHTINGS
from tests.fakes import runs

TABLES = {
    "loss": LOSSES,
    "advantage": ADVANTAGES,
    "weighting": WEIGHTINGS,
    "kl": KL,
    "sampler_correction": CORRECTIONS,
    "whiten": (False, True),
    "mask_truncated": (True, False),
}
OF_THE_MACHINE = {"device", "precision", "resume", "tracker"}
TABLES |= {name: get_args(kind) for name, kind in get_type_hints(Config).items()
           if get_origin(kind) is Literal and name not in OF_THE_MACHINE}  # fmt: skip
REWARDS = [name for name in rewards._known() if name.startswith(("gsm8k", "length")) and name != "gsm8k.last_number"]
"""Those that any text can be given, beside that one, which the tiny model can earn."""
COUNT = max(map(len, [*TABLES.values(), REWARDS]))


def names(i: int) -> dict:
    """The options of run i."""
    chosen = {option: list(table)[i % len(table)] for option, table in TABLES.items()}
    chosen["shard"] = TABLES["shard"][(i + 1) % len(TABLES["shard"])]  # so that muon, which refuses shards, has none
    single = chosen["advantage"] in BINARY
    graded = {"rewards": "gsm8k.last_number", "reward_weights": "1"} if single else {
        "rewards": f"gsm8k.last_number,{REWARDS[i % len(REWARDS)]}", "reward_weights": "2,1"}  # fmt: skip
    return chosen | graded


def argv(place: Path, name: str, i: int, **changes) -> list[str]:
    options = {"num_steps": 3, "group_size": 6, "minibatch_size": 6, "num_epochs": 2, "checkpoint_every": 1, "seed": 1}
    options |= {"pass_k": 2, "max_refills": 1, "max_tokens_per_microbatch": 40, "sgd_momentum": 0.5}
    options |= {"entropy_coef": 0.01, "learning_rate": 0.003, "eval_correct": "gsm8k.last_number"}
    return runs.flags(str(place / "model"), str(place / "data"), place, name, **options | names(i) | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)


def test_the_runs_see_every_name():
    for option, table in TABLES.items():
        assert {names(i)[option] for i in range(COUNT)} == set(table) and len(table) > 1, option
    assert {"optimizer", "flat_groups", "kl_in", "combine", "schedule"} <= set(TABLES)


@pytest.mark.parametrize("i", range(COUNT))
def test_c29_c30_c32_every_name_runs_alone_on_two_processes_and_resumed(place, i, monkeypatch):
    assert train.main(argv(place, f"alone_{i}", i)) == 0
    alone = place / f"alone_{i}"
    learned = [line for line in runs.metrics(alone) if line["optim/grad_norm"] is not None]
    assert learned and any(line["policy/kl"] for line in learned) and not any(line["optim/skipped"] for line in learned)

    learn = Learner.learn
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), learn(*given))[1])
        assert train.main(argv(place, f"halves_{i}", i)) == 0
    assert len(runs.metrics(place / f"halves_{i}")) == 1
    assert train.main(argv(place, f"halves_{i}", i, resume="auto")) == 0
    runs.assert_same_run(alone, place / f"halves_{i}")

    ranks = runs.start_train_ranks(argv(place, f"two_{i}", i), 2, place / f"two_{i}")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    # With the KL in the reward an advantage of 0 has a residue of rounding. Whether a bound acts there changes nothing.
    but = ("policy/clip_fraction",) if names(i)["kl_in"] == "reward" else ()
    runs.assert_alike(alone, place / f"two_{i}", but)
