"""`python -m grpo.sample MODEL`: what it prints and what it refuses."""

import io
import subprocess
import sys

import pytest
import torch

from data.prompts import STOP, completion_prompt
from grpo import sample
from grpo.policy import load_policy
from grpo.sampler import Sampler
from tests.fakes import runs
from tests.fakes.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return runs.save_digits(tmp_path_factory.mktemp("sample") / "model")


def printed(capsys, *argv: str) -> list[tuple[str, str]]:
    """(text, how it ended) of each completion."""
    capsys.readouterr()
    assert sample.main([*argv, "--device", "cpu"]) == 0
    *blocks, rest = capsys.readouterr().out.split("\n--- ")
    ends = [block.partition("\n")[0] for block in [*blocks[1:], rest]]
    texts = [blocks[0], *(block.partition("\n")[2] for block in blocks[1:])]
    return list(zip(texts, ends, strict=True))


def expected(model: str, prompt: str, **options) -> list[tuple[str, str]]:
    policy, tokenizer = load_policy(model)
    fixed = {"group_size": 1, "max_new_tokens": 128, "temperature": 0.0, "seed": 0, "step": 0}
    drawn = Sampler(policy, tokenizer).generate([tokenizer(prompt).input_ids], **fixed | options)
    ends = ["stopped" if finished else "cut at max_new_tokens" for finished in drawn.finished.tolist()]
    return list(zip(drawn.texts, ends, strict=True))


def test_greedy_from_a_prompt(model, capsys):
    ours = printed(capsys, model, "--prompt", "1+2=", "--max_new_tokens", "9")
    assert ours == expected(model, "1+2=", max_new_tokens=9)
    assert ours[0][0]


def test_several_samples_of_a_temperature_and_seed(model, capsys):
    argv = ["--prompt", "1+2=", "--num", "5", "--temperature", "1.5", "--max_new_tokens", "7", "--model", model]
    ours = printed(capsys, *argv, "--seed", "3")
    assert ours == expected(model, "1+2=", group_size=5, temperature=1.5, seed=3, max_new_tokens=7)
    assert len(set(ours)) > 1
    assert printed(capsys, *argv, "--seed", "4") != ours
    assert printed(capsys, *argv, "--seed", "3") == ours


def test_a_stop_string_ends_it(model, capsys):
    argv = [model, "--prompt", "1+2=", "--temperature", "1.5", "--max_new_tokens", "20", "--num", "3"]
    whole = printed(capsys, *argv)
    stop = next(text[2] for text, _ in whole if len(text) > 2 and not text[2].isspace())
    cut = [(text.split(stop)[0], "stopped" if stop in text else end) for text, end in whole]
    assert printed(capsys, *argv, "--stop", stop) == cut != whole


def test_a_prompt_from_standard_input(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("2+2="))
    assert printed(capsys, model, "--max_new_tokens", "5") == expected(model, "2+2=", max_new_tokens=5)


def test_a_question_gets_the_prompt_format_of_training(tmp_path, capsys):
    model = save_tiny(tmp_path / "bytes")
    ours = printed(capsys, model, "--question", "1 and 2?", "--max_new_tokens", "4")
    assert ours == expected(model, completion_prompt("1 and 2?"), max_new_tokens=4)


def test_every_precision(model, capsys):
    for precision in ("fp32", "bf16", "fp16", "fp64"):
        assert printed(capsys, model, "--prompt", "1", "--max_new_tokens", "2", "--precision", precision)
        assert torch.get_default_dtype() == torch.float32  # again


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["/nowhere", "--prompt", "1"], "model: '/nowhere' can not be loaded"),
        (["MODEL", "--prompt", "1", "--max_new_tokens", "0"], "max_new_tokens is 0: must be a whole number >= 1"),
        (["MODEL", "--prompt", "1", "--num", "0"], "num is 0: must be a whole number >= 1"),
        (["MODEL", "--prompt", "1", "--temperature", "-1"], "temperature is -1.0: must be >= 0 and finite"),
        (["MODEL", "--prompt", "1", "--temperature", "nan"], "temperature is nan"),
        (["MODEL", "--prompt", "1", "--seed", "-1"], "seed is -1"),
        (["MODEL", "--prompt", "1", "--question", "2"], "either --prompt or --question"),
        (["MODEL", "--promt", "1"], "--promt is not an option; did you mean prompt?"),
    ],
)
def test_a_mistake_is_one_sentence(model, capsys, argv, sentence):
    capsys.readouterr()
    try:
        code = sample.main([model if word == "MODEL" else word for word in argv])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and sentence in err
    assert err.startswith("grpo.sample: error: ") and err.count("\n") == 1


def test_an_empty_prompt_is_one_sentence(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert sample.main([model]) == 2
    assert capsys.readouterr().err.startswith("grpo.sample: error: prompt_ids: ")


def test_as_a_command(model):
    command = [sys.executable, "-m", "grpo.sample", model, "--prompt", "1+2=", "--max_new_tokens", "3"]
    command += ["--device", "cpu"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=runs.PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{}\n--- {}\n".format(*expected(model, "1+2=", max_new_tokens=3)[0])


def test_a_chat_with_a_system_prompt_and_a_template(model, tmp_path, capsys):
    chat = runs.save_digits(tmp_path / "chat")
    template = "{% for m in messages %}{{ m.content }}+{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    argv = ["--question", "1+2", "--max_new_tokens", "9", "--system_prompt", "33", "--prompt_template", "0{question}4"]
    assert printed(capsys, chat, *argv, "--chat") == expected(chat, "33+01+24+=", max_new_tokens=9, stop=STOP)
    assert printed(capsys, model, *argv) == expected(model, "33\n\n01+24", max_new_tokens=9, stop=STOP)
    assert sample.main([model, *argv, "--chat", "--device", "cpu"]) == 2
    assert "chat: True needs a tokenizer with a chat template" in capsys.readouterr().err
