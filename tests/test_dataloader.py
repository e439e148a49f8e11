"""Prompts: what chat templates, tokenizers and problems bring that is no plain text. More is in test_rollout.py."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

import train
from data.problem import Problem
from grpo import dataloader
from grpo.dataloader import encode_prompts, fill_template, render, stop_strings, tokenize, written_behind
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
