"""Sums and exchanges: the identity alone, the same on every rank together, and an end in time when a rank is lost."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from grpo import distributed
from tests.fakes.runs import run_ranks


def test_alone_everything_is_the_identity(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    given = torch.tensor([1.5, -2.0], requires_grad=True)
    for collective in (distributed.all_sum, distributed.all_max):
        result = collective(given)
        assert torch.equal(result, given) and not result.requires_grad
        result += 1
        assert given.tolist() == [1.5, -2.0]  # a new tensor
    assert distributed.any_true(True) is True and distributed.any_true(False) is False
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast_object("x") == "x"
    distributed.shutdown()


def test_a_device_that_is_not_there_is_an_error_that_names_the_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device is 'cuda': process 2 of this machine has no GPU, 2 are visible"):
        distributed.init("cuda")


TOGETHER = """
import json, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from grpo import distributed as d
device = d.init("cpu", 60)
r = d.rank()
part = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (3,)), [Shard(0)])  # two rows, two and none
d.put(part, torch.arange(8.0).reshape(4, 2) if r == 0 else None)
walked = []

def pieces():
    for i in range(3):
        walked.append(d.broadcast_object(i))
        yield walked[-1]

def fail(given):
    next(given)
    raise OSError("full")

try:
    d.hand_to_main(pieces(), fail)
except OSError as error:
    said = str(error)
big = torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64)[r]
square = torch.arange(4.0).reshape(2, 2)
print(json.dumps({
    "rank": r, "world": d.world_size(), "main": d.is_main(), "device": str(device),
    "sum": d.all_sum(torch.tensor([[1.0, r], [r * r, -r]])).tolist(),
    "int_sum": d.all_sum(torch.tensor(r + 1)).item(),
    "int_dtype": str(d.all_sum(torch.tensor(r, dtype=torch.int32)).dtype),
    "in_rank_order": d.all_sum(big).item(),
    "strided": d.all_sum(square.T.contiguous().T if r == 1 else square).tolist(),
    "max": d.all_max(torch.tensor([r, -r])).tolist(),
    "nan": str(d.all_max(torch.tensor(float("nan") if r == 1 else 5.0)).item()),
    "any": [d.any_true(r == 2), d.any_true(False)],
    "objects": d.gather_objects({"from": r, "rows": list(range(r))}),
    "broadcast": d.broadcast_object(["of", r]),
    "shards": [d.whole(part).tolist(), d.whole(part, torch.int64, host=True).tolist()],
    "failed": [said, walked[:]],
    "handed": d.hand_to_main(pieces(), sum),
}))
d.any_true(False)
d.shutdown()
"""


def test_together_every_rank_gets_the_same(tmp_path):
    results = []
    for r, (code, out, err) in enumerate(run_ranks(3, TOGETHER, tmp_path)):
        assert code == 0, err
        results.append(json.loads(out))
        own = {name: results[-1].pop(name) for name in ("rank", "main")}
        assert own == {"rank": r, "main": r == 0}
    assert results[0] == results[1] == results[2]
    assert results[0] == {
        "world": 3,
        "device": "cpu",
        "sum": [[3.0, 3.0], [5.0, -3.0]],
        "int_sum": 6,
        "int_dtype": "torch.int32",
        "in_rank_order": 0.0,  # (1e16 + 1) - 1e16 in float64
        "strided": [[0.0, 3.0], [6.0, 9.0]],  # one rank holds it in another memory layout
        "max": [2, 0],
        "nan": "nan",
        "any": [True, False],
        "objects": [{"from": 0, "rows": []}, {"from": 1, "rows": [0]}, {"from": 2, "rows": [0, 1]}],
        "broadcast": ["of", 0],
        "shards": [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2,
        "failed": ["full", [0, 1, 2]],  # the others have walked with rank 0 to the end
        "handed": 3,
    }


LOST = """
import os, signal, sys, time, torch
from grpo import distributed as d
d.init("cpu", {timeout})
d.any_true(False)
if d.rank() == 1:
    {fate}
try:
    d.all_sum(torch.ones(3))
except RuntimeError as error:
    print(d.lost(error, {timeout}), flush=True)
    os._exit(7)
"""


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("fate", "timeout"), [(KILLED, 600), ("time.sleep(600)", 12)], ids=["killed", "hangs"])
def test_a_lost_rank_raises_in_the_others(fate, timeout, tmp_path):
    ((code, out, err),) = run_ranks(2, LOST.format(fate=fate, timeout=timeout), tmp_path, wait_for=1)
    said = "another process ended, or did not answer for .* s \\(ddp_timeout\\); see what it printed \\([A-Z].*\\)\n"
    assert code == 7 and re.fullmatch(said, out), out + err


def test_another_error_is_not_that_of_a_lost_process():
    assert distributed.lost(RuntimeError("shapes do not fit. See [1] and [2] of them"), 600) == ""
    missing = dist.DistStoreError("Timed out after 9 seconds waiting for clients. 1/2 clients joined.")
    assert distributed.lost(missing, 9).endswith("(Timed out after 9 seconds waiting for clients)")


def test_torchrun_ends_all_ranks_when_one_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOST.format(fate=KILLED, timeout=600))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
