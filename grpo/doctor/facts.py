"""What is true of a recipe before it runs: its data, its tokens, its model's sizes, what its rewards make of answers.

Facts, and the form of a `Finding`; what finds is in `check_data.py` and `check_algorithm.py`, what adds up costs in
`memory.py`. The data and the tokenizer are the real ones; of the model only shapes are looked at. Left out: anything
that needs a completion.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

import data
import rewards
from data.problem import Problem
from data.prompts import worked_answer
from grpo import distributed
from grpo.advantages import ADVANTAGES
from grpo.config import Config, lookup, taken
from grpo.corrections import CORRECTIONS
from grpo.dataloader import encode_prompts, stop_strings
from grpo.doctor.probes import Disagreement, RewardProbe, examine
from grpo.doctor.tokens import TokenFacts, look_at_tokens
from grpo.evaluation import protocol
from grpo.evaluation.compare import problems_of
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.policy import head_sizes, learned_positions
from grpo.run.machine import device_memory
from grpo.tree import shared_prefix
from grpo.weighting import WEIGHTINGS

NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Sizes:
    """Of the model, in numbers (not bytes)."""

    parameters: int
    rounded: int
    """Of these, the ones in linear layers other than the head: what copies keep in the compute dtype."""
    layers: int
    width: int
    intermediate: int
    query_width: int
    """Query heads times head size."""
    key_width: int
    """Key heads times head size: keys of one token in one layer."""
    vocabulary: int
    context: int | None
    """Most positions that it was made for; None: not said."""
    learned_positions: bool = False
    """They are a table: beyond its end nothing can be computed."""


@dataclass(frozen=True)
class Evaluation:
    """One set of questions that the run will be judged by."""

    split: str
    shots: int
    n: int
    longest_prompt: int
    """Tokens."""
    prompt_limit: int
    also_trained: tuple[str, ...]
    """Its questions that are asked in training too."""
    also_shown: tuple[str, ...]
    """Its questions that are exemplars of their own prompt."""


@dataclass(frozen=True)
class Facts:
    """Everything the doctor looks at beside the config."""

    sizes: Sizes
    num_train: int
    prompt_tokens: tuple[int, ...]
    """Of the training prompts that were looked at, sorted."""
    shared_tokens: int
    """Common to all of them: the exemplars."""
    solution_tokens: tuple[int, ...] = ()
    """Of the worked answers of the data, sorted; empty if it has none."""
    stop: tuple[str, ...] = ()
    also_shown: tuple[str, ...] = ()
    """Training questions that are exemplars of their own prompt."""
    has_chat_template: bool = False
    evaluations: tuple[Evaluation, ...] = ()
    graders: tuple[RewardProbe, ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    tokens: TokenFacts = TokenFacts()
    errors: tuple[str, ...] = ()
    """Sentences that a run would end with before its first step."""
    world_size: int = 1
    sharing: int = 1
    """Processes that share the memory of the device: on a CPU those of the machine, on a GPU one."""
    device: str = "cpu"
    device_bytes: int = NO_LIMIT
    free_bytes: int = NO_LIMIT
    """Of them, when it was looked."""


@dataclass(frozen=True)
class Finding:
    """Something about a recipe."""

    level: Literal["sure", "warning", "note"]
    what: str
    """What was found, in a clause."""
    means: str
    """What follows from it."""
    do: str
    """How to mend it."""


def gather(config: Config, model: nn.Module, tokenizer, device: torch.device, at_most: int = 0) -> Facts:
    """Look at everything a run will use.

    Args:
        config: the run's.
        model: of transformers, for its shapes: on any device, `meta` included.
        tokenizer: its tokenizer.
        device: where the run will compute.
        at_most: problems of each set to look at, spread evenly; 0: all.

    Raises:
        ValueError: without training problems or their prompts there is nothing to look at.
    """
    train = data.load(config.data, "train", path=config.data_path, num_shots=config.num_shots, seed=config.seed)
    seen = spread(train, at_most)
    worked = [worked_answer({**p.info, "answer": p.answer}) for p in spread(seen, 1000) if "solution" in p.info]
    errors: list[str] = []
    evaluations = _evaluations(config, train, tokenizer, at_most, errors)
    errors += _unknown_names(config)
    judges = (config.eval_correct, config.eval_format) if evaluations and "." in config.eval_correct else ()
    graders, disagreements = ((), ()) if errors else examine(config.rewards, judges, seen, config.reward_timeout)
    errors += [sentence] if (sentence := taken(config)) else []
    return replace(
        outline(config, train, model, tokenizer, device, at_most),
        solution_tokens=tuple(sorted(map(len, tokenizer(worked).input_ids))) if worked else (),
        also_shown=shown_and_asked(train),
        has_chat_template=bool(tokenizer.chat_template),
        evaluations=evaluations,
        graders=graders,
        disagreements=disagreements,
        errors=tuple(errors),
    )


def outline(
    config: Config, train: Sequence[Problem], model: nn.Module, tokenizer, device: torch.device, at_most: int = 0
) -> Facts:
    """The facts that decide whether a step fits: sizes of the model, prompts and memory; arguments as in `gather`."""
    seen = spread(train, at_most)
    encoded = encode_prompts(seen, tokenizer, chat=config.chat, max_prompt_tokens=NO_LIMIT)
    stop = tuple(stop_strings(train))
    processes, (free, total) = distributed.world_size(), device_memory(device)
    return Facts(
        sizes=sizes(model),
        num_train=len(train),
        prompt_tokens=tuple(sorted(map(len, encoded))),
        shared_tokens=shared_prefix(encoded),
        stop=stop,
        tokens=look_at_tokens(model, tokenizer, config.chat, seen, encoded, stop),
        world_size=processes,
        sharing=1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
        device=device.type,
        device_bytes=total,
        free_bytes=free,
    )


def spread(items: Sequence, at_most: int) -> list:
    """At most so many of the items (0: all), evenly spread."""
    return list(items[:: max(1, -(-len(items) // at_most))] if at_most else items)


def sizes(model: nn.Module) -> Sizes:
    """Of a model, on whatever device, `meta` included."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    heads = head_sizes(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return Sizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rounded=sum(parameter.numel() for module in linear for parameter in module.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query_width=heads.width * heads.heads,
        key_width=heads.width * heads.key_heads,
        vocabulary=len(head.weight),
        context=getattr(config, "max_position_embeddings", None),
        learned_positions=learned_positions(model) is not None,
    )


def shown_and_asked(problems: Sequence[Problem]) -> tuple[str, ...]:
    """Questions that stand among the exemplars of their own prompt, up to white space."""
    found = []
    for problem in problems:
        question = _question(problem)
        if any(" ".join(shot["question"].split()) == question for shot in problem.info.get("shots", ())):
            found.append(question)
    return tuple(found)


def _evaluations(config, train, tokenizer, at_most: int, errors: list[str]) -> tuple[Evaluation, ...]:
    """What the run will evaluate on; a set that can not be loaded becomes an error."""
    trained, found = set(map(_question, train)), []
    for options in protocol.planned(config):
        for shots in options.shots:
            try:
                problems = problems_of(options, shots)
            except (ValueError, OSError) as error:
                errors.append(str(error))
                continue
            seen = spread(problems, at_most)
            encoded = encode_prompts(seen, tokenizer, chat=options.chat, max_prompt_tokens=NO_LIMIT)
            asked = map(_question, problems)
            found.append(
                Evaluation(
                    split=options.split,
                    shots=shots,
                    n=len(problems),
                    longest_prompt=max(map(len, encoded)),
                    prompt_limit=options.max_prompt_tokens,
                    also_trained=tuple(question for question in asked if question in trained),
                    also_shown=shown_and_asked(problems),
                )
            )
    return tuple(found)


def _unknown_names(config: Config) -> list[str]:
    """The sentences for names of the config that are in no table and no file."""
    tables = {"advantage": ADVANTAGES, "loss": LOSSES, "weighting": WEIGHTINGS, "kl": KL}
    lookups = [lambda n=name, t=table: lookup(t, getattr(config, n), n) for name, table in tables.items()]
    lookups.append(lambda: lookup(CORRECTIONS, config.sampler_correction, "sampler_correction"))
    judges = [name for name in (config.eval_correct, config.eval_format) if "." in name]
    lookups += [lambda n=name: rewards.load(n) for name in dict.fromkeys([*config.rewards, *judges])]
    sentences = []
    for look in lookups:
        try:
            look()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def _question(problem: Problem) -> str:
    return " ".join(problem.info.get("question", problem.prompt).split())
