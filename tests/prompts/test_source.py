"""What a model is asked is named once for training and evaluation, and reaches the data."""

import dataclasses

from grpo.config import Config
from grpo.dataloader import ProblemSets
from grpo.evaluation.protocol import EvalOptions, options_of
from grpo.options import facts_of
from grpo.prompts.source import Source


def test_an_evaluation_of_a_run_asks_what_training_asked(tmp_path):
    given = {"data": "hub", "data_path": "d", "prompt_column": "p", "answer_column": "a", "answer_rule": "boxed"}
    given |= {"chat": True, "seed": 3, "model": "m", "revision": "v"}
    names = {field.name for field in dataclasses.fields(Source)}
    others = {name: f"{name}.txt" for name in names - given.keys()}
    config = Config(**given, **others)
    options = options_of(config, tmp_path)
    assert {name: getattr(options, name) for name in names} == given | others
    assert options.loading() == config.loading()


def test_options_reach_the_data_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "1+1?", "gold": "so \\\\boxed{2}"}\n')
    asked = {"prompt_column": "text", "answer_column": "gold", "answer_rule": "boxed"}
    sets = ProblemSets(EvalOptions(model="m", data="hub", data_path=str(tmp_path), **asked))
    (problem,) = sets.problems("train", 0)
    assert (problem.prompt, problem.answer) == ("1+1?", "2")


def test_what_an_answer_depends_on_is_a_result_of_an_evaluation():
    assert "data_path" in facts_of(EvalOptions, "no_result") and "answer_rule" not in facts_of(EvalOptions, "no_result")
