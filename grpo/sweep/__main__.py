"""Train every cell of a grid, evaluate it at several numbers of shots, and show the results as a table and a picture.

    python -m grpo.sweep --recipe recipes/demo.yaml --grid num_shots=0,2,8 seed=0,1,2 --eval_shots 0,2,8
    python -m grpo.sweep --recipe recipes/demo.yaml --settings recipes/sweeps/gallery.yaml --grid seed=0,1,2 --jobs 2

Every cell is a process of its own that runs `train.py` in `<out>/<cell>` with `--resume auto`:

- a finished cell is not run again;
- a stopped cell continues;
- a failed cell is reported, and the others still run.

The evaluation is the final one of each run. Further flags of `train.py` go to every cell. Left out: searching for the
best setting, and sharing GPUs among jobs.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from grpo import options
from grpo.run.signals import STOPS
from grpo.sweep.cells import DONE, Cell, Sweep, evaluation_of, make_cells, split_flags
from grpo.sweep.table import as_text, differences, tabulate, write

PAUSE = 0.1
"""Seconds between two looks at the runs."""


def run_cells(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, str]]:
    """Run train.py for each cell, and give each with its state when it has ended: `done`, or why it is not finished.

    Runs that are under way when nobody asks any more, such as after Ctrl-C, save their state and end.
    """
    waiting, running = deque(enumerate(cells, start=1)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, cell = waiting.popleft()
                print(f"cell {number} of {len(cells)}: {cell.name}", end="", flush=True)
                if evaluation_of(cell):
                    print(": done before")
                    yield cell, DONE
                    continue
                print(f"\n$ {shlex.join(cell.command)}", flush=True)
                running[cell.name] = cell, start(cell, jobs)
            for cell, process in list(running.values()):
                if (code := process.poll()) is not None:
                    del running[cell.name]
                    yield cell, state_of(cell, code)
            time.sleep(PAUSE * bool(running))
    finally:
        for _, process in running.values():
            process.terminate()  # harmless if Ctrl-C at a terminal has reached the run already
        for _, process in running.values():
            process.wait()


def start(cell: Cell, jobs: int) -> subprocess.Popen:
    """Start a run. One alone prints to the terminal and has the machine; one of several has a file and some cores."""
    if jobs == 1:
        return subprocess.Popen(cell.command)
    cell.directory.parent.mkdir(parents=True, exist_ok=True)
    share = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    with open(f"{cell.directory}.txt", "ab") as printed:
        return subprocess.Popen(cell.command, stdout=printed, stderr=subprocess.STDOUT, env=share | os.environ)


def state_of(cell: Cell, code: int) -> str:
    """What a run that ended with this exit code is: `done`, or the reason why not."""
    if code != 0:
        return f"failed with exit code {code}"
    return DONE if evaluation_of(cell) else "stopped before it was evaluated"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if all cells are done, 1 if some failed, 2 for a wrong option, 130 if interrupted."""
    ours, theirs = split_flags(argv)
    sweep = options.parse(Sweep, ours, "grpo.sweep")
    states: dict[str, str] = {}
    try:
        cells = make_cells(sweep, theirs)
        with closing(run_cells(cells, sweep.jobs)) as ended:
            for cell, state in ended:
                states[cell.name] = state
                if state != DONE:
                    print(f"{cell.name}: {state}", file=sys.stderr, flush=True)
        done = [(cell, evaluation_of(cell)) for cell in cells if states[cell.name] == DONE]
        table = tabulate(done)
        write(Path(sweep.out), cells, states, table, differences(done, cells[0].trained_as))
    except (ValueError, OSError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: stopped; the same command continues it", file=sys.stderr)
        return 130
    if table:
        print(f"\n{as_text(table)}\n{Path(sweep.out) / 'sweep.md'}, sweep.png")
    failed = {name: state for name, state in states.items() if state != DONE}
    for name, reason in failed.items():
        print(f"sweep: {name}: {reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    for number in STOPS:  # the run that is going on gets it too, and saves its state
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
