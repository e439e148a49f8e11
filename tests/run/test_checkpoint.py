"""Checkpoints come back to the bit, and a crash at any point leaves the last good one."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from grpo.run import checkpoint


class Tied(nn.Module):
    """An embedding tied to the head, as language models have, a float64 layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.wide = nn.Linear(4, 4).double()
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.wide(self.norm(self.embed(ids)).double()).float())


def made(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2 / 3, betas=(0.9, 0.99), weight_decay=0.1)


def advance(model, optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 1e-2 / (3 + step)
        optimizer.step()


def bits(model, optimizer) -> dict:
    """Everything that decides how training goes on, to be compared for equality."""
    state = optimizer.state_dict()
    moments = {(i, name): value.clone() for i, values in state["state"].items() for name, value in values.items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"groups": state["param_groups"], **moments, **weights}


def equal(one: dict, other: dict) -> bool:
    tensors = [(one[k], other[k]) for k in one if k != "groups"]
    return (
        one.keys() == other.keys()
        and one["groups"] == other["groups"]
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_weights_optimizer_and_state_come_back_to_the_bit(tmp_path):
    model, optimizer = made()
    advance(model, optimizer, 3)
    state = {"best": 0.1 + 0.2, "best_step": 2, "scaler": {"scale": 65536.0, "growth": 1}, "none": None}
    path = checkpoint.save(tmp_path / "checkpoints", 3, model, optimizer, state)
    assert path == checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_000003"
    before = bits(model, optimizer)

    other, other_optimizer = made(seed=1)
    advance(other, other_optimizer, 1)
    assert not equal(before, bits(other, other_optimizer))
    assert checkpoint.load(path, other, other_optimizer) == state | {"step": 3}
    assert equal(before, bits(other, other_optimizer))
    assert other.head.weight is other.embed.weight

    advance(model, optimizer, 2)
    advance(other, other_optimizer, 2)
    assert not equal(before, bits(model, optimizer))
    assert equal(bits(model, optimizer), bits(other, other_optimizer))


def test_tied_weights_are_written_once(tmp_path):
    from safetensors import safe_open

    path = checkpoint.save(tmp_path, 1, *made(), {})
    with safe_open(path / "model.safetensors", "pt") as file:
        kept = set(file.keys())
    assert len(kept & {"embed.weight", "head.weight"}) == 1
    assert {"norm.running_mean", "norm.num_batches_tracked", "wide.bias"} <= kept
    assert names(path) == ["model.safetensors", "optimizer.pt", "state.json"]


def test_another_model_or_optimizer_is_a_clear_error(tmp_path):
    model, optimizer = made()
    advance(model, optimizer, 1)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    small = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="step_000001 does not fit this model and optimizer: .*embed"):
        checkpoint.load(path, small, optimizer)
    with pytest.raises(ValueError, match="step_000001 does not fit this model and optimizer"):
        checkpoint.load(path, model, torch.optim.AdamW(small.parameters()))
    with pytest.raises(ValueError, match="nowhere is not a complete checkpoint"):
        checkpoint.load(tmp_path / "nowhere", model, optimizer)


@pytest.mark.parametrize("left", [{}, {"state": {}}, [1]], ids=["nothing", "one", "a list"])
def test_c62_an_optimizer_file_of_another_version_is_one_sentence(tmp_path, left):
    """Kind: a file that is read back is taken to be of this version, and another one ends in a traceback."""
    path = checkpoint.save(tmp_path, 1, *made(), {})
    torch.save(left, path / "optimizer.pt")
    content = json.loads((path / "state.json").read_text())
    content["sizes"]["optimizer.pt"] = (path / "optimizer.pt").stat().st_size
    (path / "state.json").write_text(json.dumps(content | {"crc32": checkpoint._check_sums(path, content)}))
    with pytest.raises(ValueError, match="step_000001 does not fit this model and optimizer"):
        checkpoint.load(path, *made())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_byte_that_changed_since_is_noticed_before_anything_is_loaded(tmp_path, file):
    path = checkpoint.save(tmp_path, 1, *made(), {"best_step": 4})
    model, optimizer = made(seed=1)
    before = bits(model, optimizer)
    content = bytearray((path / file).read_bytes())
    place = content.index(b"4") if file == "state.json" else len(content) // 2
    content[place] ^= 1  # 4 -> 5, in JSON
    (path / file).write_bytes(content)
    assert checkpoint.latest(tmp_path) == path  # who only looks does not read it all
    with pytest.raises(ValueError, match="step_000001 does not match its check sums; remove it"):
        checkpoint.load(path, model, optimizer)
    assert equal(before, bits(model, optimizer))


def test_latest_is_the_highest_complete_step(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 1_000_000):
        checkpoint.save(tmp_path, step, *made(), {})
    assert checkpoint.latest(tmp_path).name == "step_1000000"
    shutil.copytree(tmp_path / "step_000010", tmp_path / "step_2000000.tmp")
    (tmp_path / "step_3000000").mkdir()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_4000000").write_text("a file")
    assert checkpoint.latest(tmp_path).name == "step_1000000"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("left", [None, 0, 0.5, -1])
def test_a_checkpoint_with_a_damaged_file_is_passed_over(tmp_path, file, left):
    checkpoint.save(tmp_path, 1, *made(), {"good": True})
    damaged = checkpoint.save(tmp_path, 2, *made(), {}) / file
    if left is None:
        damaged.unlink()
    else:
        size = damaged.stat().st_size
        os.truncate(damaged, int(size * left) if left >= 0 else size - 1)
    assert checkpoint.latest(tmp_path).name == "step_000001"
    with pytest.raises(ValueError, match="step_000002 is not a complete checkpoint"):
        checkpoint.load(tmp_path / "step_000002", *made())
    checkpoint.save(tmp_path, 2, *made(), {})
    assert checkpoint.latest(tmp_path).name == "step_000002"


class Crash(BaseException):
    """As a power cut: nothing after it is done, and `except OSError` does not see it."""


class Disk:
    """Counts what is done to files and directories while it is armed, and crashes before event number `crash_at`."""

    def __init__(self):
        self.armed, self.events, self.crash_at = False, 0, 0
        sys.addaudithook(self.hook)  # cannot be taken off again

    def hook(self, event, args):
        if self.armed and event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove"):
            self.events += 1
            if self.events == self.crash_at:
                raise Crash(event)

    @contextmanager
    def crash(self, at: int):
        """Arms it; the crash ends the block."""
        self.armed, self.events, self.crash_at = True, 0, at
        try:
            yield
        except Crash:
            pass
        finally:
            self.armed = False

    def crashed(self) -> bool:
        """Whether the last block ended so."""
        return self.events >= self.crash_at


DISK = Disk()


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step again"])
def test_c30_a_crash_at_any_point_leaves_a_good_checkpoint(tmp_path, step):
    model, optimizer = made()
    advance(model, optimizer, 1)
    checkpoint.save(tmp_path / "first", 1, model, optimizer, {"at": 1})
    states = {1: bits(model, optimizer)}
    advance(model, optimizer, 1)
    states[2] = bits(model, optimizer)

    found, saved = [], False
    while not saved:
        directory = tmp_path / str(len(found))
        shutil.copytree(tmp_path / "first", directory)
        with DISK.crash(at=len(found) + 1):
            checkpoint.save(directory, step, model, optimizer, {"at": 2})
        saved = not DISK.crashed()
        again, again_optimizer = made(seed=5)
        found.append(checkpoint.load(checkpoint.latest(directory), again, again_optimizer)["at"])
        assert equal(bits(again, again_optimizer), states[found[-1]])
        # The run goes on from there: what the crash has left is cleaned, and nothing stands in the way.
        checkpoint.save(directory, 3, again, again_optimizer, {})
        checkpoint.prune(directory, 1)
        assert names(directory) == ["step_000003"]
    assert found == sorted(found) and {1, 2} == set(found), "the old one up to some event, the new one from there on"
    assert len(found) >= 8


def test_a_crash_while_pruning_leaves_the_kept_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *made(), {})
    for at in range(1, 30):
        with DISK.crash(at):
            checkpoint.prune(tmp_path, 1)
        assert checkpoint.latest(tmp_path).name == "step_000003"
    checkpoint.save(tmp_path, 4, *made(), {})
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step_000004"]


def test_a_stop_between_the_two_renamings_of_a_replacement_is_resumed_from_the_old_one(tmp_path):
    path = checkpoint.save(tmp_path, 7, *made(), {"at": 1})
    old = tmp_path / "step_000007.old"
    os.replace(path, old)
    assert checkpoint.latest(tmp_path) == old
    with DISK.crash(at=3):  # while the new one is being written, the old one is still all there is
        checkpoint.save(tmp_path, 7, *made(), {"at": 2})
    assert DISK.crashed() and checkpoint.latest(tmp_path) == old
    checkpoint.save(tmp_path, 7, *made(), {"at": 2})
    assert names(tmp_path) == ["step_000007"]
    shutil.copytree(path, old)  # the stop came after both: the new one counts
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load(path, *made())["at"] == 2


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, *made(), {})
    checkpoint.prune(tmp_path, keep=2, best_step=3)
    assert names(tmp_path) == ["step_000003", "step_000005", "step_000006"]
    checkpoint.prune(tmp_path, keep=1, best_step=6)
    assert names(tmp_path) == ["step_000006"]
    checkpoint.prune(tmp_path, keep=5)
    assert names(tmp_path) == ["step_000006"]


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as error:
        checkpoint.save(tmp_path / "file", 1, *made(), {})
    assert str(error.value).startswith(f"cannot write checkpoint {tmp_path}/file/step_000001 (Not a directory)")
    assert "\n" not in str(error.value)


FULL = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from tests.run.test_checkpoint import checkpoint, made
checkpoint.save({directory!r}, 1, *made(), {{"at": 1}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (500, 3500):  # bytes a file may have: too few for the weights, too few for the state
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save({directory!r}, 2, *made(), {{"fill": "x" * 4000}})
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_checkpoint(tmp_path):
    directory = tmp_path / "checkpoints"
    script = FULL.format(root=str(Path(__file__).parents[2]), directory=str(directory))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    sentences = done.stdout.splitlines()
    assert len(sentences) == 2, done.stdout + done.stderr
    assert all(line.startswith(f"cannot write checkpoint {directory}/step_000002 (") for line in sentences)
    assert checkpoint.latest(directory).name == "step_000001"
    assert checkpoint.load(checkpoint.latest(directory), *made())["at"] == 1


def test_what_is_loaded_can_hold_no_code(tmp_path):
    path = checkpoint.save(tmp_path, 1, *made(), {})
    torch.save({"state": print}, path / "optimizer.pt")
    content = json.loads((path / "state.json").read_text())
    content["sizes"]["optimizer.pt"] = (path / "optimizer.pt").stat().st_size
    content["crc32"]["optimizer.pt"] = zlib.crc32((path / "optimizer.pt").read_bytes())
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load(path, *made())
