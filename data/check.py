"""Run the solution of every problem of a file of programming problems, and name the first test that each fails.

    python -m data.check FILE

A problem whose own solution fails teaches nothing. Left out: problems without a solution, which are counted, and
running a program (`rewards/code.py`).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.code import problems_of
from data.problem import Problem

SECONDS = 120
"""That the tests of one solution may take together."""


def has_tests(problem: Problem) -> bool:
    """Whether answers are programs, which the problem's own tests judge."""
    tests = problem.info.get("tests")
    return isinstance(tests, dict) and "kind" in tests


def perfect(problem: Problem) -> str:
    """The completion that holds a problem's solution."""
    if problem.info["form"] == "continue" or "```" in problem.answer:
        return problem.answer
    return f"```python\n{problem.answer.rstrip()}\n```\n"


def failing(
    problems: Sequence[Problem], score: Callable[[list[str], list[Problem]], Sequence[float | None]]
) -> list[Problem]:
    """The problems whose solution is not right.

    Args:
      problems: each with a solution.
      score: (B completions, their B problems) -> B values, 1 for a program that passes all tests.
    """
    values = score([perfect(problem) for problem in problems], list(problems))
    return [problem for problem, value in zip(problems, values, strict=True) if value != 1]


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, 1 if a solution fails, or 2 for a wrong file."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m data.check FILE\n")
        print((__doc__ or "").splitlines()[0])
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        problems = problems_of(Path(argv[0]).expanduser())
        solved = [problem for problem in problems if problem.answer]
        failed = [(problem.info["name"], _why(problem)) for problem in failing(solved, _run)]
    except (ValueError, OSError) as error:
        print(f"data.check: error: {error}", file=sys.stderr)
        return 2
    for name, why in failed:
        print(f"{name}: its own solution fails {why}")
    without = len(problems) - len(solved)
    print(f"{len(problems)} problems; of {len(solved)} solutions {len(failed)} fail, and {without} have none")
    return 1 if failed else 0


def _run(completions: list[str], problems: list[Problem]) -> list[float | None]:
    from rewards.runner import RewardRunner  # here, since data is loaded without rewards

    with RewardRunner(["code.correctness"], SECONDS) as runner:
        return runner.score(completions, problems)[0]


def _why(problem: Problem) -> str:
    """`(wrong): test 2, f(3): got 4, expected 9`. The solution is run again for this."""
    from rewards.code import verdict_of

    verdict = verdict_of(perfect(problem), problem)
    return ": ".join(filter(None, (f"({verdict.reason})", verdict.failed)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
