"""What another objective would have made of a saved step: `python -m grpo.replay RUN STEP --loss cispo`.

A run with `--save_replay True` saves step 1 and each step after a checkpoint. Flags override the run's own options:
those of the objective, and how the work is done. Without flags the run's own gradient is computed again. Left out:
options that decide what is sampled, and how updates are cut.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo import options
from grpo.config import Config
from grpo.replay.gradients import COSINE, OF_MACHINE, SHOWN, Row, changeable, config_of, replay
from grpo.run.log import say


def usage() -> str:
    """The text of --help."""
    names = ", ".join([*sorted(changeable(Config())), *OF_MACHINE])
    return f"usage: python -m grpo.replay RUN STEP --name value ...\n\n{__doc__}\nOptions, as of train.py: {names}"


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text, with a dash where there is no number."""
    names = [*SHOWN, COSINE]
    lines = [["update", "objective", *names]]
    for row in rows:
        numbers = [row.numbers.get(name) for name in names]
        lines.append([row.update, row.objective, *("-" if x is None else f"{x:.6g}" for x in numbers)])
    return "\n".join(f"{line[0]:6}  {line[1]:13}" + "".join(f"  {cell:>14}" for cell in line[2:]) for line in lines)


def asked_for(argv: Sequence[str]) -> tuple[Path, int, dict]:
    """The run, the step, and the options in which its objective is to differ."""
    if len(argv) < 2 or argv[0].startswith("-") or not argv[1].isdecimal():
        raise ValueError("write RUN STEP --name value ..., with the number of a step; see --help")
    run, flags = Path(argv[0]), argv[2:]
    was = config_of(run)
    asked = options.parse(Config, ["--recipe", str(run / "config.yaml"), *flags], "grpo.replay")
    return run, int(argv[1]), {name: value for name, value in vars(asked).items() if value != getattr(was, name)}


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a wrong option or input."""
    if {"-h", "--help"} & {*argv}:
        print(usage())
        return 0
    try:
        run, step, changes = asked_for(argv)
        print(table(replay(run, step, **changes)))
    except (ValueError, OSError) as error:
        say(f"grpo.replay: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
