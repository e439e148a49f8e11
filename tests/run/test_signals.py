"""Being asked to stop: the first signal is remembered, its echo ignored, a later one ends the process."""

import os
import signal
import time

import pytest

from data.problem import Problem
from grpo.run import signals
from grpo.run.signals import Signals
from rewards import worker
from rewards.runner import RewardRunner

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
OF_SCHEDULERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


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


@pytest.mark.parametrize("number", OF_SCHEDULERS)
def test_c59_a_signal_of_a_scheduler_or_terminal_asks_for_a_stop(number, monkeypatch):
    """Kind: a signal that announces an end ends the process at once. Slurm and submitit send USR1 or USR2."""
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # also where nohup has started the tests
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as asked:
            os.kill(os.getpid(), number)
            assert asked.asked()
    finally:
        signal.signal(number, before)


def test_c59_under_nohup_a_terminal_that_closes_is_still_ignored():
    """Kind: as above; but who starts a run under nohup has said that it shall outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_c59_the_worker_of_the_rewards_outlives_the_same_signals():
    """Kind: as above. A scheduler signals every process of a job, and the step that is finished needs its rewards."""
    assert worker.STOPS == signals.STOPS
    with RewardRunner(["gsm8k.last_number"], 60.0) as runner:
        problem = Problem("", "18", {})
        assert runner.score(["18"], [problem]) == [[1.0]]
        process = runner._workers[0].process
        for number in signals.STOPS:
            os.kill(process.pid, number)
        assert runner.score(["18"], [problem]) == [[1.0]] and runner._workers[0].process is process


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Signals():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before
