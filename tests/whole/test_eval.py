"""The command line of eval.py: what it prints and writes, on one process and on two, and what it refuses."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import eval as command
from grpo.evaluation.protocol import EvalOptions
from grpo.options import read_yaml
from grpo.sampler import Sampler
from tests.fakes import runs
from tests.fakes.models import save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    runs.save_digits(place / "base")
    runs.save_digits(place / "tuned", seed=1)
    runs.write_problems(place / "data", num_test=9)
    return place


def argv(place: Path, out: str, /, **changes) -> list[str]:
    options = {"model": place / "base", "tuned": place / "tuned", "data": "jsonl", "data_path": place / "data"}
    options |= {"device": "cpu", "budget": 8, "graders": "last_number", "out": place / out} | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def result(place: Path, out: str) -> dict:
    return json.loads((place / out / "eval.json").read_text())


def test_base_and_tuned_side_by_side(place, capsys):
    assert command.main(argv(place, "both")) == 0
    out, err = capsys.readouterr()
    assert [line.rpartition(" in ")[0] for line in err.splitlines() if "completions" in line] == [
        "base, 0 shots: 9 completions", "tuned, 0 shots: 9 completions"
    ]  # fmt: skip
    assert read_yaml(EvalOptions, place / "both" / "options.yaml").budget == 8
    cells = result(place, "both")["cells"]
    assert [cell["model"] for cell in cells] == ["base", "base", "tuned", "tuned"]
    assert all((cell["n"], cell["shots"]) == (9, 0) for cell in cells)
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("base ", "tuned "))] == [
        cell["model"] for cell in cells
    ]
    assert out.splitlines()[-1] == f"transcripts: {place / 'both'}"
    assert sorted(path.name for path in (place / "both").iterdir()) == [
        "base_0shots.jsonl", "eval.json", "options.yaml", "tuned_0shots.jsonl"
    ]  # fmt: skip


def test_shots_limit_and_one_model_alone(place, tmp_path):
    model = save_tiny(tmp_path / "bytes")
    words = ["--model", model, "--data", "arithmetic", "--shots", "0,2", "--limit", "3", "--budget", "4"]
    assert command.main([*words, "--device", "cpu", "--batch", "2", "--out", str(tmp_path / "out")]) == 0
    cells = result(tmp_path, "out")["cells"]
    assert {(cell["model"], cell["shots"], cell["n"]) for cell in cells} == {("base", 0, 3), ("base", 2, 3)}
    rows = [json.loads(line) for line in (tmp_path / "out" / "base_2shots.jsonl").read_text().splitlines()]
    assert all(row["prompt"].count("#### The final answer is") == 2 for row in rows)


def test_two_processes_give_the_same(place):
    assert command.main(argv(place, "alone", precision="fp64")) == 0
    argv_of_both = argv(place, "together", precision="fp64")
    ranks = runs.start_ranks(partial(runs.call_main, "eval", argv_of_both), 2, place / "ranks")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert result(place, "together") == result(place, "alone")
    assert ranks[0].stdout and not ranks[1].stdout
    for name in ("base_0shots.jsonl", "tuned_0shots.jsonl"):
        assert (place / "together" / name).read_text() == (place / "alone" / name).read_text()


def test_regrade_needs_no_model(place, capsys):
    assert command.main(argv(place, "graded")) == 0
    first = result(place, "graded")
    again = ["--regrade", str(place / "graded"), "--graders", "last_number", "--out", str(place / "regraded")]
    assert command.main(again) == 0
    assert result(place, "regraded") == first


def test_a_prompt_too_long_at_the_last_number_of_shots_shows_before_any_work(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "generate", None)
    words = ["--model", save_tiny(tmp_path / "bytes"), "--shots", "0,2", "--max_prompt_tokens", "300"]
    assert command.main([*words, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "prompts are longer than 300 tokens" in capsys.readouterr().err


def test_several_samples_are_printed_as_pass_and_majority(place, capsys):
    assert command.main(argv(place, "several", samples=3, temperature=1.0, limit=4)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "pass@" in line]
    assert len(lines) == 4 and all("pass@1 " in line and "pass@3 " in line and "majority@3 " in line for line in lines)
    (cell,) = [cell for cell in result(place, "several")["cells"] if (cell["model"], cell["stop"]) == ("base", "eos")]
    assert f"majority@3 {cell['majority']['value']:.3f} (" in lines[1]


def test_a_reward_that_fails_is_named_with_its_reason(place, capsys, monkeypatch):
    monkeypatch.setattr("rewards.runner.RewardRunner.score", fails_on_the_last)
    assert command.main(argv(place, "failing", graders="gsm8k.correctness", limit=3)) == 0
    out = capsys.readouterr().out
    assert "warning: gsm8k.correctness failed on 1 of 3 texts (tuned, 0 shots, eos), which count as wrong; the" in out
    assert "first: it broke" in out and out.count("gsm8k.correctness failed") == 4
    assert result(place, "failing")["cells"][0]["failures"]["gsm8k.correctness"] == {"texts": 1, "first": "it broke"}


def fails_on_the_last(runner, completions, problems):
    """Instead of `RewardRunner.score`: 1 for all but the last text."""
    runner.first_errors = dict.fromkeys(runner.names, "it broke")
    return [[1.0] * (len(completions) - 1) + [None] for _ in runner.names]


def test_an_evaluation_that_is_there_is_not_overwritten(place, capsys):
    assert command.main(argv(place, "once", limit=2)) == 0
    before = (place / "once" / "eval.json").read_bytes()
    assert command.main(argv(place, "once", limit=3)) == 2
    assert "holds an evaluation already" in capsys.readouterr().err
    assert (place / "once" / "eval.json").read_bytes() == before


def answers_asked_for(monkeypatch) -> list[int]:
    """Every place in the data that `Sampler.generate` is called for from now on."""
    asked: list[int] = []
    generate = Sampler.generate

    def count(sampler, *arguments, **options):
        asked.extend(options["prompt_index"])
        return generate(sampler, *arguments, **options)

    monkeypatch.setattr(Sampler, "generate", count)
    return asked


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_asked_to_stop_and_again_and_the_same_command_goes_on(place, monkeypatch, capsys):
    """In the base's texts on two ranks, then in the tuned model's: nothing is answered twice, all as in one go."""
    assert command.main(argv(place, "in_one")) == 0
    once, then = argv(place, "in_three", batch=2), argv(place, "in_three", batch=5)
    where = runs.asked_to_stop("grpo.sampler:Sampler.generate", 1, signal.SIGINT, rank=1)
    ended = runs.start_ranks(
        partial(runs.call_main, "eval", once, where), 2, place / "asked_ranks"
    )  # 4 of the base's 9
    where = runs.asked_to_stop("grpo.sampler:Sampler.generate", 2, signal.SIGINT)
    assert [process.wait() for process in ended] == [0, 0], ended[0].stderr
    ended.append(runs.start(then, place / "asked_out", program="eval", before=where))  # 5, and 5 of the tuned model
    assert ended[2].wait() == 0, ended[2].stderr
    for process in ended:
        assert f"the answers so far are in {place / 'in_three'}, and the same command continues" in process.stderr
        assert "Traceback" not in process.stderr
    assert not (place / "in_three" / "eval.json").exists()
    assert command.main(["--regrade", str(place / "in_three")]) == 2
    assert "holds an unfinished evaluation; finish it" in capsys.readouterr().err
    asked = answers_asked_for(monkeypatch)
    assert command.main(argv(place, "in_three")) == 0
    assert len(asked) == len(set(asked)) == 4
    assert files(place / "in_three") == files(place / "in_one")
    (place / "in_three" / "unfinished.json").write_text("{}")  # as if killed when all but this was done
    assert command.main(["--regrade", str(place / "in_three"), "--graders", "last_number"]) == 0
    assert files(place / "in_three") == files(place / "in_one")


def cut_short(place: Path, out: str, **changes) -> None:
    where = runs.asked_to_stop("grpo.sampler:Sampler.generate", 2, signal.SIGINT)
    process = runs.start(argv(place, out, batch=2, **changes), place / "cut_out", program="eval", before=where)
    assert process.wait() == 0, process.stderr


def test_what_was_answered_is_for_the_same_evaluation_only(place, capsys, tmp_path):
    model = runs.save_digits(tmp_path / "model")
    cut_short(place, "part", model=model)
    before = files(place / "part")
    for change in ({"budget": 7}, {"seed": 1}, {"model": place / "base"}, {"precision": "fp64"}):
        assert command.main(argv(place, "part", **{"model": model} | change)) == 2, change
        assert (
            f"{place / 'part'} holds an unfinished evaluation with other options or weights" in capsys.readouterr().err
        )
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(0, 0))  # as if they had been written again
    assert command.main(argv(place, "part", model=model)) == 2
    assert files(place / "part") == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"budget": 7, "brand_new": 1}', "other options or weights (brand_new, budget"),
        ("{", "unfinished.json: not JSON"),
    ],
)
def test_c62_a_part_of_another_version_is_a_sentence_that_names_what_differs(place, capsys, tmp_path, content, said):
    """Kind: a file that is read back is taken to be of this version, and another one ends in a traceback."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "unfinished.json").write_text(content)
    assert command.main(argv(place, tmp_path / "part")) == 2
    assert said in capsys.readouterr().err


def test_a_problem_that_has_changed_is_asked_again(place, tmp_path, monkeypatch):
    data = Path(runs.write_problems(tmp_path / "data", num_test=9))
    cut_short(place, "changed", data_path=data)
    kept = [json.loads(line)["index"] for line in (place / "changed" / "base_0shots.jsonl").read_text().splitlines()]
    assert len(kept) == 4
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    lines[kept[0]]["answer"], lines[kept[1]]["prompt"] = "4", "1="
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = answers_asked_for(monkeypatch)
    assert command.main(argv(place, "changed", data_path=data, graders="last_number,marker")) == 0
    assert sorted(asked) == sorted([*range(9), *(set(range(9)) - set(kept[2:]))])  # by the tuned model, and the base
    rows = [json.loads(line) for line in (place / "changed" / "base_0shots.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(9))
    assert rows[kept[0]]["answer"] == "4" and rows[kept[1]]["prompt"] == "1="


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("model", "/nowhere", "model: '/nowhere' can not be loaded"),
        ("tuned", "/nowhere", "tuned: '/nowhere' can not be loaded"),
        ("data", "gsm9k", "data: 'gsm9k' is not one of"),
        ("graders", "last_numbr", "graders: 'last_numbr' is not one of"),
        ("format", "gsm8k.nope", "'gsm8k.nope' is not one of"),
        ("shots", "0,0", "shots is (0, 0): must be a list, each item a whole number >= 0, one or more, none twice"),
        ("max_prompt_tokens", "2", "max_prompt_tokens: 9 of 9 prompts are longer than 2 tokens"),
        ("chat", "True", "chat: True needs a tokenizer with a chat template"),
        ("limt", "3", "--limt is not an option; did you mean limit?"),
        ("out", "/proc/nowhere", "out: /proc/nowhere can not be made (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(place, capsys, monkeypatch, option, value, sentence):
    capsys.readouterr()
    monkeypatch.setattr(Sampler, "generate", None)
    try:
        code = command.main(argv(place, "mistake", **{option: value}))
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and sentence in err
    assert err.startswith("eval.py: error: ") and err.count("\n") == 1
    assert not (place / "mistake").exists() or not list((place / "mistake").iterdir())


def test_out_of_memory_is_one_sentence(place, capsys, monkeypatch):
    def run_out(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Sampler, "generate", run_out)
    capsys.readouterr()
    assert command.main(argv(place, "too_much")) == 2
    err = capsys.readouterr().err
    assert err == "eval.py: error: out of memory; lower batch, budget or the number of shots (CUDA out of memory)\n"


def test_help_needs_no_model(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0 and "--regrade" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("timeout", 0, "timeout is 0.0"), ("timeout", "nan", "timeout"), ("temperature", "nan", "temperature is nan")]
    + [("temperature", "inf", "temperature is inf"), ("seed", 2**63, "seed is 9223372036854775808")],
)
def test_a_number_that_can_not_be_is_one_sentence(place, capsys, option, value, said):
    with pytest.raises(SystemExit) as ended:
        command.main(argv(place, "never", **{option: value}))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1


def test_a_tuned_model_with_broken_weights_shows_before_the_base_is_asked(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "generate", None)
    broken = shutil.copytree(place / "tuned", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert command.main(argv(place, "broken", tuned=broken)) == 2
    assert f"eval.py: error: tuned: {str(broken)!r} can not be loaded" in capsys.readouterr().err


def test_regrading_overwrites_no_other_evaluation_and_is_remembered(place, capsys):
    assert command.main(argv(place, "one")) == command.main(argv(place, "other")) == 0
    before = result(place, "other")
    words = ["--regrade", str(place / "one"), "--graders", "published"]
    assert command.main([*words, "--out", str(place / "other")]) == 2
    assert "holds an evaluation already" in capsys.readouterr().err and result(place, "other") == before
    assert command.main(words) == 0
    assert read_yaml(EvalOptions, place / "one" / "options.yaml").graders == ("published",)


@pytest.mark.parametrize("line", ["{", "[1]", "null", "3", '{"model": "base"}', "\xff"])
def test_a_line_that_is_none_of_a_transcript_is_named(place, tmp_path, capsys, line):
    (tmp_path / "base_0shots.jsonl").write_text(line + "\n", encoding="latin-1")
    assert command.main(["--regrade", str(tmp_path)]) == 2
    assert "regrade: " in (err := capsys.readouterr().err) and "base_0shots.jsonl, line 1: " in err


@pytest.fixture(scope="module")
def both(place) -> Path:
    """An evaluation of two models."""
    assert command.main(argv(place, "complete")) == 0
    return place / "complete"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completion": None}, "line 1: completion is None: must be of type str"),
        ({"shots": "a"}, "line 1: shots is 'a': must be of type int"),
        ({"tokens": "3"}, "line 1: tokens is '3'"),
        ({"stop_tokens": [1]}, "line 1: stop_tokens is [1]: must be of type int | None"),
        ({"info": None}, "line 1: info is None"),
        ({"stop": "##"}, "line 1: stop is '##'"),
        ({"stop": [3]}, "stop must be a list of texts"),
        ({"sample": 3}, "must hold 4 sample(s) of each problem"),
        ({"index": 99}, "must hold 1 sample(s) of each problem that the others hold"),
        (None, "must hold 1 sample(s) of each problem that the others hold"),
    ],
)
def test_a_transcript_of_wrong_values_is_one_sentence_and_loses_nothing(both, tmp_path, capsys, change, said):
    damaged = shutil.copytree(both, tmp_path / "damaged")
    first, *rest = (damaged / "tuned_0shots.jsonl").read_text().splitlines(keepends=True)
    first = "" if change is None else json.dumps(json.loads(first) | change) + "\n"
    (damaged / "tuned_0shots.jsonl").write_text(first + "".join(rest))
    before = (damaged / "eval.json").read_text()
    capsys.readouterr()
    assert command.main(["--regrade", str(damaged), "--graders", "published"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval.py: error: regrade: ") and "tuned_0shots.jsonl" in err and said in err
    assert err.count("\n") == 1 and (damaged / "eval.json").read_text() == before
