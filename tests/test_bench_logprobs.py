"""The command that says which way to compute log-probabilities is faster."""

import pytest
import torch

from bench.logprobs import main


def test_every_way_that_runs_here_has_a_line(capsys, monkeypatch):
    monkeypatch.setattr("grpo.logprobs.any_size", lambda function: function)  # compiling takes longer than the rest
    sizes = ["--rows", "9", "--width", "4", "--vocabulary", "11", "--chunk", "4"]
    assert main([*sizes, "--repeats", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines] == ["chunked", "chunked, compiled", "kernel"]
    assert "1.00 x chunked" in lines[0] and "needs a CUDA device" in lines[2]


@pytest.mark.parametrize(
    ("option", "value"), [(name, "0") for name in ("rows", "width", "vocabulary", "repeats")] + [("chunk", "-1")]
)
def test_a_size_that_can_not_be_is_one_sentence(capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", f"--{option}", value])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"{option} is {value}: must be at least" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_a_missing_gpu_is_one_sentence(capsys):
    assert main([]) == 2
    assert "device is 'cuda'" in capsys.readouterr().err
