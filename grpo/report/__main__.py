"""The command `python -m grpo.report RUN ...`: write `report.html` for one or more runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.report import write_report


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a wrong input."""
    description = "Write report.html for one or more runs."
    parser = argparse.ArgumentParser(prog="python -m grpo.report", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    where = "file to write; default: report.html in the run or, for several runs, beside the first"
    parser.add_argument("--out", type=Path, help=where)
    options = parser.parse_args(argv)
    try:
        print(write_report(options.runs, options.out))
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
