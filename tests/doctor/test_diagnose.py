"""The doctor from outside: what --check prints and leaves behind, what a run says when it begins and while it goes."""

import inspect
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from grpo.config import Config, parse_args, to_yaml
from grpo.dataloader import ProblemSets
from grpo.doctor import check_algorithm, check_data
from grpo.doctor.diagnose import CHECKS, budget, diagnose, refuse_too_large, refuse_unfit, spread_of, summary
from grpo.doctor.finding import Finding
from grpo.doctor.memory import MOST_TOKENS, least
from grpo.losses import LOSSES
from grpo.run.machine import settle
from tests.fakes import runs
from tests.fakes.known_facts import config, facts


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a model of digits and its problems."""
    directory = tmp_path_factory.mktemp("doctor")
    runs.save_digits(directory / "model")
    runs.write_problems(directory / "data")
    return directory


def flags(place: Path, out: Path, **changes) -> list[str]:
    return runs.flags(str(place / "model"), str(place / "data"), out, "checked", **changes)


def test_every_check_is_listed():
    for module in (check_algorithm, check_data):
        checks = {f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__}
        assert checks and checks <= set(CHECKS)
    assert len(set(CHECKS)) == len(CHECKS)


def test_the_worst_comes_first():
    known = facts(found=(Finding("note", "this", "means", "do"),))
    found = diagnose(config(group_size=1, temperature=2.0), known)
    assert [finding.level for finding in found] == ["sure", "warning", "note"]


def test_the_summary_says_what_was_counted():
    text = "\n".join(summary(config(max_prompt_tokens=849), facts(world_size=4)))
    assert "800 .. 850 .. 899 (min, median, max) tokens, 750 common to all; limit 849: 50 over it" in text
    assert "50 .. 100 .. 149 (min, median, max) tokens; limit max_new_tokens 256: 0 of 100 do not fit" in text
    assert "test, 8 shots: 1,319 problems, prompts up to 1000 tokens" in text
    assert "200 steps, 400 updates, 0.91 epochs of the 7,000 training problems" in text
    assert "8.00 GB  weights, gradient, moments" in text and "reference" not in text
    assert "at most 65,536 tokens per step" in text
    assert "no worked ones" in "\n".join(summary(config(), facts(solution_tokens=())))


def test_a_step_that_can_not_fit_is_refused_with_its_numbers():
    """750 common tokens, the shortest prompt 50 more; 32 prompts x 8 rows of up to 4,096 tokens, bfloat16 keys."""
    recipe = config(max_new_tokens=4096)
    surely = least(recipe, facts())
    assert surely.held == 7.3e9 + 2 * 150_000 * 896
    assert surely.sampling == 2 * 24 * 128 * 2 * (750 + 32 * (50 + 8 * 4096))
    for sharing in (1, 3):
        known = facts(free_bytes=int(sharing * surely.peak), sharing=sharing)
        refuse_too_large(recipe, known)
        with pytest.raises(ValueError) as refused:
            refuse_too_large(recipe, replace(known, free_bytes=known.free_bytes - 1))
    assert str(refused.value) == (
        "a step does not fit into memory: it needs 22.71 GB for weights, optimiser and copies, plus 38.74 GB for keys "
        "and values while sampling or 6.00 GB for gradients while learning, but 61.45 GB are free on cuda; "
        "lower prompts_per_step (32), group_size (8), max_new_tokens (4096), num_shots (8)"
    )


def test_a_model_that_can_not_fit_is_no_matter_of_the_sampler():
    with pytest.raises(ValueError, match="9.00 GB are free on cuda; take a smaller model, or kl_coef 0$"):
        refuse_too_large(config(), facts(free_bytes=9 * 10**9))


def test_what_is_known_before_weights_are_loaded(place, tmp_path):
    """Whether a step fits, and how many tokens a micro-batch has on a GPU."""
    runs.save_digits(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    asked = Config(model=str(tmp_path / "model"), data="jsonl", data_path=str(place / "data"), precision="bf16")
    sets, cpu = ProblemSets(asked), torch.device("cpu")
    recipe = settle(asked, cpu)
    assert budget(recipe, sets, cpu, 10**12) == MOST_TOKENS > budget(recipe, sets, cpu, 3 * 10**7)
    refuse_unfit(recipe, sets, cpu, 10**12)
    with pytest.raises(ValueError, match="a step does not fit into memory"):
        refuse_unfit(recipe, sets, cpu, 10**4)
    with pytest.raises(ValueError, match="loss is 'gppo': must be one of"):
        refuse_unfit(replace(recipe, loss="gppo"), sets, cpu, 10**12)
    with pytest.raises(ValueError, match="device is 'auto': must have a value by now; `grpo.run.machine.settle` gives"):
        refuse_unfit(asked, sets, cpu, 10**12)


def test_a_run_that_can_not_fit_ends_before_anything_is_written(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "device_memory", lambda _: (10**5, 10**12))
    assert train.main(flags(place, tmp_path)) == 2
    assert capsys.readouterr().err.startswith("train.py: error: a step does not fit into memory: ")
    assert not list((tmp_path / "checked").iterdir())


def little_memory() -> None:
    """On rank 1 alone."""
    if os.environ["RANK"] == "1":
        train.device_memory = lambda _: (10**5, 10**12)


def test_the_rank_with_the_least_memory_decides_for_all(place, tmp_path):
    processes = runs.start_train_ranks(flags(place, tmp_path), 2, tmp_path / "rank", before=little_memory)
    assert [process.wait() for process in processes] == [2, 2]
    assert all("a step does not fit into memory" in process.stderr for process in processes)


def test_spread_of():
    assert spread_of((1, 2, 9)) == "1 .. 2 .. 9 (min, median, max)"


def test_check_reads_no_weight_and_leaves_nothing_behind(place, tmp_path, capsys):
    runs.save_digits(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()  # saving shows a bar
    argv = runs.flags(str(tmp_path / "model"), str(place / "data"), tmp_path / "runs", "checked", final_eval=True)
    assert train.main([*argv, "--check"]) == 0
    out, err = capsys.readouterr()
    assert not (tmp_path / "runs").exists()
    assert "4 steps, 4 updates" in out and "0 surely wrong. Nothing was started.\n" in out
    assert "base model" not in out and err == ""


def test_something_surely_wrong_is_exit_code_1(place, tmp_path, capsys):
    assert train.main([*flags(place, tmp_path, group_size=1), "--check"]) == 1
    out = capsys.readouterr().out
    assert "\nsure     group_size is 1\n" in out
    assert "         -> group_size 8 or more.\n" in out
    assert "1 surely wrong" in out


def test_a_mistake_that_would_stop_the_run_is_found_without_starting_it(place, tmp_path, capsys):
    assert train.main([*flags(place, tmp_path, loss="gppo", max_prompt_tokens=2), "--check"]) == 1
    out = capsys.readouterr().out
    assert "loss is 'gppo': must be one of grpo" in out
    assert "training prompts exceed max_prompt_tokens (2)" in out


def test_what_a_resume_would_refuse_is_found_and_its_autos_mean_what_they_meant(place, tmp_path, capsys):
    """As if the run had been made on a GPU, where `auto` is another precision."""
    wanted = parse_args(flags(place, tmp_path, precision="auto", resume="auto"))
    (tmp_path / "checked").mkdir()
    to_yaml(settle(replace(wanted, precision="bf16"), torch.device("cpu")), tmp_path / "checked" / "config.yaml")
    same = flags(place, tmp_path, precision="auto", resume="auto")
    assert train.main([*same, "--check"]) == 0
    assert "runs on    cpu, bf16" in capsys.readouterr().out
    assert train.main([*same, "--check", "--seed", "7"]) == 1
    assert "seed is 7, but the run to resume has 0: must be the same" in capsys.readouterr().out
    (tmp_path / "checked" / "config.yaml").unlink()
    (tmp_path / "checked" / "final").mkdir()
    assert train.main([*same, "--check"]) == 1
    assert "has final/ but no checkpoint to go on from" in " ".join(capsys.readouterr().out.split())


def test_a_constant_of_the_loss_without_an_option_is_found_before_weights(place, tmp_path, capsys, monkeypatch):
    def sapo(logprobs, old_logprobs, advantages, mask, *, clip_low, sapo_tau=1.05):
        """A constant with a default, and no option of its name."""

    monkeypatch.setitem(LOSSES, "sapo", sapo)
    monkeypatch.setattr(train, "load_policy", lambda *_, **__: pytest.fail("weights were read"))
    said = "loss sapo has the constant sapo_tau, but no option has that name: add the field sapo_tau to Config"
    assert train.main(flags(place, tmp_path, loss="sapo")) == 2
    assert said in capsys.readouterr().err
    assert train.main([*flags(place, tmp_path, loss="sapo"), "--check"]) == 1
    assert said in capsys.readouterr().out


def test_without_a_model_there_is_nothing_to_check(place, tmp_path, capsys):
    argv = runs.flags(str(tmp_path / "none"), str(place / "data"), tmp_path, "checked")
    assert train.main([*argv, "--check"]) == 2
    assert capsys.readouterr().err.startswith("train.py: error: model: ")


def test_a_run_begins_with_its_warnings_and_names_trouble_once(place, tmp_path, capsys):
    data = runs.write_problems(tmp_path / "data", answer="77777")  # its digits are not even tokens
    argv = runs.flags(str(place / "model"), data, tmp_path, "checked", num_steps=7, temperature=2.0, kl_coef=0.05)
    assert train.main(argv) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("warning: temperature 2. ")]
    assert not any(line.startswith("note") for line in err.splitlines())
    (trouble,) = [line for line in out.splitlines() if "groups were flat" in line]
    assert trouble.startswith("trouble: almost all groups were flat for 5 steps")
    lines = out.splitlines()
    assert lines.index(trouble) == next(i for i, line in enumerate(lines) if line.startswith("step 5/7")) + 1


def test_two_processes_check_as_one(place, tmp_path):
    argv = [*flags(place, tmp_path / "runs"), "--check"]
    processes = runs.start_train_ranks(argv, 2, tmp_path / "rank")
    assert [process.wait() for process in processes] == [0, 0]
    assert "processes: 2" in processes[0].stdout and processes[1].stdout == ""
    assert not (tmp_path / "runs").exists()
