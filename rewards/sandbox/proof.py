"""Proof at every start that a box holds: a few honest programs pass in it, and a few hostile ones get nowhere.

Left out: the attacks of the tests, which are many more.
"""

import sys
from collections.abc import Sequence

from rewards.sandbox.client import UNSAFE, Box, Dead
from rewards.sandbox.judge import judge

REFUSAL = (
    "rewards: this machine can not seal a program ({}). Use Linux on x86_64, or set " + UNSAFE + "=1 to run what "
    "the model writes with your own rights"
)
HONEST = (
    "print(sum(map(int, input().split())))",
    "import threading\nt = threading.Thread(target=lambda: print(5))\nt.start()\nt.join()",
    "from dataclasses import dataclass\nimport re\n@dataclass\nclass A:\n    x: int\nprint(A(5).x)",
)
"""Programs that print 5 when they read `2 3`."""
CALLED = {"kind": "call", "entry_point": "f", "cases": [{"args": [2, 3], "result": [5, "5"]}]}
FUNCTION = "def f(a, b):\n    return (a + b, str(a + b))"
HOSTILE = {
    "open a file": "open('/etc/passwd')",
    "write a file": "import os\nos.open('/tmp/grpo-sandbox-proof', os.O_WRONLY | os.O_CREAT)",
    "open a socket": "import socket\nsocket.socket()",
    "start a process": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "signal another process": "import os\nos.kill(os.getppid(), 0)",
    "run a command": "import os\nos.execv('/bin/true', ['true'])",
}
"""What fails in a sealed program. Where it does not, the program prints 5."""


def proven(preload: Sequence[str] = (), without: Sequence[str] = ()) -> Box:
    """A new box that holds. The arguments are those of `Box`.

    Raises:
      ValueError: the machine can not seal a program, in one sentence.
    """
    try:
        box = Box(preload, without)
    except (Dead, OSError) as error:
        raise ValueError(REFUSAL.format(error)) from error
    if box.unsafe:
        print(f"warning: sandbox: {described(box)}", file=sys.stderr, flush=True)
    if reason := box.unsealed or why_not(box):
        box.close()
        raise ValueError(REFUSAL.format(reason))
    return box


def why_not(box: Box) -> str:
    """What a box fails in; empty: it passed all trials."""
    adds = {"kind": "stdin", "cases": [{"input": "2 3", "output": "5"}]}
    for program in HONEST:
        if not judge(box, program, adds, 2.0).correct:
            return f"an honest program fails in it: {program!r}"
    if not judge(box, FUNCTION, CALLED, 2.0).correct:
        return f"an honest function fails in it: {FUNCTION!r}"
    if box.unsafe:
        return ""
    for deed, program in HOSTILE.items():
        attempt = "try:\n    " + program.replace("\n", "\n    ") + "\n    print(5)\nexcept OSError:\n    print(6)"
        if not judge(box, attempt, {"kind": "stdin", "cases": [{"input": "", "output": "6"}]}, 2.0).correct:
            return f"a program in it could {deed}"
    return ""


def described(box: Box) -> str:
    """The layers of a box, in words."""
    if box.unsafe:
        return f"NONE, because {UNSAFE} is 1: what the model writes runs with your own rights; rlimits"
    return ", ".join(["seccomp", "rlimits", *box.layers])
