"""`python -m grpo.replay`: a saved step made again is the step of the run, and another objective gets its gradient."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from grpo.optimizer import clip_and_step
from grpo.replay import __main__ as command
from grpo.replay.gradients import SHOWN, replay
from tests.fakes import runs

EXACT, CLOSE = {"rel": 1e-9, "abs": 1e-12}, {"rel": 1e-6, "abs": 1e-9}
AS_IT_WAS, AS_ASKED, LOGGED = "as it was", "as asked", "metrics.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", runs.no_report)
        yield runs.new_place(tmp_path_factory)


def argv(place: Path, name: str, **changes) -> list[str]:
    """Flags of a run in which both rewards vary from its first step on."""
    options = {"seed": 3, "prompts_per_step": 4, "rewards": "gsm8k.last_number,length.repetition"}
    data = place / changes.pop("data", "data")
    return runs.flags(str(place / "model"), str(data), place, name, **{"save_replay": True} | options | changes)


@pytest.fixture(scope="module")
def simple(place) -> Path:
    """One update in a step."""
    assert train.main(argv(place, "simple")) == 0
    return place / "simple"


MINIBATCHES = {
    "num_epochs": 2, "minibatch_size": 8, "learning_rate": 0.003, "num_steps": 2, "flat_groups": "refill",
    "max_refills": 2, "reference_sync_every": 1, "checkpoint_every": 1, "advantage": "batch_std", "kl_stop": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def several(place) -> Path:
    """Several updates in a step, more groups than are learned from, and a reference that moves."""
    assert train.main(argv(place, "several", **MINIBATCHES)) == 0
    return place / "several"


def of(rows, objective: str) -> list[dict]:
    return [row.numbers for row in rows if row.objective == objective]


def test_only_steps_after_a_checkpoint_are_saved(simple, several):
    assert sorted(file.name for file in (simple / "replay").iterdir()) == [f"step_00000{k}.safetensors" for k in (1, 3)]
    assert len(list((several / "replay").iterdir())) == 2
    assert any(line["rollout/refills"] for line in runs.metrics(several)), "nothing was refilled: the run shows nothing"


@pytest.mark.parametrize("step", [1, 3])
def test_without_changes_it_is_the_step_of_the_run(simple, step):
    rows = replay(simple, step)
    (was,), (logged,) = of(rows, AS_IT_WAS), of(rows, LOGGED)
    assert {name: was[name] for name in SHOWN} == {name: logged[name] for name in SHOWN}, "to the bit on a CPU"
    assert was["gradient norm"] > 0 and was["cosine"] == pytest.approx(1)
    assert logged["gradient norm"] == runs.metrics(simple)[step - 1]["optim/grad_norm"]


@pytest.mark.parametrize("step", [1, 2])
def test_all_updates_of_a_step_are_made_again(several, step):
    rows = replay(several, step, loss="cispo")
    whole, logged = of(rows, AS_IT_WAS)[-1], of(rows, LOGGED)[0]
    assert rows[-2].update == rows[-1].update == "all" and whole == logged
    taken, asked = of(rows, AS_IT_WAS)[:-1], of(rows, AS_ASKED)
    assert len(taken) == len(asked) == runs.metrics(several)[step - 1]["optim/updates"] > 2
    mean = sum(numbers["gradient norm"] for numbers in taken) / len(taken)
    assert mean == pytest.approx(logged["gradient norm"], **EXACT)
    assert all(numbers["cosine"] == pytest.approx(1) for numbers in taken)
    assert asked[0]["cosine"] == pytest.approx(1), "the first update is on-policy"
    assert any(numbers["clip fraction"] > 0 for numbers in taken), "nothing is clipped: the run shows nothing"
    assert min(numbers["cosine"] for numbers in asked) < 0.999


def test_coefficients_that_follow_a_target_are_those_of_the_step(place):
    options = {"kl_coef": 0.5, "kl_target": 1e-6, "kl_horizon": 16, "entropy_target": 9.0, "entropy_step": 0.1}
    options |= {"learning_rate": 0.01, "checkpoint_every": 1, "keep_checkpoints": 9}
    assert train.main(argv(place, "adaptive", **options)) == 0
    run = place / "adaptive"
    assert runs.metrics(run)[2]["policy/kl_coef"] != 0.5 != runs.metrics(run)[2]["policy/entropy_coef"] != 0
    rows = replay(run, 3, loss="cispo")
    (was, *_), (asked, *_), (logged, *_) = (of(rows, objective) for objective in (AS_IT_WAS, AS_ASKED, LOGGED))
    assert was["gradient norm"] == pytest.approx(logged["gradient norm"], rel=1e-12)
    assert asked["gradient norm"] == pytest.approx(was["gradient norm"], rel=1e-6), "on-policy the losses agree"
    (_, other, *_) = replay(run, 3, kl_coef=0.0)
    assert other.numbers["gradient norm"] != pytest.approx(was["gradient norm"], rel=1e-3)


def test_the_gradient_is_the_one_that_was_taken(place, monkeypatch):
    """Recorded in a run and in its replay, just before it is clipped."""
    seen: list[list[torch.Tensor]] = []

    def recorded(policy, *rest):
        seen.append([p.grad.clone() for p in policy.parameters()])
        return clip_and_step(policy, *rest)

    monkeypatch.setattr("grpo.update.clip_and_step", recorded)
    assert train.main(argv(place, "recorded", num_steps=3, num_epochs=2)) == 0
    in_run, seen[:] = seen[-2:], []
    replay(place / "recorded", 3, loss="gspo", advantage="rloo")
    assert len(in_run) == len(seen) == 2
    for one, other in zip(in_run, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_of_the_run_is_changed(simple):
    before = {file: file.read_bytes() for file in simple.rglob("*") if file.is_file()}
    replay(simple, 3, loss="reinforce")
    assert before == {file: file.read_bytes() for file in simple.rglob("*") if file.is_file()}


@pytest.mark.parametrize("loss", ["reinforce", "cispo"])
def test_on_policy_the_gradient_of_a_loss_is_the_same(simple, loss):
    was, asked = (of(replay(simple, 3, loss=loss), name)[0] for name in (AS_IT_WAS, AS_ASKED))
    assert asked["cosine"] == pytest.approx(1, **EXACT)
    assert asked["gradient norm"] == pytest.approx(was["gradient norm"], **EXACT)


def test_twice_the_rewards_are_twice_the_gradient_and_opposite_ones_the_opposite(simple):
    plain, twice, against = (
        of(replay(simple, 3, advantage="dr_grpo", kl_coef=0.0, reward_weights=weights), AS_ASKED)[0]
        for weights in ((2.0, 1.0), (4.0, 2.0), (-2.0, -1.0))
    )
    assert plain["kl"] is None
    assert twice["gradient norm"] == pytest.approx(2 * plain["gradient norm"], **EXACT)
    assert twice["cosine"] == pytest.approx(plain["cosine"], **EXACT)
    assert against["cosine"] == pytest.approx(-plain["cosine"], **EXACT)


CHANGES = [{"weighting": "sequence_mean", "mask_truncated": True}, {"entropy_coef": 0.5, "kl_coef": 0.0}]
CHANGES += [{"combine": "advantages", "whiten": True}, {"advantage": "dr_grpo", "reward_weights": (0.0, 1.0)}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_step_of_a_run_with_that_objective_has_that_gradient(place, simple, changes):
    """The first step of a run samples the same whatever its objective."""
    name = "_".join(f"{k}={v}" for k, v in changes.items()).translate({ord(c): None for c in "(), "})
    flags = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in changes.items()}
    assert train.main(argv(place, name, num_steps=1, **flags)) == 0
    expected = of(replay(place / name, 1), LOGGED)[0]
    was, asked = (of(replay(simple, 1, **changes), objective)[0] for objective in (AS_IT_WAS, AS_ASKED))
    for name in SHOWN:
        assert (asked[name] is None) == (expected[name] is None) == (name == "kl" and "kl_coef" in changes)
        assert asked[name] is None or asked[name] == pytest.approx(expected[name], **EXACT)
    assert asked["cosine"] < 1 - 1e-9 and asked["gradient norm"] != was["gradient norm"]


def test_the_penalty_is_that_of_the_reference(simple):
    none, much = (of(replay(simple, 3, kl_coef=coef), AS_ASKED)[0] for coef in (0.0, 9.0))
    assert much["kl"] > 0 and much["loss"] - none["loss"] == pytest.approx(9 * much["kl"], **EXACT)
    assert much["cosine"] < none["cosine"] < 1


def test_two_processes_write_the_same_file_as_one(several, place):
    ranks = runs.start_train_ranks(argv(place, "two", **MINIBATCHES), 2, place / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    files = sorted((several / "replay").iterdir())
    for file in files:
        ours, theirs = load_file(file), load_file(place / "two" / "replay" / file.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-12, equal_nan=True)
    *_, whole, logged = replay(place / "two", 2)
    assert whole.objective == AS_IT_WAS and whole.numbers == pytest.approx(logged.numbers, **CLOSE)


def test_a_step_without_a_group_to_learn_from_has_no_gradient(place):
    runs.write_problems(place / "unsolvable", answer="9")
    options = {"flat_groups": "drop", "num_steps": 1, "rewards": "gsm8k.last_number", "reward_weights": "1"}
    assert train.main(argv(place, "flat", data="unsolvable", **options)) == 0
    assert [row.objective for row in replay(place / "flat", 1)] == [LOGGED]


def test_the_command_prints_a_table(simple, capsys):
    assert command.main([str(simple), "3", "--loss", "gspo", "--clip_high", "0.3", "--compile", "False"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "update" and head.endswith("cosine")
    assert [line[8:21].strip() for line in lines] == [AS_IT_WAS, AS_ASKED, LOGGED]
    assert lines[0].split()[-1] == "1" and lines[2].split()[-1] == "-"
    assert command.main(["--help"]) == 0 and "clip_high" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "write RUN STEP --name value ..., with the number of a step; see --help"),
        (["simple", "first"], "write RUN STEP"),
        (["nowhere", "1"], "nowhere is not a run directory: it has no config.yaml"),
        (["simple", "2"], "step 2 of simple can not be replayed, there is no saved step; these can: 1, 3 (see"),
        (["simple", "3", "--group_size", "8"], "group_size is 8: a replay can not change it"),
        (["simple", "3", "--num_steps", "9"], "num_steps is 9: a replay can not change it"),
        (["simple", "3", "--loss", "gsop"], "loss is 'gsop': must be one of grpo, gspo,"),
        (["simple", "3", "--advantage", "max_rl"], "max_rl"),
    ],
)
def test_what_can_not_be_replayed_is_one_sentence(simple, words, said, capsys, monkeypatch):
    monkeypatch.chdir(simple.parent)
    assert command.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("grpo.replay: error: ") and said in err and err.count("\n") == 1


def test_a_step_whose_checkpoint_is_gone_or_whose_file_is_damaged(place, capsys):
    assert train.main(argv(place, "pruned", checkpoint_every=1, num_steps=3, keep_checkpoints=1)) == 0
    run = place / "pruned"
    assert command.main([str(run), "2"]) == 2
    assert "there is no checkpoint of step 1; these can: 1 (see save_replay)" in capsys.readouterr().err
    file = run / "replay" / "step_000001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert command.main([str(run), "1"]) == 2
    assert f"{file} holds no saved step of this version" in capsys.readouterr().err


def test_a_run_without_the_option_saves_nothing(place, capsys):
    assert train.main(argv(place, "unsaved", num_steps=1, save_replay=False)) == 0
    assert not (place / "unsaved" / "replay").exists()
    assert command.main([str(place / "unsaved"), "1"]) == 2
    assert "there is no saved step; nor can any other" in capsys.readouterr().err
