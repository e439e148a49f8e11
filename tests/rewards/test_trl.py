"""Reward functions in the form of TRL are called as TRL calls them, one sample at a time."""

import math

import pytest

import rewards
from data.problem import Problem
from rewards.trl import DOES_NOT_APPLY, adapted, is_trl
from rewards.worker import grade

PROBLEM = Problem("1+1=", "2", {"question": "1+1?", "level": 3, "system": "Add."})
TOLD = {"whole": "so <think> 2", "chat": False}
SAID = [{"role": "assistant", "content": "so <think> 2"}]
ASKED = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]


def call(function, **changes):
    return adapted(function)("2", PROBLEM, **TOLD | changes)


def test_all_columns_are_lists_of_one():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.5]

    assert call(everything) == 0.5
    assert seen["prompts"] == ["1+1="] and seen["completions"] == ["so <think> 2"]
    assert (seen["answer"], seen["level"], seen["question"]) == (["2"], [3], ["1+1?"]) and "completion_ids" not in seen
    assert call(everything, chat=True) == 0.5
    assert (seen["prompts"], seen["completions"]) == ([ASKED], [SAID])


def test_only_what_is_named_is_given_where_there_is_no_place_for_the_rest():
    assert call(lambda completions: [len(completions)]) == 1
    assert call(lambda completions, level, *, answer: [level[0] + int(answer[0])]) == 5
    assert call(lambda completions, other=7: [other]) == 7


def test_token_ids_are_asked_for_by_name():
    def by_tokens(completions, completion_ids, **_):
        return [len(completion_ids[0])]

    assert rewards.asks_for(adapted(by_tokens)) == ("whole", "chat", "tokens")
    assert call(by_tokens, tokens=[1, 2, 3]) == 3
    assert rewards.asks_for(adapted(lambda completions, **_: [0])) == ("whole", "chat")


def test_numbers_of_ones_own_are_reported_as_in_trl():
    def logs(completions, log_metric):
        log_metric("parsed", len(completions))
        return [1.0]

    reported = {}
    assert "log_metric" in rewards.asks_for(adapted(logs))
    assert call(logs, log_metric=reported.__setitem__) == 1.0 and reported == {"parsed": 1}


def test_none_means_that_it_does_not_apply_and_is_no_failure():
    assert call(lambda completions, **_: [None]) is DOES_NOT_APPLY
    value, reason, message = grade(adapted(lambda completions, **_: [None]), "2", PROBLEM, TOLD)
    assert value == -math.inf and (reason, message) == ("", "")
    assert grade(lambda completion, problem: None, "2", PROBLEM)[1] == "returned_none"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda completions, **_: [1.0, 2.0], "returned 2 values for 1 completion"),
        (lambda completions, **_: 1.0, "TypeError"),
        (lambda completions, missing: [1.0], "missing 1 required positional argument: 'missing'"),
    ],
)
def test_another_result_is_a_failed_call(function, said):
    value, reason, message = grade(adapted(function), "2", PROBLEM, TOLD)
    assert (value, reason) == (None, "raised") and said in message


def test_the_form_is_known_by_the_name_of_an_argument():
    assert is_trl(lambda completions, **_: [0]) and is_trl(lambda prompts, *, completions: [0])
    assert not is_trl(lambda completion, problem: 0) and not is_trl(lambda completion, problem, **more: 0)
    assert not is_trl(min)


def test_what_is_known_of_the_function_is_kept():
    def reward(completions, **_):
        return [0.5]

    reward.full_value = 0.5
    assert adapted(reward).full_value == 0.5 and adapted(reward).__name__ == "reward"
