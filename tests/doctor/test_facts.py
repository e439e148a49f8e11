"""Facts are those of the data, the tokenizer and the shapes; no weight is read."""

import json

import pytest
import torch

from grpo import distributed
from grpo.config import Config, to_yaml
from grpo.dataloader import ProblemSets
from grpo.doctor.facts import gather, outline, sizes, spread
from grpo.policy import load_shapes
from tests.doctor.test_check_graders import problem
from tests.fakes.models import save_tiny, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    (path / "model.safetensors").write_bytes(b"")  # whoever reads weights fails
    return str(path)


def write(directory, train: list[dict], test: list[dict]) -> str:
    for name, rows in (("train", train), ("test", test)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def row(i: int, **more) -> dict:
    return {"prompt": f"common {i:03d}", "answer": str(i), **more}


def look(model: str, at_most: int = 0, **changes):
    config = Config(model=model, **changes)
    return gather(config, ProblemSets(config), CPU, at_most)


def stopping(facts) -> list[str]:
    """The sentences with which the run would stop before its first step."""
    return [finding.what for finding in facts.found if finding.means.startswith("The run would stop")]


def test_facts_of_a_data_set(model, tmp_path):
    path = write(tmp_path, [row(i, stop=["##"]) for i in range(40)], [row(i) for i in range(100, 105)])
    facts = look(model, data="jsonl", data_path=path)
    assert facts.num_train == 36  # a tenth is validation
    assert facts.prompt_tokens == (10,) * 36  # one token per byte
    assert facts.shared_tokens == len("common 0")
    assert facts.solution_tokens == () and facts.found == ()
    (evaluation,) = facts.evaluations
    assert (evaluation.split, evaluation.shots, evaluation.n, evaluation.longest_prompt) == ("test", 0, 5, 10)
    assert evaluation.also_trained == ()
    assert look(model, at_most=10, data="jsonl", data_path=path).prompt_tokens == facts.prompt_tokens


def test_c68_prompts_left_out_are_counted_and_enter_no_estimate(model, tmp_path):
    """The kind is that of tests/test_rollout.py. A problem of an evaluation that is too long stays what it is."""
    train, long = [row(i) for i in range(40)], {"prompt": "x" * 50, "answer": "1"}
    path = write(tmp_path, [*train, *(long | {"prompt": f"{i:02d}" * 25} for i in range(20))], [*train[:3], long])
    plain, skipped = (look(model, data="jsonl", data_path=path, max_prompt_tokens=20, skip_long_prompts=skip)
                      for skip in (False, True))  # fmt: skip
    assert (plain.left_out, plain.prompt_tokens[-1], skipped.prompt_tokens[-1]) == (0, 50, 10)
    assert skipped.left_out + len(skipped.prompt_tokens) == len(plain.prompt_tokens) == plain.num_train
    assert skipped.num_train == len(skipped.prompt_tokens)
    assert skipped.evaluations == plain.evaluations and plain.evaluations[0].longest_prompt == 50


def test_test_questions_that_are_trained_on(model, tmp_path):
    train = [row(i) for i in range(40)]
    facts = look(model, data="jsonl", data_path=write(tmp_path, train, [row(200), *train]))
    assert len(facts.evaluations[0].also_trained) == 36  # those of validation are not trained on


def test_what_would_stop_a_run_is_collected(model, tmp_path):
    path = write(tmp_path, [row(i) for i in range(40)], [])
    facts = look(model, data="jsonl", data_path=path, loss="gppo", rewards=("gsm8k.x",), reward_weights=(1.0,))
    errors = stopping(facts)
    assert len(errors) == 3
    for said in ("no test problems", "loss is 'gppo'", "'gsm8k.x' is not one of"):
        assert any(said in error for error in errors), errors


def test_a_reward_that_asks_how_a_text_was_sampled_is_not_tried_on_texts_of_ours(model, tmp_path, monkeypatch):
    path, tried = write(tmp_path, [row(i) for i in range(3)], [row(7)]), []
    monkeypatch.setattr("grpo.doctor.facts.examine", lambda made, judges, *_, **__: tried.append((made, judges)) or [])
    asked = {"rewards": ("length.soft_overlong", "gsm8k.format"), "reward_weights": (3.0, 2.0)}
    look(model, data="jsonl", data_path=path, **asked, eval_format="length.stop_properly")
    ((made, judges),) = tried
    assert (made.rewards, made.reward_weights, judges) == (("gsm8k.format",), (2.0,), ["gsm8k.correctness"])
    look(model, data="jsonl", data_path=path, **asked, eval_correct="length.stop_properly")
    assert tried[1][1] == []  # the first judge is the one that says what is right
    alone = {"rewards": ("length.repetition",), "reward_weights": (1.0,)}
    look(model, data="jsonl", data_path=path, **alone)
    assert len(tried) == 2


def test_a_run_of_that_name_is_in_the_way_unless_it_is_resumed(model, tmp_path):
    path = write(tmp_path, [row(i) for i in range(40)], [row(100)])
    (tmp_path / "run").mkdir()
    changes = {"data": "jsonl", "data_path": path, "out_dir": str(tmp_path), "run_name": "run"}
    assert stopping(look(model, **changes)) == []
    (tmp_path / "run" / "notes.txt").touch()  # whatever it holds, nothing is written there
    (error,) = stopping(look(model, **changes))
    assert "run exists already" in error
    assert stopping(look(model, **changes, resume="auto")) == []
    to_yaml(Config(model=model, **changes, kl_coef=0.5), tmp_path / "run" / "config.yaml")
    (error,) = stopping(look(model, **changes, resume="auto"))
    assert error.startswith("kl_coef is 0.01, but the run to resume has 0.5")


def test_solutions_are_measured_with_their_answer_line(model):
    facts = look(model, at_most=20, final_eval=False)
    assert facts.evaluations == () and len(facts.solution_tokens) == 20
    assert facts.solution_tokens[0] > len("\n#### The final answer is 2")


def test_shapes_without_weights_are_those_of_the_model(model):
    shapes, _ = load_shapes(model)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert sizes(shapes) == sizes(tiny_model())
    assert sizes(shapes).parameters == sum(p.numel() for p in tiny_model().parameters())
    assert (sizes(shapes).layers, sizes(shapes).width, sizes(shapes).key_width) == (2, 32, 16)
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 32 + 16 + 16  # and the biases of query, key and value
    assert sizes(shapes).rounded == 2 * per_layer


def test_processes_of_a_machine_share_its_memory_and_each_has_its_gpu(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 80))
    monkeypatch.setattr(distributed, "world_size", lambda: 8)

    def seen(device: str):
        config = Config(model=model)
        return outline(config, ProblemSets(config, {("train", 0): [problem("4")]}), torch.device(device))

    assert (seen("cuda").world_size, seen("cuda").sharing, seen("cuda").free_bytes) == (8, 1, 7)
    assert seen("cpu").sharing == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert seen("cpu").sharing == 4


def test_spread():
    assert spread(range(10), 0) == list(range(10))
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 4) == [0, 1, 2]
