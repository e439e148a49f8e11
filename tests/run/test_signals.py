"""Being asked to stop: the first signal is remembered, its echo ignored, a later one ends the process."""

import os
import signal
import time

import pytest

from grpo.run import signals
from grpo.run.signals import Signals

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_a_signal_asks_and_the_handlers_are_put_back(number, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as asked:
        assert not asked.asked()
        os.kill(os.getpid(), number)
        assert asked.asked()
        os.kill(os.getpid(), number)  # torchrun passes on what all have got already
        assert asked.asked()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err == "stopping after this step; a second signal stops at once\n"


@BOTH
def test_a_second_signal_after_a_while_ends_the_process(number, monkeypatch):
    now, ended = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += signals.SAME_SIGNAL_S
        os.kill(os.getpid(), number)
        assert not ended
        now[0] += 0.1
        os.kill(os.getpid(), number)
    assert ended == [128 + number]


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Signals():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before
