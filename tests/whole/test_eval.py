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
from grpo.files import write_lines
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


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_base_and_tuned_side_by_side(place, capsys):
    assert command.main(argv(place, "both")) == 0
    out, err = capsys.readouterr()
    assert [line.rpartition(" in ")[0] for line in err.splitlines() if "completions" in line] == [
        "tuned, 0 shots: 9 completions", "base, 0 shots: 9 completions"
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
    rows = lines_of(tmp_path / "out" / "base_2shots.jsonl")
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


def test_a_prompt_too_long_at_the_last_number_of_shots_shows_before_any_work(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "generate", None)
    words = ["--model", save_tiny(tmp_path / "bytes"), "--shots", "0,2", "--max_prompt_tokens", "300"]
    assert command.main([*words, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "prompts are longer than 300 tokens" in capsys.readouterr().err


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
    """In the tuned model's texts on two ranks, then in the base's: nothing is answered twice, all as in one go."""
    assert command.main(argv(place, "in_one")) == 0
    once, then = argv(place, "in_three", batch=2), argv(place, "in_three", batch=5)
    where = runs.asked_to_stop("grpo.sampler:Sampler.generate", 1, signal.SIGINT, rank=1)
    # 4 of the tuned model's 9
    ended = runs.start_ranks(partial(runs.call_main, "eval", once, where), 2, place / "asked_ranks")
    where = runs.asked_to_stop("grpo.sampler:Sampler.generate", 2, signal.SIGINT)
    assert [process.wait() for process in ended] == [0, 0], ended[0].stderr
    ended.append(runs.start(then, place / "asked_out", program="eval", before=where))  # 5, and 5 of the base's
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
    (tmp_path / "part" / "base_0shots.jsonl").write_text("")
    (tmp_path / "part" / "unfinished.json").write_text(content)
    assert command.main(argv(place, tmp_path / "part")) == 2
    assert said in capsys.readouterr().err


def test_a_problem_that_has_changed_is_asked_again(place, tmp_path, monkeypatch):
    data = Path(runs.write_problems(tmp_path / "data", num_test=9))
    cut_short(place, "changed", data_path=data)
    kept = [row["index"] for row in lines_of(place / "changed" / "tuned_0shots.jsonl")]
    assert len(kept) == 4
    lines = lines_of(data / "test.jsonl")
    lines[kept[0]]["answer"], lines[kept[1]]["prompt"] = "4", "1="
    write_lines(data / "test.jsonl", lines)
    asked = answers_asked_for(monkeypatch)
    assert command.main(argv(place, "changed", data_path=data, graders="last_number,marker")) == 0
    assert sorted(asked) == sorted([*range(9), *(set(range(9)) - set(kept[2:]))])  # by the base, and the tuned model
    rows = lines_of(place / "changed" / "tuned_0shots.jsonl")
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


def test_a_tuned_model_with_broken_weights_shows_before_the_base_is_asked(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "generate", None)
    broken = shutil.copytree(place / "tuned", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert command.main(argv(place, "broken", tuned=broken)) == 2
    assert f"eval.py: error: tuned: {str(broken)!r} can not be loaded" in capsys.readouterr().err


def test_regrading_needs_no_model_is_remembered_and_overwrites_no_other_evaluation(place, capsys, monkeypatch):
    assert command.main(argv(place, "one")) == 0
    first = result(place, "one")
    monkeypatch.setattr("grpo.evaluation.compare.load_policy", None)
    words = ["--regrade", str(place / "one"), "--graders"]
    assert command.main([*words, "last_number", "--out", str(place / "other")]) == 0
    assert result(place, "other") == first
    assert command.main([*words, "published", "--out", str(place / "other")]) == 2
    assert "holds an evaluation already" in capsys.readouterr().err and result(place, "other") == first
    with pytest.raises(SystemExit):
        command.main([*words, "published", "--budget", "9"])
    said = "budget: must be left out with --regrade, which allows only reasoning_end, graders"
    assert said in capsys.readouterr().err
    assert command.main([*words, "published"]) == 0
    assert read_yaml(EvalOptions, place / "one" / "options.yaml").graders == ("published",)
    assert {cell["grader"] for cell in result(place, "one")["cells"]} == {"published"}


@pytest.fixture(scope="module")
def both(place) -> Path:
    """An evaluation of two models."""
    assert command.main(argv(place, "complete")) == 0
    return place / "complete"


def changed(**change):
    """A line of a transcript with another field."""
    return lambda line: json.dumps(json.loads(line) | change) + "\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: "{\n", "line 1: not JSON"),
        (lambda line: "\xff\n", "line 1: not JSON"),
        (lambda line: "null\n", "line 1: must be a JSON object"),
        (lambda line: '{"model": "base"}\n', "line 1: lacks 'question'"),
        (lambda line: "", "must hold 1 sample(s) of each problem that the others hold"),
        (changed(completion=None), "line 1: completion is None: must be of type str"),
        (changed(shots="a"), "line 1: shots is 'a': must be of type int"),
        (changed(stop_tokens=[1]), "line 1: stop_tokens is [1]: must be of type int | None"),
        (changed(stop="##"), "line 1: stop is '##'"),
        (changed(stop=[3]), "stop must be a list of texts"),
        (changed(sample=3), "must hold 4 sample(s) of each problem"),
        (changed(index=99), "must hold 1 sample(s) of each problem that the others hold"),
    ],
)
def test_a_damaged_transcript_is_one_sentence_and_loses_nothing(both, tmp_path, capsys, change, said):
    damaged = shutil.copytree(both, tmp_path / "damaged")
    first, *rest = (damaged / "tuned_0shots.jsonl").read_text().splitlines(keepends=True)
    (damaged / "tuned_0shots.jsonl").write_text(change(first) + "".join(rest), encoding="latin-1")
    before = (damaged / "eval.json").read_text()
    capsys.readouterr()
    assert command.main(["--regrade", str(damaged), "--graders", "published"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval.py: error: regrade: ") and "tuned_0shots.jsonl" in err and said in err
    assert err.count("\n") == 1 and (damaged / "eval.json").read_text() == before


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_missing_transcript_is_one_sentence_and_loses_nothing(both, tmp_path, capsys, name):
    some = shutil.copytree(both, tmp_path / "some")
    (some / f"{name}_0shots.jsonl").unlink()
    before = (some / "eval.json").read_text()
    capsys.readouterr()
    assert command.main(["--regrade", str(some), "--graders", "published"]) == 2
    said = f"has no {name}_0shots.jsonl, but its options.yaml says it has; put it back\n"
    assert capsys.readouterr().err == f"eval.py: error: regrade: {some} {said}"
    assert (some / "eval.json").read_text() == before
