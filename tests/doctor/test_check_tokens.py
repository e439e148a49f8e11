"""What the doctor says of tokenizer, template and configs."""

import json

import pytest
from tokenizers import normalizers

import train
from grpo.doctor.check_tokens import look_at_tokens
from tests.fakes.models import tiny_model
from tests.fakes.puppet import TURNS, saved_puppet, special_tokenizer

CHAT = {"<eos>": 256, "<|start|>": 257, "<|end|>": 258}
THINK = {"<eos>": 256, "<think>": 257, "</think>": 258, "<unk>": 259, "<extra>": 260, "[TOOL_CALLS]": 261}


def checked(tmp_path, capsys, tokenizer, *flags: str, generation: dict | None = None, **fields) -> tuple[str, int]:
    """What --check says of a model with this tokenizer, and its exit code; `fields` stand in every line of the data."""
    model = saved_puppet(tmp_path / "model", tokenizer, [65, 256])
    if generation is not None:
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    fields = {"stop": ["\n\n"]} | fields
    lines = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1), **fields}) for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    argv = ["--model", model, "--data", "jsonl", "--data_path", str(tmp_path / "x.jsonl"), "--device", "cpu", *flags]
    capsys.readouterr()
    code = train.main([*argv, "--check"])
    return capsys.readouterr().out, code


def found(tokenizer, chat: bool = False, stop: tuple[str, ...] = ("##",), **config) -> dict:
    """{what: finding} about a tokenizer and a model with this config."""
    model = tiny_model(**config)
    model.generation_config.eos_token_id = None
    return {finding.what: finding for finding in look_at_tokens(model, tokenizer, chat, [], [], stop)}


def test_tokens_that_go_together_have_no_finding():
    assert found(special_tokenizer(CHAT)) == {}


@pytest.mark.parametrize(("stop", "level"), [((), "sure"), (("##",), "warning")])
def test_without_eos_only_a_stop_string_ends_a_completion(stop, level):
    tokenizer = special_tokenizer(CHAT)
    tokenizer.eos_token = None
    said = found(tokenizer, stop=stop, eos_token_id=None)
    assert said["neither tokenizer nor config has an EOS"].level == level
    assert ("completion prompts without a stop string" in said) == (not stop)


def test_a_stop_string_that_no_completion_can_hold_is_named():
    tokenizer = special_tokenizer(CHAT)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    ((what, finding),) = found(tokenizer, stop=("end", "END")).items()
    assert finding.level == "warning" and "does not give the stop string 'END' back" in what


def test_a_chat_template_that_is_not_used_and_one_whose_turns_end_in_plain_text():
    tokenizer = special_tokenizer(CHAT, template=TURNS.replace("<|end|>", "###"))
    assert found(tokenizer)["the tokenizer has a chat template, and prompts are plain text"].level == "note"
    ((what, finding),) = found(tokenizer, chat=True, stop=()).items()
    assert what == "the chat template ends a turn with '###', which is no EOS"
    assert finding.do == "Give the data `stop`: ['###']."


def test_c46_a_turn_that_ends_with_no_eos_is_named(tmp_path, capsys):
    """The kind: a token that tokenizer, template or config write at an end, and that ends no completion."""
    tokenizer = special_tokenizer(CHAT, template=TURNS)
    out, code = checked(tmp_path, capsys, tokenizer, "--chat", "True")
    assert "warning  the chat template ends a turn with '<|end|>', which is no EOS" in out and code == 0
    assert "Add it (id 258) to `eos_token_id` in the model's generation_config.json" in out


def test_c46_the_remedies_that_are_named_are_taken(tmp_path, capsys):
    tokenizer = special_tokenizer(CHAT, template=TURNS)
    for changes in ({"generation": {"eos_token_id": [256, 258]}}, {"stop": ["<|end|>"]}):
        assert "ends a turn" not in checked(tmp_path, capsys, tokenizer, "--chat", "True", **changes)[0]
    assert "ends a turn" not in checked(tmp_path, capsys, tokenizer)[0], "without chat no turn is written"


def test_c46_prompts_that_end_with_eos(tmp_path, capsys):
    out, _ = checked(tmp_path, capsys, special_tokenizer(CHAT, behind="<eos>"))
    assert "note     the tokenizer writes '<eos>' behind every text" in out and "prompts end with EOS" not in out
    ending = special_tokenizer(CHAT, template=TURNS.replace("assistant\n", "assistant<eos>"))
    assert " training prompts end with EOS (<eos>)" in checked(tmp_path, capsys, ending, "--chat", "True")[0]


def test_c46_an_eos_that_no_token_has(tmp_path, capsys):
    out, _ = checked(tmp_path, capsys, special_tokenizer(CHAT), generation={"eos_token_id": 300})
    assert "warning  EOS 300 of a config has no token in the tokenizer" in out and "EOS is <eos>." in out


def test_c45_special_tokens_that_look_like_tags_are_named(tmp_path, capsys):
    tokenizer = special_tokenizer(THINK)
    tokenizer.unk_token = "<unk>"
    out, code = checked(tmp_path, capsys, tokenizer)
    assert "note     special tokens look like tags: <think>, </think>, [TOOL_CALLS]\n" in out and code == 0


def test_c53_a_system_prompt_without_chat_is_said(tmp_path, capsys):
    out, _ = checked(tmp_path, capsys, special_tokenizer(CHAT, template=TURNS), system="You add.")
    assert " training problems have a system prompt, and chat is False" in out
    out, _ = checked(tmp_path, capsys, special_tokenizer(CHAT, template=TURNS), "--chat", "True", system="You add.")
    assert "system prompt" not in out
