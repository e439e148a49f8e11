"""Runs in miniature: a model of digits, problems that it can solve by luck, and processes that start in no time.

`start` runs `train.main` (or another one) in a process of its own, forked from a server that has imported everything:
as much its own process as if python had been called, for signals, kills and exit codes, without the seconds of import.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.fakes.models import tiny_model

ROOT = Path(__file__).parents[2]
ALPHABET = "01234 +=\n#"
EOS = "<|endoftext|>"
PATIENCE = 300
"""Seconds after which a process that should have ended is killed, and its test fails."""


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `ALPHABET`, and an EOS, which is the padding too. Survives being saved as Qwen2's."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [pre.pre_tokenize_str(character)[0][0] for character in ALPHABET]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate([*symbols, EOS])}, merges=[]))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def digit_model(seed: int = 0, **changes):
    """A random model over it. Numbers from numpy on a grid of 1/1024: the same bits on every machine."""
    V = len(ALPHABET) + 1
    model = tiny_model("qwen2", vocab_size=V, eos_token_id=V - 1, **changes)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.from_numpy(np.round(rng.normal(0, 0.2, tuple(parameter.shape)) * 1024) / 1024)
            parameter.copy_(1 + values if parameter.dim() == 1 else values)
    return model


def save_digits(path: Path, seed: int = 0) -> str:
    """Save both as a Hugging Face directory; returns its path."""
    digit_model(seed).save_pretrained(path)
    digit_tokenizer().save_pretrained(path)
    return str(path)


def new_place(factory) -> Path:
    """A directory for runs in which `model` and `data` are. `factory`: pytest's `tmp_path_factory`."""
    place = factory.mktemp("runs")
    save_digits(place / "model")
    write_problems(place / "data")
    return place


def write_problems(directory: Path, num_train: int = 24, num_test: int = 7, answer: str | None = None) -> str:
    """train.jsonl and test.jsonl of prompts such as `13+2=`; the answer is a digit 0..3, or always the same."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(5) for b in range(1, 45) if "".join(map(str, (a, b))).strip("01234") == ""]
    chosen = iter(np.random.default_rng(0).permutation(pairs).tolist())
    for name, size in (("train", num_train), ("test", num_test)):
        rows = [(a, b, (a + b) % 4 if answer is None else answer) for a, b in (next(chosen) for _ in range(size))]
        lines = [{"prompt": f"{a}+{b}=", "answer": str(value), "stop": ["##"]} for a, b, value in rows]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def flags(model: str, data: str, out: Path, name: str, /, **changes) -> list[str]:
    """Arguments of train.py for a run of a tenth of a second per step, in which rewards vary."""
    options = {
        "model": model,
        "data": "jsonl",
        "data_path": data,
        "out_dir": out,
        "run_name": name,
        "device": "cpu",
        "precision": "fp64",
        "num_steps": 4,
        "prompts_per_step": 3,
        "group_size": 4,
        "max_new_tokens": 6,
        "max_prompt_tokens": 16,
        "rewards": "gsm8k.last_number,gsm8k.format",
        "reward_weights": "2,1",
        "kl_coef": 0.05,
        "learning_rate": 0.01,
        "checkpoint_every": 2,
        "final_eval": False,
    } | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def metrics(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: Sequence[dict]) -> list[dict]:
    """The lines without what may differ between equal runs."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def transcripts(directory: Path) -> dict[str, list[dict]]:
    """{file name: its completions, each with what its group shares}."""
    return {file.name: completions_of(file) for file in sorted((directory / "rollouts").iterdir())}


def completions_of(file: Path) -> list[dict]:
    """The completions of a file of transcripts, each with what its group shares."""
    groups = [json.loads(line) for line in file.read_text().splitlines()]
    return [group | row for group in groups for row in group.pop("completions")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face directory or a checkpoint."""
    return load_file(directory / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics but for time and memory, transcripts and final weights are equal to the bit."""
    assert timeless(metrics(one)) == timeless(metrics(other))
    assert transcripts(one) == transcripts(other)
    first, second = weights(one / "final"), weights(other / "final")
    assert first.keys() == second.keys() and len(first) > 10
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_close(line: dict, other: dict) -> None:
    """Two lines of metrics are equal up to rounding of float64 numbers."""
    missing = [name for name in line if line[name] is None]
    assert missing == [name for name in other if other[name] is None]
    assert all(line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-12) for name in line if name not in missing)
    assert line.keys() == other.keys()


def assert_alike(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """The same completions, rewards and updates, up to rounding of float64. Metrics named in `but` may differ."""
    drawn, others = transcripts(one), transcripts(other)
    exact = ("prompt_index", "sample", "question", "answer", "completion", "rewards", "reward", "finished", "tokens")
    assert drawn.keys() == others.keys()
    for file in drawn:
        assert [[row[k] for k in exact] for row in drawn[file]] == [[row[k] for k in exact] for row in others[file]]
    lines, other_lines = timeless(metrics(one)), timeless(metrics(other))
    assert len(lines) > 1
    for line, other_line in zip(lines, other_lines, strict=True):
        assert_close(*({name: each[name] for name in each if name not in but} for each in (line, other_line)))
    first, second = weights(one / "final"), weights(other / "final")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-9)


class Process:
    """A process of its own, started by `start`."""

    def __init__(self, target: Callable, out: Path):
        self.stdout_file, self.stderr_file = out.with_suffix(".out"), out.with_suffix(".err")
        for file in (self.stdout_file, self.stderr_file):
            file.write_text("")
        self._process = _context().Process(target=_child, args=(target, self.stdout_file, self.stderr_file))
        self._process.start()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code (-9: killed), once it has ended; kills it after `timeout` seconds and raises."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {timeout} s\n{self.stderr}")
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()
        self._process.join()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        """What it has printed to standard error so far."""
        return self.stderr_file.read_text()


def start(argv: Sequence[str], out: Path, *, program: str = "train", before: Callable | None = None) -> Process:
    """`program.main(argv)` in a process of its own. `before`: called there first, see `at`. Output goes to `out`.*"""
    return Process(partial(call_main, program, list(argv), before), out)


def start_ranks(target: Callable, world_size: int, out: Path) -> list[Process]:
    """`target` in as many processes, who are told who they are as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Process(partial(_rank, target, group | {"RANK": r, "LOCAL_RANK": r}), out.with_name(f"{out.name}_{r}"))
        for r in range(world_size)
    ]


def run_ranks(world_size: int, script: str, place: Path, wait_for: int | None = None) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the ranks of a Python text. Nobody minds the others.

    Args:
        world_size: how many ranks.
        script: what each of them runs.
        place: directory of their outputs.
        wait_for: the first so many ranks; the rest are killed once these have ended. None: all.
    """
    ranks = start_ranks(partial(exec, script, {}), world_size, place / "rank")
    try:
        codes = [rank.wait() for rank in ranks[:wait_for]]
    finally:
        for rank in ranks:
            rank.kill()
    return [(code, rank.stdout, rank.stderr) for code, rank in zip(codes, ranks, strict=False)]


def start_train_ranks(argv: Sequence[str], world_size: int, out: Path, before: Callable | None = None) -> list[Process]:
    """`train.main(argv)` on as many processes."""
    return start_ranks(partial(call_main, "train", list(argv), before), world_size, out)


def run(argv: Sequence[str], out: Path, **options) -> Process:
    """`start` it and wait for its end, which must be a good one."""
    process = start(argv, out, **options)
    assert process.wait() == 0, process.stderr
    return process


def at(where: str, call: int, action: Callable[[], None], rank: int | None = None) -> None:
    """Do something just before the so-many-th call (from 1) of `module:Class.function`, on one rank or on all."""
    if rank is not None and os.environ.get("RANK") != str(rank):
        return
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def killed(where: str, call: int, rank: int | None = None) -> Callable[[], None]:
    """For `before`: SIGKILL there."""
    return partial(at, where, call, partial(send, signal.SIGKILL), rank)


def asked_to_stop(where: str, call: int, number: int = signal.SIGTERM, rank: int | None = None) -> Callable[[], None]:
    """For `before`: an orderly stop is asked for there."""
    return partial(at, where, call, partial(send, number), rank)


def wait_until(condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Return when it holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def call_main(program: str, argv: list[str], before: Callable | None = None) -> None:
    """`program.main(argv)`, which ends the process: what `start` and `start_ranks` run. Without a report at the end."""
    sys.argv = [f"{program}.py", *argv]
    if before is not None:
        before()
    module = importlib.import_module(program)
    module.report = no_report
    sys.exit(module.main(argv))


def no_report(directory: Path) -> None:
    """Instead of `train.report`, which takes longer than the runs here."""


def _rank(target: Callable, environment: dict) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    target()


def _child(target: Callable, stdout: Path, stderr: Path) -> None:
    for file, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    target()


def _context():
    """Processes forked from a server that has imported train.py; one thread each, whatever the machine."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "eval", "grpo.sample", "tests.fakes.runs"])
    with _environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"):
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def _environment(**changes: str):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
