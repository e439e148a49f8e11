"""The reward runner, with rewards that raise, hang, print, kill their process and start others.

The misbehaving rewards are a file `rewards/probe.py`, put into a copy of the packages `rewards` and `data`: so these
tests also show that the worker runs the rewards of the runner's own project, wherever it is started.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = '''
import ctypes, os, re, signal, subprocess, sys

def obey(completion, problem):
    """A number is returned; a word is done."""
    try:
        return float(completion)
    except ValueError:
        return globals()["_" + completion]()

def long(completion, problem, *, length, cap=7):
    return length / cap

def ended(completion, problem, tokens, finished):
    return len(tokens) if finished else globals()["_die"]()

def logs(completion, problem, *, log_metric):
    log_metric("length", 9)
    log_metric("length", len(completion))
    log_metric("third", len(completion) / 3 if completion else float("inf"))
    return obey(completion, problem)

def gold(completion, problem):
    return float(problem.answer)

def _raise():
    raise RuntimeError("as asked")

def _none():
    return None

def _nan():
    return float("nan")

def _text():
    return "1.0"

def _leave():
    sys.exit("gone")

def _die():
    os._exit(3)

def _segfault():
    ctypes.string_at(0)

def _hang():
    print("hanging", flush=True)
    re.match("(a+)+$", "a" * 60 + "b")  # in C code, and never lets another thread run

def _start_and_hang():
    subprocess.Popen(["sleep", "600"])
    _hang()

def _print():
    print("printed " * 10_000)
    os.write(1, b"and written ")
    os.system("echo and echoed")
    return 1.0

def _read():
    return float(len(sys.stdin.read()))

def _terminate():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return 1.0

def _alarm():
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.pause()
    return 1.0

def _process():
    return float(os.getpid())

def _modules():
    return float(len({"torch", "grpo", "numpy", "transformers"} & set(sys.modules)))
'''
PATIENCE = 60.0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the packages with the probe in it, imported in place of the originals."""
    place = tmp_path_factory.mktemp("project")
    originals = Path(importlib.import_module("rewards").__file__).parent.parent
    for package in ("rewards", "data"):
        shutil.copytree(originals / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "rewards" / "probe.py").write_text(PROBE)
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("rewards", "data")}
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))
    for name in [name for name in sys.modules if name.split(".")[0] in ("rewards", "data")]:
        del sys.modules[name]
    sys.modules.update(taken)


@pytest.fixture
def start(project):
    """`start(names, timeout)` gives a runner that is closed in the end."""
    runners = []

    def runner(names=("probe.obey",), timeout=PATIENCE):
        runners.append(importlib.import_module("rewards.runner").RewardRunner(names, timeout))
        return runners[-1]

    yield runner
    for one in runners:
        one.close()


def problems(*answers: str) -> list:
    make = importlib.import_module("data.problem").Problem
    return [make("a prompt", answer, {"shots": [{"question": "1 + 1?"}]}) for answer in answers]


def score(runner, *completions: str) -> list:
    return runner.score(completions, problems(*["18"] * len(completions)))


def test_every_term_grades_every_sample_in_order(start):
    runner = start(["probe.obey", "gsm8k.correctness", "probe.gold"])
    values = runner.score(["1", "2.5", "3"], problems("10", "20", "30"))
    assert values == [[1.0, 2.5, 3.0], [0.0, 0.0, 0.0], [10.0, 20.0, 30.0]]
    assert runner.score(["18"], problems("18")) == [[18.0], [0.0], [18.0]]
    assert runner.score([], []) == [[], [], []]
    assert not runner.failures and not runner.first_errors


def test_a_reward_is_told_what_it_asks_for_after_a_dead_worker_too(start):
    runner = start(["probe.long", "probe.ended", "probe.obey"])
    told = {"tokens": [[1], [2, 2], [3]], "length": [1, 2, 1], "cap": [4] * 3, "finished": [True, False, True]}
    values = runner.score(["1", "2", "3"], problems(*"123"), told)
    assert values == [[0.25, 0.5, 0.25], [1.0, None, 1.0], [1.0, 2.0, 3.0]]
    assert runner.failures == {"died": 1}


def test_a_reward_that_asks_for_what_is_not_known_is_named(start):
    with pytest.raises(ValueError, match=r"rewards: 'probe\.long' asks for 'cap', which is not known of these texts"):
        start(["probe.long"]).score(["1"], problems("1"), {"length": [1], "tokens": [[1]]})


@pytest.mark.parametrize(
    ("deed", "reason", "message"),
    [
        ("raise", "raised", r"RuntimeError: as asked \(.*probe\.py, line \d+\)"),
        ("leave", "raised", r"SystemExit: gone .*"),
        ("none", "returned_none", "returned None"),
        ("nan", "not_finite", "returned nan"),
        ("text", "not_a_number", "returned a str"),
        ("die", "died", r"ended its process \(exit status 3\)"),
        ("segfault", "died", r"ended its process \(exit status -\d+\)"),
    ],
)
def test_c35_a_failed_call_is_none_and_counted(start, deed, reason, message):
    runner = start(["probe.gold", "probe.obey"])
    values = runner.score(["1", deed, "3", deed], problems("5", "6", "7", "8"))
    assert values == [[5.0, 6.0, 7.0, 8.0], [1.0, None, 3.0, None]]
    assert runner.failures == {reason: 2}
    assert list(runner.first_errors) == ["probe.obey"]
    assert re.fullmatch(message, runner.first_errors["probe.obey"])


def test_c08_what_is_left_keeps_its_place_whatever_fails_around_it(start):
    runner = start(["probe.obey", "probe.gold", "probe.obey"])
    values = runner.score(["die", "2", "none", "4", "raise"], problems("10", "a gold that raises", "30", "40", "50"))
    obeyed = [None, 2.0, None, 4.0, None]
    assert values == [obeyed, [10.0, None, 30.0, 40.0, 50.0], obeyed]
    assert runner.failures == {"died": 2, "returned_none": 2, "raised": 3}


def test_c35_a_hang_in_c_code_costs_its_own_sample_alone(start):
    runner = start(timeout=1.5)
    assert score(runner, "1", "hang", "3") == [[1.0, None, 3.0]]
    assert runner.failures == {"timed_out": 1}
    assert runner.first_errors == {"probe.obey": "took longer than 1.5 s"}
    assert score(runner, "4") == [[4.0]]


def test_c35_every_sample_may_fail(start):
    runner = start()
    assert score(runner, "die", "none", "die") == [[None, None, None]]
    assert runner.failures == {"died": 2, "returned_none": 1}
    assert score(runner, "1") == [[1.0]]


def test_c35_failures_add_up_over_batches_and_the_first_message_stays(start):
    runner = start()
    score(runner, "raise")
    score(runner, "none", "raise")
    assert runner.failures == {"raised": 2, "returned_none": 1}
    assert "as asked" in runner.first_errors["probe.obey"]


def test_the_process_is_kept_replaced_when_it_died_and_ended_by_close(start):
    runner = start()
    [[first]], [[second]], [[third]] = score(runner, "process"), score(runner, "process"), score(runner, "die")
    assert first == second and third is None
    [[after]] = score(runner, "process")
    assert after not in (None, first, os.getpid())
    runner.close()
    for process in (first, after):
        with pytest.raises(ChildProcessError):  # no zombie is left to wait for
            os.waitpid(int(process), os.WNOHANG)
    runner.close()
    assert score(runner, "1") == [[1.0]]


def test_a_with_block_closes(project):
    with importlib.import_module("rewards.runner").RewardRunner(["probe.obey"], PATIENCE) as runner:
        process = int(score(runner, "process")[0][0])
    with pytest.raises(ChildProcessError):
        os.waitpid(process, os.WNOHANG)


def test_a_worker_killed_between_two_batches_is_replaced(start):
    runner = start()
    os.kill(int(score(runner, "process")[0][0]), 9)
    runner._workers[0].process.wait()
    assert score(runner, "1", "2") == [[1.0, 2.0]]
    assert not runner.failures


def test_what_a_reward_prints_goes_to_standard_error(start, capfd):
    assert score(start(), "print", "2", "print", "read") == [[1.0, 2.0, 1.0, 0.0]]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("printed") == 20_000 and err.count("written") == err.count("echoed") == 2


def test_a_signal_to_the_run_does_not_cost_it_its_rewards(start):
    runner = start()
    assert score(runner, "terminate", "2") == [[1.0, 2.0]]
    assert not runner.failures


def test_a_reward_may_use_the_alarm_itself(start):
    assert score(start(), "alarm", "2") == [[1.0, 2.0]]


def test_the_worker_is_light(start):
    assert score(start(), "modules") == [[0.0]]


def test_rewards_of_the_directory_it_is_started_in_are_not_taken_for_ours(start, tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    assert score(start(), "1") == [[1.0]]


def test_replies_of_an_interrupted_batch_do_not_answer_the_next(start, monkeypatch):
    runner = start()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_reply", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(runner, "1", "2")
    assert score(runner, "3", "4") == [[3.0, 4.0]]


def test_texts_larger_than_any_buffer_pass(start):
    texts = ["1" + " " * 10**6, "\ud800", "2"]  # a surrogate alone is no UTF-8
    values = start(["gsm8k.format", "probe.gold"]).score(texts, problems("1", "2", "3"))
    assert values == [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]


def test_a_name_or_timeout_that_is_wrong_is_refused_before_anything_starts(project, monkeypatch):
    module = importlib.import_module("rewards.runner")
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    with pytest.raises(ValueError, match=r"'probe\.nothing' is not one of .*gsm8k\.format.*probe\.obey"):
        module.RewardRunner(["probe.obey", "probe.nothing"], 1.0)
    for timeout in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="reward_timeout"):
            module.RewardRunner(["probe.obey"], timeout)


def test_a_worker_that_cannot_start_is_one_clear_error(project, monkeypatch):
    module = importlib.import_module("rewards.runner")
    monkeypatch.setattr(module.sys, "executable", shutil.which("false"))
    with (
        module.RewardRunner(["probe.obey"], PATIENCE) as runner,
        pytest.raises(RuntimeError, match=r"rewards probe\.obey did not start"),
    ):
        score(runner, "1")


def run_apart(project: Path, completion: str, timeout: float) -> subprocess.Popen:
    """A run of its own that scores one completion. Its standard error stays open until all it started has ended."""
    code = (
        "from data.problem import Problem; from rewards.runner import RewardRunner\n"
        f"print(RewardRunner(['probe.obey'], {timeout}).score([{completion!r}], [Problem('', '', {{}})]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("killed", [False, True], ids=["left", "killed"])
def test_nothing_outlives_the_run(project, killed):
    run = run_apart(project, "hang" if killed else "1", timeout=1.5)
    if killed:
        assert run.stderr.readline() == b"hanging\n"
        run.kill()
    out, err = run.communicate(timeout=PATIENCE)  # waits for the worker too, which holds the other end
    assert out == (b"" if killed else b"[[1.0]]\n") and err == b""


def test_what_a_hanging_reward_started_is_killed_with_it(project):
    out, err = run_apart(project, "start_and_hang", timeout=1.5).communicate(timeout=PATIENCE)
    assert (out, err) == (b"[[None]]\n", b"hanging\n")


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_share_a_batch_and_keep_its_order(project, workers):
    module = importlib.import_module("rewards.runner")
    with module.RewardRunner(["probe.obey", "probe.gold", "probe.long"], PATIENCE, workers) as runner:
        told = {"length": list(range(7)), "cap": [1] * 7}
        completions = ["1", "die", "3", "4", "none", "6", "7"]
        golds = problems(*"abcdefg")[:1] + problems(*"234567")
        values = runner.score(completions, golds, told)
        assert values[0] == [1.0, None, 3.0, 4.0, None, 6.0, 7.0]
        assert values[1:] == [[None, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
        assert runner.failures == {"died": 1, "returned_none": 1, "raised": 1}
        assert runner.score(["1"], problems("1"), {"length": [1], "cap": [2]}) == [[1.0], [1.0], [0.5]]


@pytest.mark.parametrize("workers", [1, 3])
def test_numbers_that_rewards_report_are_summed_over_samples_that_have_them(project, workers):
    module = importlib.import_module("rewards.runner")
    with module.RewardRunner(["probe.gold", "probe.logs"], PATIENCE, workers) as runner:
        assert runner.reported() == {}
        score(runner, "1", "raise", "", "none")
        score(runner, "22")
        assert runner.reported() == {"length": (12.0, 5), "third": (4.0, 4)}
        assert runner.reported() == {}


def test_a_hang_in_one_worker_does_not_hold_up_the_other(project):
    module = importlib.import_module("rewards.runner")
    with module.RewardRunner(["probe.obey"], 1.5, workers=2) as runner:
        values = score(runner, "hang", "process", "3", "process", "hang", "process")
        assert values[0][0] is None and values[0][4] is None and values[0][2] == 3.0
        assert len({values[0][1], values[0][3], values[0][5]}) == 1  # one process, which nobody ended
        assert runner.failures == {"timed_out": 2}


def test_a_file_that_prepares_says_so_or_refuses_the_machine(project):
    """`LEAST_SECONDS` and `prepare` of a file of rewards."""
    module = importlib.import_module("rewards.runner")
    (project / "rewards" / "ready.py").write_text(
        "import os\nLEAST_SECONDS = 70.0\ndef fine(completion, problem):\n    return 1.0\n"
        "def prepare():\n    if 'NOT_HERE' in os.environ: raise ValueError('not here')\n    return {'a': 'b'}\n"
    )
    with module.RewardRunner(["ready.fine", "probe.obey"], 1.0, 2) as runner:
        assert runner.prepare() == {"a": "b"} and runner.timeout == 70.0
        started = [worker.process for worker in runner._workers]
        assert None not in started and score(runner, "1", "2") == [[1.0, 1.0], [1.0, 2.0]]
        assert [worker.process for worker in runner._workers] == started
    with module.RewardRunner(["probe.obey"], 1.0) as runner:
        assert runner.prepare() == {} and runner._workers[0].process is None and runner.timeout == 1.0
    with pytest.MonkeyPatch.context() as patch, module.RewardRunner(["ready.fine"], 1.0) as runner:
        patch.setenv("NOT_HERE", "1")
        for attempt in (runner.prepare, lambda: score(runner, "1")):
            with pytest.raises(ValueError, match="^not here$"):
                attempt()
