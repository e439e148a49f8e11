"""A problem is a plain frozen record: it can be compared and sent to another process."""

import dataclasses
import pickle

import pytest

from data.problem import Problem


def test_a_problem_is_frozen_and_travels():
    problem = Problem("Question: 1 + 1?", "2", {"question": "1 + 1?", "shots": [], "stop": ["\n"]})
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert [field.name for field in dataclasses.fields(Problem)] == ["prompt", "answer", "info"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.answer = "3"
