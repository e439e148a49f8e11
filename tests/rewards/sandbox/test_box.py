"""The box: its layers on machines of several kinds, what programs find in it, and that nothing outlives who asked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.sandbox import layers, proof
from rewards.sandbox.client import Box, Child, Dead
from rewards.sandbox.proof import described, proven
from tests.fakes.sealing import only_here

pytestmark = only_here
ROOT = Path(__file__).parents[3]
MACHINES = {
    "this": (),
    "plain user": ("root",),
    "no namespaces": ("namespaces",),
    "no Landlock": ("landlock",),
    "seccomp alone": ("user", "namespaces", "landlock"),
}


def printed(box: Box, program: str) -> str:
    (ended,) = box.run([Child("script", program.encode(), 2.0, 5.0, b"")])
    assert ended.status == 0, ended
    return ended.printed.decode()


@pytest.mark.parametrize("without", MACHINES.values(), ids=MACHINES.keys())
def test_a_box_holds_with_the_layers_that_a_machine_has(without):
    with proven(without=without) as box:
        assert box.unsealed == ""
        named = described(box)
        assert named.startswith("seccomp, rlimits")
        for layer in without:
            assert layer not in named and (layer != "root" or "own user" not in named)


@pytest.fixture(scope="module")
def box():
    with Box() as started:
        yield started


def test_a_program_finds_no_secret(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "very secret")
    with Box() as box:
        told = printed(box, "import os, sys\nprint(sorted(os.environ), sys.argv, sys.path)")
    assert told == "['LANG', 'MALLOC_ARENA_MAX', 'OMP_NUM_THREADS', 'PYTHONHASHSEED'] [''] []\n"


def test_a_box_that_was_killed_leaves_no_descriptor_open():
    with Box(without=("namespaces",)) as box:  # so that nothing but the box has the other end
        printed(box, "")
        before = len(os.listdir("/proc/self/fd"))
        box.process.kill()
        box.process.wait()
        assert printed(box, "print(1)") == "1\n" and len(os.listdir("/proc/self/fd")) == before


def test_a_program_has_its_three_descriptors_and_none_of_the_worker(box):
    program = "import os\nfor fd in range(300):\n    try: print(fd, os.fstat(fd).st_size * 0)\n    except OSError: pass"
    inherited = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
    assert printed(box, program) == "0 0\n1 0\n2 0\n"
    for fd in inherited:
        os.close(fd)


def test_a_program_leaves_nothing_for_the_next(box):
    printed(box, "import builtins, json, sys\nbuiltins.print = None\njson.secret = 1\nsys.setrecursionlimit(50)")
    assert printed(box, "import json, sys\nprint(hasattr(json, 'secret'), sys.getrecursionlimit())") == "False 1000\n"


def test_memory_is_bounded(box):
    grows = "import mmap\ntry:\n    x = mmap.mmap(-1, %d)\n    print('had')\nexcept OSError:\n    print('refused')"
    assert printed(box, grows % (layers.MEMORY // 2)) == "had\n"
    assert printed(box, grows % (layers.MEMORY + 2**27)) == "refused\n"


def test_random_numbers_and_hashes_are_the_same_every_time(box):
    program = "import random\nprint(random.random(), hash('a'))"
    assert printed(box, program) == printed(box, program)


def test_a_wall_time_ends_what_sleeps_and_not_what_computes(box):
    busy = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(1)"
    (ended,) = box.run([Child("script", busy.encode(), 4.0, 0.5, b"")])
    assert (ended.late, ended.printed) == (False, b"1\n")
    (ended,) = box.run([Child("script", b"import time\ntime.sleep(60)", 4.0, 0.2, b"")])
    assert (ended.late, ended.status) == (True, -9)
    both = "import time\nwhile True:\n    time.sleep(0.001)\n    for _ in range(10**5): pass"
    (ended,) = box.run([Child("script", both.encode(), 60.0, 0.3, b"")])
    assert ended.late


def test_a_checker_waits_for_a_program_that_computes(box):
    busy = "import time\ndef f():\n    end = time.monotonic() + 1\n    while time.monotonic() < end: pass\n    return 1"
    tests = {"kind": "call", "entry_point": "f", "cases": [{"args": [], "result": 1}]}
    task = json.dumps({"tests": tests, "seed": 0}).encode()
    _, checker = box.run([Child("solution", busy.encode(), 4.0, 0.3), Child("checker", task, 4.0, 0.5)])
    assert json.loads(checker.told[4:]) == {"passed": [True], "whole": True, "ready": True, "failed": ""}


def test_a_machine_that_can_not_seal_is_refused_in_one_sentence(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Box, "_answer", lambda self: {"layers": [], "unsealed": "seccomp: Function not implemented"})
        with pytest.raises(ValueError) as refused:
            proven()
    assert str(refused.value) == (
        "rewards: this machine can not seal a program (seccomp: Function not implemented). Use Linux on x86_64, "
        "or set GRPO_UNSAFE_CODE=1 to run what the model writes with your own rights"
    )


@pytest.mark.parametrize("deed", proof.HOSTILE)
def test_a_box_with_a_hole_is_found_out(monkeypatch, deed):
    """Without a filter the deed succeeds, and the proof names it."""
    monkeypatch.setenv("GRPO_UNSAFE_CODE", "1")
    monkeypatch.setattr(proof, "HOSTILE", {deed: proof.HOSTILE[deed]})
    with Box() as box:
        assert proof.why_not(box) == ""  # asked for
        box.unsafe = False
        found = proof.why_not(box)
    assert found == f"a program in it could {deed}"
    Path("/tmp/grpo-sandbox-proof").unlink(missing_ok=True)


def test_without_a_seal_only_by_the_variable_and_then_it_is_said(monkeypatch):
    monkeypatch.setenv("GRPO_UNSAFE_CODE", "1")
    with proven() as box:
        assert described(box).startswith("NONE, because GRPO_UNSAFE_CODE is 1")
        assert printed(box, "import os\nprint(os.path.exists('/etc/passwd'))") == "True\n"
    monkeypatch.setenv("GRPO_UNSAFE_CODE", "yes")
    with proven() as box:
        assert described(box).startswith("seccomp")


def test_a_box_that_does_not_come_up_is_one_sentence(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.client.START", "raise SystemExit(3)")
    with pytest.raises(Dead, match="the box for programs ended"):
        Box()
    with pytest.raises(ValueError, match=r"can not seal a program \(the box for programs ended"):
        proven()


SLEEPS = """
import os, sys, time
from rewards.sandbox.client import Box, Child
box = Box(without=%r)
print(box.process.pid, flush=True)
box.run([Child("script", b"import time\\ntime.sleep(600)", 300.0, 600.0, b"")])
"""


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["namespaces", "none"])
def test_box_and_programs_end_with_the_process_that_asked(without):
    asks = subprocess.Popen([sys.executable, "-c", SLEEPS % (without,)], stdout=subprocess.PIPE, cwd=ROOT)
    pid = int(asks.stdout.readline())
    family = [pid]
    while len(family) < (3 if not without else 2):  # the box, its first process in the namespaces, the program
        time.sleep(0.05)
        family = descendants(pid)
    asks.kill()
    asks.wait()
    end = time.monotonic() + 30
    while any(map(alive, family)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, family))


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(below for child in children for below in descendants(int(child)))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


PLAIN = "/usr/bin/python3"


@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists(PLAIN), reason="needs root, and a Python for all users")
def test_another_user_than_root_has_a_box_too(tmp_path):
    (tmp_path / "rewards").symlink_to(ROOT / "rewards")
    code = "from rewards.sandbox.proof import proven, described\nwith proven() as box: print(described(box))"
    version = subprocess.run([PLAIN, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
    if version.stdout != b"True\n" or not os.access(ROOT, os.R_OK):
        pytest.skip("no Python that fits")
    done = subprocess.run(
        [PLAIN, "-B", "-c", code], cwd=ROOT, user=65534, group=65534, extra_groups=[], capture_output=True, env={}
    )
    assert done.stdout.startswith(b"seccomp, rlimits") and b"own user" not in done.stdout, done.stderr
