"""Prompts: what chat templates, tokenizers and problems bring that is no plain text. More is in test_rollout.py."""

from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

import data
import train
from data.problem import Problem
from grpo import dataloader
from grpo.config import Config
from grpo.dataloader import ProblemSets, encode_prompts, fill_template, render, stop_strings, tokenize, written_behind
from tests.fakes import runs
from tests.fakes.puppet import TURNS, ids, puppet_sampler, saved_puppet, special_tokenizer

EOS, CHAT = {"<eos>": 256}, {"<eos>": 256, "<|start|>": 257, "<|end|>": 258}
PROBLEM = Problem("9+9=", "18", {"question": "9+9?"})
SYSTEM = Problem("9+9=", "18", {"question": "9+9?", "system": " You add. "})


# ---- what tokenizers write around a text -----------------------------------------------------------------------------


def test_c46_what_a_tokenizer_writes_behind_every_text_is_taken_off_prompts():
    """The kind: a token that says that the text is over, at the end of a prompt that is to be completed."""
    plain, behind = special_tokenizer(EOS), special_tokenizer(EOS, behind="<eos>")
    assert behind("9+9=").input_ids[-1] == 256 and written_behind(behind) == [256] and written_behind(plain) == []
    for tokenizer in (plain, behind):
        (encoded,) = encode_prompts([PROBLEM], tokenizer, chat=False, max_prompt_tokens=9)
        assert encoded.tolist() == ids(tokenizer, "9+9=") == tokenize(["9+9="], tokenizer)[0]


def test_c46_what_it_writes_in_front_stays():
    class Both:
        def __call__(self, texts, add_special_tokens):
            encoded = special_tokenizer(EOS)(texts, add_special_tokens=False)
            around = lambda row: [1, 2, *row, 3] if add_special_tokens else row  # noqa: E731
            encoded["input_ids"] = [around(row) for row in encoded["input_ids"]]
            return encoded

    assert written_behind(Both()) == [3]
    assert tokenize(["11", "a"], Both()) == [[1, 2, *ids(special_tokenizer(EOS), text)] for text in ("11", "a")]


# ---- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must\\nalternate') }}", "can not render turns of user: Roles must alternate"),
        ("{{ messages.nothing.at_all }}", "can not render turns of user: 'list object' has no attribute 'nothing'"),
        ("{% for m in messages %}", "can not render turns of user: Unexpected end of template"),
        ("{{ ['a', 'b'] | random }}{{ messages[0].content }}", "draws at random"),
    ],
)
def test_c51_a_template_that_raises_is_one_sentence(template, said, tmp_path, capsys):
    """The kind: what another program raises when it is given our input. Exit code 2, in a run and in --check."""
    tokenizer = special_tokenizer(EOS, template=template)
    with pytest.raises(ValueError, match="chat: the tokenizer's template") as error:
        encode_prompts([PROBLEM], tokenizer, chat=True, max_prompt_tokens=99)
    assert said in str(error.value) and "\n" not in str(error.value)
    model = saved_puppet(tmp_path / "model", tokenizer, [65, 256])
    runs.write_problems(tmp_path / "data")
    capsys.readouterr()
    flags = runs.flags(model, str(tmp_path / "data"), tmp_path / "runs", "x", chat=True)
    for argv in (flags, [*flags, "--check"]):
        assert train.main(argv) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"train.py: error: {error.value}"


@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  x", "{%- if true -%} {% endif -%} "])
def test_c52_a_template_that_asks_for_the_date_is_told_the_same_on_every_day(start, monkeypatch):
    """The kind: a prompt that depends on something else than the data and the seed."""
    written = "%d %b %Y|%-d. %B %y, %A|%Y-%m-%d %H:%M:%S|%F %j"
    template = start + "{% if strftime_now is defined %}{% for m in messages %}{{ strftime_now('" + written + "') }}"
    tokenizer = special_tokenizer(EOS, template=template + "{% endfor %}{% endif %}")
    turns = [{"role": "user", "content": "x"}]
    ours = fill_template(tokenizer, turns, add_generation_prompt=True)

    class Fixed(datetime):
        @classmethod
        def now(cls, tz=None):
            return dataloader.DAY

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)
    chat_template_utils._compile_jinja_template.cache_clear()
    theirs = tokenizer.apply_chat_template(turns, tokenize=False)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert ours == theirs and dataloader.DAY.strftime(written) in ours


def test_c52_a_template_without_a_clock_is_left_as_it_is():
    tokenizer = special_tokenizer(CHAT, template=TURNS)
    assert render(PROBLEM, tokenizer, chat=True) == "<|start|>user\n9+9?<|end|>\n<|start|>assistant\n"
    assert dataloader.reads_clock(tokenizer) is False


# ---- system prompts and stop strings ---------------------------------------------------------------------------------


def test_c53_a_system_prompt_is_the_first_turn():
    """The kind: a part of a problem that no prompt holds, without a word of it."""
    tokenizer = special_tokenizer(CHAT, template=TURNS)
    turns = "<|start|>system\n You add. <|end|>\n<|start|>user\n9+9?<|end|>\n<|start|>assistant\n"
    assert render(SYSTEM, tokenizer, chat=True) == turns
    assert render(SYSTEM, tokenizer, chat=False) == "9+9="


def test_c53_a_system_prompt_that_the_template_leaves_out_or_does_not_allow_is_said():
    without = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="chat: the template of this tokenizer leaves the system prompt out"):
        render(SYSTEM, special_tokenizer(CHAT, template=without), chat=True)
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(ValueError, match="turns of system, user: System role not supported"):
        render(SYSTEM, special_tokenizer(CHAT, template=raising), chat=True)
    with pytest.raises(ValueError, match="data: 'system' is 3: must be a text"):
        render(Problem("x", "1", {"system": 3}), special_tokenizer(CHAT, template=TURNS), chat=True)


def test_a_template_and_several_turns_reach_the_chat():
    tokenizer = special_tokenizer(CHAT, template=TURNS)
    framed = Problem("Be short.\n\nQ: 9+9?", "18", {"question": "9+9?", "turn": "Q: 9+9?", "system": "Be short."})
    said = "<|start|>system\nBe short.<|end|>\n<|start|>user\nQ: 9+9?<|end|>\n<|start|>assistant\n"
    assert render(framed, tokenizer, chat=True) == said
    assert render(framed, tokenizer, chat=False) == framed.prompt
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    several = Problem("9+9?", "18", {"question": "9+9?", "turns": turns})
    assert render(several, tokenizer, chat=True).count("<|end|>") == 3
    with pytest.raises(ValueError, match="chat: the data has prompts of several turns, which need chat True"):
        render(several, tokenizer, chat=False)


PARTS = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [PARTS + "{% endfor %}", "User: ", "{% if messages[0].role == 'human' %}x{% endif %}"]
)
def test_c53_a_question_that_the_template_leaves_out_is_said(template):
    """The kind: as above. A template for parts of content, as of models that see, shows no plain text."""
    with pytest.raises(ValueError, match=r"chat: the template of this tokenizer leaves the question out \('9\+9\?'\)"):
        render(Problem("9+9=", "18", {"question": "9+9?"}), special_tokenizer(CHAT, template=template), chat=True)


def test_c54_a_bare_stop_string_of_a_problem_is_one_string():
    assert stop_strings([Problem("x", "1", {"stop": "answer"})]) == ["answer"]


def test_c44_a_run_ends_rows_at_a_stop_string_that_is_a_special_token(tmp_path):
    tokenizer = special_tokenizer(CHAT)
    sampler = puppet_sampler(tmp_path, tokenizer, ids(tokenizer, "18") + [258, *ids(tokenizer, "\nu")])
    got = sampler.generate(
        tokenize(["9+9="], tokenizer), group_size=1, max_new_tokens=9, temperature=0.0, seed=0, step=0,
        stop=stop_strings([Problem("x", "1", {"stop": ["<|end|>"]})]),
    )  # fmt: skip
    assert got.texts == ["18"] and got.finished.all()


# ---- problem sets ----------------------------------------------------------------------------------------------------


class Counted:
    """How often each set is loaded and each text is tokenized, from now on."""

    def __init__(self, monkeypatch):
        self.loaded, self.tokenized = Counter(), Counter()
        load, tokenize = data.load, PreTrainedTokenizerBase.__call__

        def loading(name, split, **options):
            self.loaded[split, options["num_shots"]] += 1
            return load(name, split, **options)

        def tokenizing(tokenizer, texts, **options):
            self.tokenized.update([texts] if isinstance(texts, str) else texts)
            return tokenize(tokenizer, texts, **options)

        monkeypatch.setattr(data, "load", loading)
        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", tokenizing)


@pytest.fixture
def asked(tmp_path) -> Config:
    path = runs.write_problems(tmp_path / "data", num_train=30)
    return Config(model=runs.save_digits(tmp_path / "model"), data="jsonl", data_path=path)


def test_sets_are_loaded_when_they_are_asked_for_and_then_kept(asked, monkeypatch):
    counted, sets = Counted(monkeypatch), ProblemSets(asked)
    assert not counted.loaded
    problems = sets.problems("train", 0)
    assert len(problems) == 27 and sets.problems("train", 0, limit=4) == problems[:4]
    assert counted.loaded == {("train", 0): 1} and not counted.tokenized
    given = ProblemSets(asked, {("test", 0): problems[:2]})
    assert given.problems("test", 0) == problems[:2] and counted.loaded == {("train", 0): 1}


def test_a_prompt_is_tokenized_once_however_many_are_asked_for_and_in_which_order(asked, monkeypatch):
    counted, sets = Counted(monkeypatch), ProblemSets(asked)
    few, all_, fewer = (sets.prompt_ids("train", 0, limit) for limit in (4, 0, 2))
    assert [len(found) for found in (few, all_, fewer)] == [4, 27, 2]
    prompts = [problem.prompt for problem in sets.problems("train", 0)]
    assert {text: counted.tokenized[text] for text in prompts} == dict.fromkeys(prompts, 1)
    expected = encode_prompts(sets.problems("train", 0), runs.digit_tokenizer(), chat=False, max_prompt_tokens=9)
    for found in (few, all_, fewer):
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected[: len(found)]]


def test_another_model_shares_problems_and_tokens_only_if_it_has_the_same_tokenizer(asked, tmp_path, monkeypatch):
    runs.save_digits(tmp_path / "same", seed=1)
    other = saved_puppet(tmp_path / "other", special_tokenizer(EOS), [65, 256])
    with_template = runs.save_digits(tmp_path / "chat")
    (Path(with_template) / "chat_template.jinja").write_text(TURNS)
    counted, sets = Counted(monkeypatch), ProblemSets(asked)
    ours = sets.prompt_ids("test", 0)
    counted.tokenized.clear()
    same = sets.of_model(str(tmp_path / "same"))
    assert all(one is two for one, two in zip(ours, same.prompt_ids("test", 0), strict=True))
    assert counted.loaded == {("test", 0): 1} and not counted.tokenized
    bytes_ = sets.of_model(other).prompt_ids("test", 0)
    prompts = [problem.prompt for problem in sets.problems("test", 0)]
    assert [special_tokenizer(EOS).decode(ids) for ids in bytes_] == prompts
    assert [counted.tokenized[text] for text in prompts] == [1] * 7
    sets.of_model(with_template).prompt_ids("test", 0)
    assert [counted.tokenized[text] for text in prompts] == [2] * 7
    assert counted.loaded == {("test", 0): 1}


@pytest.mark.parametrize("shots", [None, "0,1"])
def test_a_run_loads_each_set_once_and_tokenizes_each_prompt_once(tmp_path, monkeypatch, shots):
    """Training, validation and test; with the doctor, the plan of the evaluations, base and tuned model."""
    monkeypatch.setattr(train, "report", runs.no_report)
    argv = runs.flags("embedded", None, tmp_path, "x", data="arithmetic", num_steps=2, num_epochs=1, max_new_tokens=4)
    argv += ["--eval_every", "1", "--eval_limit", "9", "--final_eval", "True", "--final_eval_limit", "11"]
    argv += ["--max_prompt_tokens", "512", *(["--eval_shots", shots] if shots else [])]
    counted = Counted(monkeypatch)
    assert train.main(argv) == 0
    sets = {("train", 0): None, ("validation", 0): 9, ("test", 0): 11}
    if shots:
        sets["test", 1] = 11
    assert counted.loaded == dict.fromkeys(sets, 1)
    for (split, num_shots), limit in sets.items():
        prompts = [problem.prompt for problem in data.load("arithmetic", split, num_shots=num_shots)][:limit]
        assert {counted.tokenized[text] for text in prompts} == {1}, split
