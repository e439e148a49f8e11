"""The command `python -m grpo.report RUN ...`: write `report.html` for runs, with `--watch` while they go on."""

import argparse
import sys
import time
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
    again = "write the page again whenever a step is added, until Ctrl-C; look every SECONDS (10)"
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help=again)
    options = parser.parse_args(argv)
    try:
        print(write_report(options.runs, options.out), flush=True)
        drawn = _changed(options.runs)
        while options.watch is not None:
            time.sleep(max(0.1, options.watch))
            if (now := _changed(options.runs)) != drawn:
                write_report(options.runs, options.out)
                drawn = now
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _changed(runs: Sequence[Path]) -> list[float]:
    """When each run last wrote numbers of a step, in seconds."""
    return [(run / "metrics.jsonl").stat().st_mtime for run in runs]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
