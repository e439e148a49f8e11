"""What each rule optimises, as Markdown tables: `python -m grpo.oracle --group 2,4,8 --advantage grpo,rloo`.

Needs no model and no data, and takes seconds. `exact.py` computes the numbers. Left out: saying which rule is best.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from grpo import options
from grpo.advantages import ADVANTAGES
from grpo.config import Config, from_yaml
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.options import option
from grpo.oracle.exact import SAMPLINGS, Choice, Groups, compare, kl_gradient, question_weight, refill, reward_gradient
from grpo.run.log import say
from grpo.tables import lookup
from grpo.weighting import WEIGHTINGS

TABLES = {
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "weighting": WEIGHTINGS,
    "sampler_correction": CORRECTIONS,
    "kl": KL,
}
PARTS = ("advantage", "loss", "weighting", "sampler_correction")
"""What the part of the objective that follows the reward is made of."""
LARGEST = 12
"""Completions in the largest groups that are all listed; there are 18,564 such groups."""


@dataclass(frozen=True)
class OracleOptions:
    """Show what each rule of the algorithm optimises: expected gradients, computed exactly and without a model.

    Without names, each table is walked in turn and the other choices stay unbiased: rloo, reinforce, constant_length,
    none. With names, every combination of them is shown. `all` stands for all names of a table.
    """

    group: tuple[int, ...] = option((8,), ">= 2 and <= 256", distinct=True)
    """Group sizes N. Gradients are shown for groups up to 12."""
    p: tuple[float, ...] = option((0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9), "> 0 and < 1", distinct=True)
    """Chances that a completion is right, for the weights of questions."""
    advantage: tuple[str, ...] = ()
    """Functions of grpo/advantages.py."""
    loss: tuple[str, ...] = ()
    """Functions of grpo/losses.py."""
    weighting: tuple[str, ...] = ()
    """Functions of grpo/weighting.py."""
    sampler_correction: tuple[str, ...] = ()
    """Functions of grpo/corrections.py."""
    kl: tuple[str, ...] = ()
    """Functions of grpo/kl.py."""
    recipe: str | None = None
    """YAML file of options of a run, for the constants of functions; None: their defaults."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range, and for a name that its table lacks."""
        options.check(self)
        for part, table in TABLES.items():
            for name in getattr(self, part):
                lookup({**table, "all": None}, name, part)

    def names(self, part: str) -> list[str]:
        """The names of a table that are shown: those given, or all of them."""
        given = getattr(self, part)
        return [*TABLES[part]] if not given or "all" in given else [*given]


def choices(chosen: OracleOptions) -> Iterator[Choice]:
    """What is compared: each table in turn, or every combination of the names that were given."""
    base = Choice()
    given = [part for part in PARTS if getattr(chosen, part)]
    if given:
        for names in itertools.product(*(chosen.names(part) for part in given)):
            yield base._replace(**dict(zip(given, names, strict=True)))
        return
    yield base
    for part in PARTS:
        for name in TABLES[part]:
            if name != getattr(base, part):
                yield base._replace(**{part: name})


def tables(chosen: OracleOptions) -> Iterator[str]:
    """The page, piece by piece."""
    config = Config() if chosen.recipe is None else from_yaml(chosen.recipe)
    for size in chosen.group:
        yield f"## Groups of {size}"
        yield "The weight of a question that is answered correctly with probability p:"
        yield weights_of_questions(chosen, size, config)
        if size > LARGEST:
            yield f"Gradients are shown for groups up to {LARGEST}: there are too many larger ones to list them all."
            continue
        groups = Groups(size)
        for sampling in SAMPLINGS:
            yield f"Completions {sampling}: the gradient of a tiny policy against that of the mean reward."
            yield gradients(choices(chosen), groups, sampling, config)
            yield f"Completions {sampling}: the gradient of the penalty against that of KL(policy || reference)."
            yield penalties(chosen, groups, sampling, config)


def weights_of_questions(chosen: OracleOptions, size: int, config: Config) -> str:
    """One row a rule, one column a p; the last row is the factor of refilling flat groups."""
    rules = [(name, ADVANTAGES[name]) for name in chosen.names("advantage")]
    rows = [[name, *(question_weight(rule, size, p, config) for p in chosen.p)] for name, rule in rules]
    rows.append(["*factor if flat groups are drawn again*", *(refill(size, p) for p in chosen.p)])
    return markdown(["advantage", *(f"p = {p:g}" for p in chosen.p)], rows)


def gradients(compared: Iterable[Choice], groups: Groups, sampling: str, config: Config) -> str:
    """One row a choice: how long the expected gradient is, how far it turns away, and how much it scatters."""
    rows = []
    for choice in compared:
        found = groups.gradient(choice, sampling, config)
        length, angle = compare(found.mean, reward_gradient())
        names = [getattr(choice, part) for part in PARTS]
        rows.append([*names, length, degrees(angle), relative(found.variance, found.mean.norm().item())])
    return markdown([*PARTS, "length", "angle", "variance"], rows)


def penalties(chosen: OracleOptions, groups: Groups, sampling: str, config: Config) -> str:
    """One row an estimator; against the KL of each token given its prefix, and against the KL of whole completions."""
    weightings = chosen.names("weighting") if chosen.weighting else [Choice().weighting]
    rows = []
    for weighting, kl in itertools.product(weightings, chosen.names("kl")):
        found = groups.gradient(Choice(advantage=None, weighting=weighting, kl=kl), sampling, config)
        length, angle = compare(found.mean, kl_gradient(prefixes_given=True))
        whole_length, whole_angle = compare(found.mean, kl_gradient(prefixes_given=False))
        of_tokens, of_completions = [length, degrees(angle)], [whole_length, degrees(whole_angle)]
        rows.append([kl, weighting, *of_tokens, *of_completions, relative(found.variance, found.mean.norm().item())])
    return markdown(["kl", "weighting", "per token: length", "angle", "whole: length", "angle", "variance"], rows)


def degrees(angle: float) -> str:
    """An angle for people; a dash if there is none."""
    return "-" if math.isnan(angle) else f"{angle:.1f}°"


def relative(variance: float, length: float) -> str:
    """A variance in squares of the length of the mean, which no learning rate changes."""
    return "inf" if length < 1e-12 else f"{variance / length**2:.2f}"


def markdown(head: list[str], rows: list[list[str | float]]) -> str:
    """A table; numbers have four decimals."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a recipe that can not be read."""
    chosen = options.parse(OracleOptions, argv, "grpo.oracle")
    try:
        for piece in tables(chosen):
            print(piece, end="\n\n")
    except (ValueError, OSError) as error:
        say(f"grpo.oracle: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
